"""SkipRange: a range of blocks that some steps skip, and the graphs that stand in for it.

A range is whole segments in a row. What it makes and others read, its outputs, is kept: as what the range added to the
residual stream, or as it is. Three small graphs do that, compiled like any other::

    keep:   store_(cache, x_out − x_in)        at a step that computes the range (and the differences of a forecast)
    skip:   x_out = x_in + cache               at a step that skips it
    probe:  mean|r − kept| / mean|kept|        where r = x_in − x_0 is what the blocks before the range changed

A forecast replaces ``cache`` by the cache moved along its differences.
"""

from collections.abc import Sequence, Set

import torch
from torch import fx

import toca_compile.ir.ops  # noqa: F401  (defines the toca:: ops)
from toca_compile.errors import PolicyError
from toca_compile.ir.graph import ancestors, operand_nodes, source_line, value_of
from toca_compile.ir.plan import Memory, Skip
from toca_compile.ir.program import Entry, Range, Slot, Unit, Variant
from toca_compile.ir.types import AxisTypes, Site, Type
from toca_compile.passes.series import Series

toca = torch.ops.toca
aten = torch.ops.aten


def find_range(unit: Unit, skipped: Set[int], skip: Skip) -> Range:
    """The range that holds the sites ``skipped``.

    Raises:
        PolicyError: they are no whole blocks in a row, or make something that is no stream of tokens, or a threshold
            has no blocks before them to be measured on.
    """
    assert unit.types is not None
    names = {s.index: s.name for s in unit.sites}
    touched = [i for i, s in enumerate(unit.segments) if set(s.sites) & skipped]
    first, last = touched[0], touched[-1] + 1
    left = [names[i] for s in unit.segments[first:last] for i in s.sites if i not in skipped]
    if left:
        raise PolicyError(f"only whole blocks in a row can be skipped, and {left[0]} stands among those to skip")
    inside = {n for s in unit.segments[first:last] for n in s.nodes}
    read = {n for s in unit.segments[last:] for n in s.inputs} | set(
        unit.module.graph.output_node().all_input_nodes
    )  # fmt: skip
    outputs = tuple(n for s in unit.segments[first:last] for n in s.outputs if n in read)
    # What branches are added to enters; where they start may lie far before (a skip from an early block).
    entered = [_residual(s) for s in unit.sites if s.index in skipped]
    sources = [n for n in entered if n not in inside]
    # A stream that no site starts from (text that a joint attention updates) is known by the addition that made it.
    entering = [n for s in unit.segments[first:last] for n in s.inputs if n not in inside]
    order = {node: i for i, node in enumerate(unit.module.graph.nodes)}
    added = sorted((n for n in entering if n.target is aten.add.Tensor), key=order.__getitem__, reverse=True)
    candidates = list(dict.fromkeys([*sources, *added]))
    tokens = {f for s in unit.sites for f in s.axis.factors}
    for node in outputs:
        if not any(f in tokens for dim in unit.types.type_of(node) for f in dim):
            raise PolicyError(f"the blocks cannot be skipped: {_told(node)} is made among them and read after them")
    entries = tuple(
        _entry(unit.types, node, candidates, tokens) if skip.residual else None for node in outputs
    )  # fmt: skip
    probe = None
    if skip.threshold is not None:
        probe = _probe(unit, first, sources)
    return Range(first, last, outputs, entries, probe)


def _residual(site: Site) -> fx.Node:
    """The stream that a site's branch is added to."""
    return next(n for n in operand_nodes(site.add) if site.output not in ancestors([n], stop=[site.source]))


def _entry(types: AxisTypes, node: fx.Node, sources: Sequence[fx.Node], tokens: Set[int]) -> Entry | None:
    """The entering stream of a value's kind, or several that make it up along one dimension, or one that holds the same
    in another layout."""
    wanted = types.type_of(node)

    def matches(source: fx.Node, type_: Type) -> bool:
        """Equal but for features, which each linear layer numbers anew."""
        sizes = tuple(types.factors.size(dim) for dim in type_)
        same = zip(types.type_of(source), type_, strict=False)
        return tuple(value_of(source).shape) == sizes and all(a == b or not tokens & {*a, *b} for a, b in same)

    for source in sources:
        if matches(source, wanted):
            return Entry((source,))
    for d, dim in enumerate(wanted):
        parts = types.factors.segments(dim)
        found = [
            next((s for s in sources if matches(s, (*wanted[:d], part, *wanted[d + 1 :]))), None) for part in parts
        ]
        if len(parts) > 1 and None not in found:
            return Entry(tuple(s for s in found if s is not None), d)
    for source in sources:
        given = [f for dim in types.type_of(source) for f in dim]
        target = [f for dim in wanted for f in dim]
        if len(set(target)) == len(target) and sorted(given) == sorted(target):
            sizes = tuple(types.factors.size((f,)) for f in given)
            return Entry((source,), 0, sizes, tuple(given.index(f) for f in target))
    return None


def _probe(unit: Unit, first: int, sources: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """The stream of the picture's tokens before the first block and before the range."""
    assert unit.types is not None
    before = [i for s in unit.segments[:first] for i in s.sites]
    if not before:
        raise PolicyError("a threshold is measured on the blocks before those to skip: compute at least one of them")
    main = max((unit.sites[i].axis for i in before), key=lambda axis: axis.size)
    start = next(unit.sites[i].source for i in before if unit.sites[i].axis == main)
    enters = next((s for s in sources if unit.types.type_of(s) == unit.types.type_of(start)), None)
    if enters is None:
        raise PolicyError(f"the stream {_told(start)} does not enter the blocks to skip: their change is not measured")
    return start, enters


def _told(node: fx.Node) -> str:
    return f"{node.name} ({source_line(node)})"


def keep_range(found: Range, skip: Skip) -> Variant:
    """Keeps the outputs: values are the range's inputs and outputs."""
    graph, given = _begin((*found.inputs, *found.outputs))
    for i, (node, entry) in enumerate(zip(found.outputs, found.entries, strict=True)):
        value = given[node]
        if entry is not None:
            value = graph.call_function(aten.sub.Tensor, (value, _entered(graph, given, entry, node)))
        _series(graph, given, i, skip.memory).keep(value, differences=True)
    return _end(graph, given, (*found.inputs, *found.outputs), ())


def skip_range(found: Range, skip: Skip) -> Variant:
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


def probe_range(found: Range, *, keep: bool) -> Variant:
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


def _series(graph: fx.Graph, given: dict[fx.Node | Slot, fx.Node], position: int, memory: Memory) -> Series:
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
