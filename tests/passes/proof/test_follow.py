"""Follow: where a factor of a branch's output lies in the values that it is made from."""

from toca_compile.ir.program import Program
from toca_compile.ir.types import FactorPos
from toca_compile.passes.proof.follow import Blocked, Branch, Walk, follow


def test_height_and_width_lie_side_by_side_all_the_way(program: Program) -> None:
    assert program.types is not None
    mlp = program.sites[1]
    for at in (FactorPos(1, 0), FactorPos(1, 1)):
        trace = follow(program.types, Branch(mlp.source, mlp.output, mlp.region), at)
        assert isinstance(trace, dict)
        assert {n.name: place for n, place in trace.items()} == dict.fromkeys(
            ("add", "linear_1", "relu", "linear_2"), at
        )


def test_features_are_read_whole(program: Program) -> None:
    assert program.types is not None
    mlp = program.sites[1]
    stopped = follow(program.types, Branch(mlp.source, mlp.output, mlp.region), FactorPos(2, 0))
    assert isinstance(stopped, Blocked)
    assert stopped.node is mlp.output


def test_the_op_that_stops_the_walk_is_named_with_its_line(program: Program) -> None:
    assert program.types is not None
    attention = program.sites[0]
    given = program.types, Branch(attention.source, attention.output, attention.region), FactorPos(1, 0)
    stopped = follow(*given)
    assert str(stopped).startswith("aten.scaled_dot_product_attention.default mixes the tokens (programs.py:")
    walk = Walk(whole={})
    assert isinstance(follow(*given, walk=walk), dict)
    assert [n.name for n in walk.whole or ()] == ["getitem_1", "getitem_2"]
