"""Programs: what is told of a variant by its graph."""

import torch
from torch import fx

import toca_compile.ops  # noqa: F401  (defines the ops)
from toca_compile.ir.program import Use, Variant, uses_of
from toca_compile.ir.state import Slot, State


def test_what_a_variant_does_with_a_buffer_is_told_by_its_graph() -> None:
    graph = fx.Graph()
    x, *kept = (graph.placeholder(name) for name in ("x", "read", "stored", "moved", "both"))
    read, stored, moved, both = kept
    graph.call_function(torch.ops.toca.store_.default, (stored, x))
    graph.call_function(torch.ops.toca.shift_.default, (moved, x))
    y = graph.call_function(torch.ops.aten.add.Tensor, (x, both))
    graph.call_function(torch.ops.toca.store_.default, (both, y))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (y, read)),))
    slots = tuple(Slot(State.HISTORY, 0, i) for i in range(4))
    uses = uses_of(Variant(fx.GraphModule({}, graph), (0,), slots))
    assert list(uses.values()) == [Use(True, False), Use(False, True), Use(True, True), Use(True, True)]
    assert Use(False, True) | Use(True, False) == Use(True, True)
