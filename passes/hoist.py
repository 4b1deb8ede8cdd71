"""Hoist: what follows from inputs that do not change during a run is computed once a run.

Keys and values of the text are the case in point: they depend on the prompt, not on the timestep. Values qualify whose
inputs are neither the denoising clock nor what any residual stream starts from, and whose computation is more than a
few pointwise ops. Their segments stand first; the runtime skips them while it is given the same tensors, unchanged::

    embed → [norm, q, k(text), v(text), attention, …] → …    ⇒    [k(text), v(text)], embed → [norm, q, attention, …]
"""

from collections.abc import Set as AbstractSet
from dataclasses import replace

from torch import fx

from toca_compile.ir.graph import ancestors, outer_inputs, signature, value_of
from toca_compile.ir.program import Segment
from toca_compile.ir.types import Site
from toca_compile.rules.registry import Work, work_of


def hoist(
    graph: fx.Graph,
    segments: tuple[Segment, ...],
    sites: tuple[Site, ...],
    varying: AbstractSet[fx.Node],
    clock: AbstractSet[fx.Node],
) -> tuple[Segment, ...]:
    """The segments with those that are constant during a run in front.

    ``varying`` are the inputs that are no parameters, ``clock`` those of them that tell the timestep.
    """
    chosen = _constants(graph, sites, varying, clock)
    if not chosen:
        return segments
    count = max(s.template for s in segments) + 1
    outside = tuple(n for s in segments if not s.sites for n in s.nodes if n in chosen)
    shown = tuple(n for n in outside if not set(n.users) <= set(outside))
    front = [Segment(count, outer_inputs(outside), outside, shown, constant=True)] if outside else []
    rest: list[Segment] = []
    for segment in segments:
        exemplar = next(s for s in segments if s.template == segment.template)
        pairs = _pairs(exemplar, segment, chosen)
        if pairs is None:
            return segments
        hoisted = [n for n in exemplar.nodes if n in chosen]
        kept = [n for n in exemplar.nodes if n not in chosen]
        if exemplar.sites and hoisted:
            group = [s for s in segments if s.template == segment.template]
            places = [exemplar.nodes.index(n) for n in hoisted]
            # A value is an output of the part if any block of the template is asked for it from outside the part.
            live = [i for i in places if any(set(s.nodes[i].users) - {s.nodes[j] for j in places} for s in group)]
            part = Segment(
                count + 1 + segment.template,
                tuple(pairs[n] for n in outer_inputs(hoisted)),
                tuple(pairs[n] for n in hoisted),
                tuple(segment.nodes[i] for i in live),
                constant=True,
                in_block=True,
            )
            front.append(part)
        if kept:
            rest.append(
                replace(
                    segment,
                    nodes=tuple(pairs[n] for n in kept),
                    inputs=tuple(pairs[n] for n in outer_inputs(kept)),
                    outputs=tuple(n for n in segment.outputs if n not in chosen),
                )
            )
    result = (*front, *rest)
    if any(isinstance(value_of(n), (tuple, list)) for s in result for n in (*s.inputs, *s.outputs)):
        return segments
    numbers: dict[int, int] = {}
    return tuple(replace(s, template=numbers.setdefault(s.template, len(numbers))) for s in result)


def _constants(
    graph: fx.Graph, sites: tuple[Site, ...], varying: AbstractSet[fx.Node], clock: AbstractSet[fx.Node]
) -> set[fx.Node]:
    """The nodes to hoist, closed under their operands."""
    reads: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        own = frozenset({node}) if node in varying else frozenset()
        reads[node] = own.union(*(reads[i] for i in node.all_input_nodes))
    after_sites = {s.add for s in sites}
    below = _closed(after_sites, graph)
    roots = [s.source for s in sites if s.source not in below]
    moving = set(clock).union(*(reads[r] for r in roots)) if roots else set(clock)
    # What a site computes is the site's, though it may follow from the text alone (learned queries that read it).
    cached = _closed({n for s in sites for n in s.region} | after_sites, graph)
    constant = {n for n in graph.nodes if n.op == "call_function" and reads[n] and not reads[n] & moving} - cached
    # Only what a branch reads is worth it, and only where a contraction is saved.
    branches = {n for s in sites for n in s.region}
    exported = [n for n in constant if any(u in branches and u not in constant for u in n.users)]
    chosen: set[fx.Node] = set()
    for node in exported:
        above = {n for n in ancestors([node]) if n.op == "call_function"}
        if any(work_of(n) is Work.CONTRACT for n in above):
            chosen |= above
    return chosen


def _closed(nodes: AbstractSet[fx.Node], graph: fx.Graph) -> set[fx.Node]:
    """``nodes`` and all that depend on them."""
    found = set(nodes)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _pairs(a: Segment, b: Segment, chosen: AbstractSet[fx.Node]) -> dict[fx.Node, fx.Node] | None:
    """Inputs and nodes of two segments of a template that correspond; None where they do not, as they stand."""
    pairs = dict(zip((*a.inputs, *a.nodes), (*b.inputs, *b.nodes), strict=True))
    same = all(
        signature(u) == signature(v)
        and (u in chosen) == (v in chosen)
        and [pairs.get(i) for i in u.all_input_nodes] == v.all_input_nodes
        for u, v in zip(a.nodes, b.nodes, strict=True)
    )
    return pairs if same or a is b else None
