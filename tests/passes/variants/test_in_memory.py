"""Variants whose host numbers are tensors: the same values, and no op that would read one on the host."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

import toca_compile.ops  # noqa: F401  (defines the toca:: ops)
from toca_compile.errors import PassError
from toca_compile.ir.program import Variant
from toca_compile.ir.state import Number, Slot, State
from toca_compile.passes.variants.in_memory import in_memory

toca = torch.ops.toca
aten = torch.ops.aten
CPU = torch.device("cpu")


def variant(target: Any, slots: list[Slot], *args: Any) -> Variant:
    """One call: strings are its value and its slots, by name."""
    graph = fx.Graph()
    nodes = {"x": graph.placeholder("x"), **{s.name: graph.placeholder(s.name) for s in slots}}
    graph.output((graph.call_function(target, tuple(nodes.get(a, a) if isinstance(a, str) else a for a in args)),))
    return Variant(fx.GraphModule({}, graph), (0,), tuple(slots))


def number(value: int) -> Tensor:
    return torch.tensor(value)


MOVE, STEP, SINCE, SITE, K = (
    Slot(kind, 0) for kind in (Number.MOVE, Number.STEP, Number.SINCE, Number.SITE, Number.K)
)  # fmt: skip
STAMP = Slot(State.STAMP, 0)
SELECT: Any = ("x", "stamp0", "k0", "step0", "since0", 0.25, [], 2, 0.0)


def test_a_number_is_read_from_memory() -> None:
    made = variant(toca.forecast.default, [Slot(State.OUTPUT, 0), MOVE], "cache0", "x", "move0", 1)
    held = in_memory(made, CPU)
    assert [str(n.target) for n in held.module.graph.nodes if n.op == "call_function"] == ["toca.forecast.numbers"]
    x, cache = torch.randn(4), torch.randn(4)
    for power in (0, 1, 7):
        assert torch.equal(held.module(x, cache, number(power))[0], made.module(x, cache, power)[0])
    assert (held.values, held.slots) == (made.values, made.slots)


def test_k_stays_on_the_host() -> None:
    made = variant(toca.select_tokens.default, [STAMP, K, STEP, SINCE], *SELECT)
    held = in_memory(made, CPU)
    score, stamp = torch.rand(2, 9), torch.randint(0, 4, (2, 9), dtype=torch.int32)
    for k in (1, 5):
        selected = held.module(score, stamp, k, number(5), number(3))[0]
        assert torch.equal(selected, made.module(score, stamp, k, 5, 3)[0])
        assert selected.shape == (2, k)


def test_a_constant_beside_a_number_is_a_tensor_too() -> None:
    made = variant(toca.random_scores.default, [SITE], "x", 0, "site0", 3)
    like = torch.zeros(2, 5)
    assert torch.equal(in_memory(made, CPU).module(like, number(2))[0], made.module(like, 2)[0])


def test_marks_keep_their_dtype() -> None:
    made = variant(toca.mark_fresh_.default, [STAMP, STEP], "stamp0", "x", "step0")
    stamp = torch.zeros(1, 4, dtype=torch.int32)
    in_memory(made, CPU).module(torch.tensor([[1, 3]]), stamp, number(6))
    assert stamp.tolist() == [[0, 6, 0, 6]]


def test_an_op_that_cannot_is_named() -> None:
    made = variant(aten.mul.Tensor, [MOVE], "x", "move0")
    with pytest.raises(PassError, match=r"mul\.Tensor reads a number of the step"):
        in_memory(made, CPU)


def test_every_op_with_a_number_has_the_overload() -> None:
    """And no other: K alone is a shape."""
    for name in dir(toca):
        packet = getattr(toca, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            symbolic = "SymInt " in str(packet.default._schema).replace("SymInt k", "")
            assert ("numbers" in packet.overloads()) == symbolic


def test_a_weight_for_each_sample() -> None:
    """Of several numbers one alone; what stays on the host is a number still."""
    one, two = Slot(Number.MOVE, 0, 0), Slot(Number.MOVE, 0, 1)
    module, weights = variant(toca.weighted.default, [Slot(State.OUTPUT, 0), one, two], "cache0", "move0"), (3, 5)
    held = in_memory(module, CPU, {one})
    cache = torch.randn(2, 4)
    own = torch.tensor(weights)[:, None]
    expected = torch.stack(
        [module.module(torch.zeros(()), row, w, 7)[0] for row, w in zip(cache, weights, strict=True)]
    )
    torch.testing.assert_close(held.module(torch.zeros(()), cache, own, 7)[0], expected)
