"""SkipRange: a range of blocks that some steps skip, and the graphs that stand in for it.

A range is whole segments in a row. What it makes and others read, its outputs, is kept: as what the range added to the
residual stream, or as it is. Three small graphs do that, compiled like any other::

    keep:   store_(cache, x_out − x_in)        at a step that computes the range (and the differences of a forecast)
    skip:   x_out = x_in + cache               at a step that skips it
    probe:  mean|r − kept| / mean|kept|        where r = x_in − x_0 is what the blocks before the range changed

A forecast replaces ``cache`` by the cache moved along its differences.
"""

from collections.abc import Sequence

import torch
from torch import fx

import toca_compile.ops  # noqa: F401  (defines the toca:: ops)
from toca_compile.ir.graph import value_of
from toca_compile.ir.plan import CacheSpec, Skip
from toca_compile.ir.program import BlockRange, Entry, Slot, Variant
from toca_compile.passes.variants.series import Series

toca = torch.ops.toca
aten = torch.ops.aten


def keep_range(found: BlockRange, skip: Skip) -> Variant:
    """Keeps the outputs: values are the range's inputs and outputs."""
    graph, given = _begin((*found.inputs, *found.outputs))
    for i, (node, entry) in enumerate(zip(found.outputs, found.entries, strict=True)):
        value = given[node]
        if entry is not None:
            value = graph.call_function(aten.sub.Tensor, (value, _entered(graph, given, entry, node)))
        _series(graph, given, i, skip.memory).keep(value, differences=True)
    return _end(graph, given, (*found.inputs, *found.outputs), ())


def skip_range(found: BlockRange, skip: Skip) -> Variant:
    """Yields the outputs from what was kept: values are the range's inputs."""
    graph, given = _begin(found.inputs)
    results = []
    for i, (node, entry) in enumerate(zip(found.outputs, found.entries, strict=True)):
        value = _series(graph, given, i, skip.memory).forecast()
        if entry is not None:
            if skip.memory.dtype is not None:  # torch adds no float8 to another dtype
                value = graph.call_function(aten._to_copy.default, (value,), {"dtype": value_of(node).dtype})
            value = graph.call_function(aten.add.Tensor, (_entered(graph, given, entry, node), value))
        # A copy: the next step's writes to the cache must not reach what this step hands out.
        value = graph.call_function(aten._to_copy.default, (value,), {"dtype": value_of(node).dtype})
        results.append(value)
    return _end(graph, given, found.inputs, results)


def probe_range(found: BlockRange, *, keep: bool) -> Variant:
    """How much the change before the range differs from the kept one; or keep this step's. Values: the probe's."""
    assert found.probe is not None
    graph, given = _begin(found.probe)
    start, enters = (given[n] for n in found.probe)
    change = graph.call_function(aten.sub.Tensor, (enters, start))
    kept = _slot(graph, given, Slot("change", 0))
    if keep:
        graph.call_function(toca.store_.default, (kept, change))
        return _end(graph, given, found.probe, ())
    return _end(graph, given, found.probe, [graph.call_function(toca.relative_change.default, (change, kept))])


def _series(graph: fx.Graph, given: dict[fx.Node | Slot, fx.Node], position: int, memory: CacheSpec) -> Series:
    """The history of one output."""
    return Series(
        lambda target, *args: graph.call_function(target, args),
        lambda kind, index: _slot(graph, given, Slot(kind, position, index)),
        memory,
    )


def _begin(values: Sequence[fx.Node]) -> tuple[fx.Graph, dict[fx.Node | Slot, fx.Node]]:
    graph = fx.Graph()
    given: dict[fx.Node | Slot, fx.Node] = {}
    for i, node in enumerate(dict.fromkeys(values)):
        given[node] = graph.placeholder(f"in{i}_{node.name}")
        given[node].meta["val"] = value_of(node)
    return graph, given


def _slot(graph: fx.Graph, given: dict[fx.Node | Slot, fx.Node], slot: Slot) -> fx.Node:
    if slot not in given:
        last = [n for n in graph.nodes if n.op == "placeholder"][-1:]
        with graph.inserting_after(last[0]) if last else graph.inserting_before(next(iter(graph.nodes), None)):
            given[slot] = graph.placeholder(f"{slot.kind}{slot.position}" + (f"_{slot.index}" if slot.index else ""))
    return given[slot]


def _entered(graph: fx.Graph, given: dict[fx.Node | Slot, fx.Node], entry: Entry, output: fx.Node) -> fx.Node:
    nodes = [given[n] for n in entry.nodes]
    value = nodes[0] if len(nodes) == 1 else graph.call_function(aten.cat.default, (nodes, entry.dim))
    if entry.order:
        apart = graph.call_function(aten.reshape.default, (value, list(entry.sizes)))
        moved = graph.call_function(aten.permute.default, (apart, list(entry.order)))
        value = graph.call_function(aten.reshape.default, (moved, list(value_of(output).shape)))
    return value


def _end(
    graph: fx.Graph, given: dict[fx.Node | Slot, fx.Node], values: Sequence[fx.Node], results: Sequence[fx.Node]
) -> Variant:
    graph.output(tuple(results))
    used = [n for n in dict.fromkeys(values) if given[n].users]
    for node in dict.fromkeys(values):
        if node not in used:
            graph.erase_node(given[node])
    slots = tuple(s for s in given if isinstance(s, Slot))
    order = list(dict.fromkeys(values))
    return Variant(fx.GraphModule({}, graph), tuple(order.index(n) for n in used), slots)
