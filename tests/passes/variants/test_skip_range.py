"""SkipRange: what a range added is kept, and added to what enters at the steps that skip it."""

from expecttest import assert_expected_inline

from toca_compile.ir.plan import Skip
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Program
from toca_compile.passes.proof.block_range import find_range
from toca_compile.passes.variants.skip_range import GRAPHS


def texts(program: Program, skip: Skip, *names: str) -> str:
    found = find_range(program, {2, 3}, skip)
    return "\n".join(f"-- {name}\n{print_graph(GRAPHS[name](found, skip.memory).module.graph)}" for name in names)


def test_a_residual(program: Program) -> None:
    assert_expected_inline(
        texts(program, Skip(threshold=0.1), "keep", "skip", "keep change", "probe"),
        """\
-- keep
in0_add_1 = input  # [2, 6, 4]
in1_add_3 = input  # [2, 6, 4]
cache0 = input
sub_tensor = sub.Tensor(in1_add_3, in0_add_1)
store__default = toca.store_(cache0, sub_tensor)
return []
-- skip
in0_add_1 = input  # [2, 6, 4]
cache0 = input
add_tensor = add.Tensor(in0_add_1, cache0)
_to_copy_default = _to_copy(add_tensor, dtype=torch.float32)
return [_to_copy_default]
-- keep change
in0_transpose = input  # [2, 6, 4]
in1_add_1 = input  # [2, 6, 4]
change0 = input
sub_tensor = sub.Tensor(in1_add_1, in0_transpose)
store__default = toca.store_(change0, sub_tensor)
return []
-- probe
in0_transpose = input  # [2, 6, 4]
in1_add_1 = input  # [2, 6, 4]
change0 = input
sub_tensor = sub.Tensor(in1_add_1, in0_transpose)
relative_change_default = toca.relative_change(sub_tensor, change0)
return [relative_change_default]""",
    )


def test_the_stream_as_it_left(program: Program) -> None:
    assert_expected_inline(
        texts(program, Skip(residual=False), "keep", "skip"),
        """\
-- keep
in0_add_3 = input  # [2, 6, 4]
cache0 = input
store__default = toca.store_(cache0, in0_add_3)
return []
-- skip
cache0 = input
_to_copy_default = _to_copy(cache0, dtype=torch.float32)
return [_to_copy_default]""",
    )
