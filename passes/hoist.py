"""Hoist: what does not change during a run stands first, and so does what follows from the denoising time beside it.

Keys and values of the text depend on the prompt, not on the timestep: they are *constant* during a run. Embeddings of
the timestep and every block's shifts, scales and gates are *timed*: they depend on it, and on nothing that moves.
Values qualify whose computation is more than a few pointwise ops. Their segments stand in front of all others; the
runtime leaves out those whose values it has kept from the same inputs (``runtime/step_control.py``,
``runtime/conditioning.py``)::

    embed → [norm, linear(silu(t)), q, k(text), …] → …    ⇒    [k(text)], [t], [linear(silu(t))], embed → [norm, q, …]
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

import torch
from torch import fx

from toca_compile.ir.graph import ancestors, in_order, outer_inputs, signature, value_of
from toca_compile.ir.program import Segment
from toca_compile.ir.types import AxisTypes, Site
from toca_compile.rules.registry import Work, work_of


def hoist(
    graph: fx.Graph,
    segments: tuple[Segment, ...],
    sites: tuple[Site, ...],
    types: AxisTypes,
    varying: AbstractSet[fx.Node],
    clock: Mapping[fx.Node, bool],
) -> tuple[Segment, ...]:
    """The segments with those that are constant during a run in front, and behind them those that are timed.

    ``varying`` are the inputs that are no parameters, ``clock`` those of them that tell the timestep, and whether the
    host knows their numbers.
    """
    reads = _reads(graph, varying)
    below = _closed({s.add for s in sites}, graph)
    roots = [s.source for s in sites if s.source not in below]
    moving = frozenset[fx.Node]().union(*(reads[root] for root in roots))
    # What a site computes is the site's, though it may follow from the text alone (learned queries that read it).
    branches = {n for s in sites for n in s.region}
    cached = below | _closed(branches, graph)
    free = [n for n in graph.nodes if n.op == "call_function" and n not in cached]
    constant = {n for n in free if reads[n] and not reads[n] & (moving | clock.keys())}
    # Only what a branch reads is worth it.
    read = [n for n in constant if any(u in branches and u not in constant for u in n.users)]
    constants = _worthwhile(read)
    timed: set[fx.Node] = set()
    if roots and clock and all(clock.values()):
        still = [n for n in free if not reads[n] & (moving - clock.keys())]
        timed = _as_they_lie(_without_tokens(still, sites, types), graph)
    read = [n for n in timed if reads[n] & clock.keys() and not timed.issuperset(n.users)]
    found = _in_front(segments, constants, timed=False)
    before = {n for s in found if s.constant for n in s.nodes}
    return _in_front(found, _worthwhile(read) - before, timed=True)


def _reads(graph: fx.Graph, varying: AbstractSet[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """For each node, the inputs that are no parameters from which it follows."""
    reads: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        own = frozenset({node}) if node in varying else frozenset()
        reads[node] = own.union(*(reads[i] for i in node.all_input_nodes))
    return reads


def _without_tokens(candidates: list[fx.Node], sites: tuple[Site, ...], types: AxisTypes) -> set[fx.Node]:
    """Those of the candidates, in the order of the graph, that have no tokens and are made of such alone: one of each
    is kept for each timestep, and values with tokens are as large as the picture."""
    found: set[fx.Node] = set()
    axes = {s.axis.factors for s in sites}
    for node in candidates:
        dims = types.results.get(node, ())
        factors = {f for dim in dims for p in dim for f in types.factors.resolve(p)}
        made_of = {n for n in node.all_input_nodes if n.op == "call_function"}
        # What the graph hands out may be written to by whoever is given it.
        handed_out = any(user.op == "output" for user in node.users)
        if made_of <= found and not any(factors.issuperset(axis) for axis in axes) and not handed_out:
            found.add(node)
    return found


def _as_they_lie(timed: set[fx.Node], graph: fx.Graph) -> set[fx.Node]:
    """Without those that would be kept in another order of their dimensions than they have: elementwise ops lay out
    what they make as their operands lie, and numbers that are added in another order give another sum."""
    kept, count = set(timed), -1
    while len(kept) != count:
        count = len(kept)
        for node in reversed(graph.nodes):
            if node in kept and not kept.issuperset(node.users) and _is_turned(value_of(node)):
                kept.discard(node)
        for node in graph.nodes:
            if node in kept and any(n in timed and n not in kept for n in node.all_input_nodes):
                kept.discard(node)
    return kept


def _is_turned(value: object) -> bool:
    """Whether the dimensions of a value lie in memory in another order than they are counted."""
    if not isinstance(value, torch.Tensor):
        return False
    strides = [s for s, size in zip(value.stride(), value.shape, strict=True) if size > 1 and s]
    return strides != sorted(strides, reverse=True)


def _worthwhile(read: list[fx.Node]) -> set[fx.Node]:
    """Those of the nodes for which a contraction is saved, and what they are made of."""
    chosen: set[fx.Node] = set()
    for node in read:
        above = {n for n in ancestors([node]) if n.op == "call_function"}
        if any(work_of(n) is Work.CONTRACT for n in above):
            chosen |= above
    return chosen


def _in_front(segments: tuple[Segment, ...], chosen: AbstractSet[fx.Node], *, timed: bool) -> tuple[Segment, ...]:
    """The segments with ``chosen`` in segments of their own in front, behind those that stand there already."""
    if not chosen:
        return segments
    count = max(s.template for s in segments) + 1
    outside = tuple(n for s in segments if not s.sites for n in s.nodes if n in chosen)
    shown = tuple(n for n in outside if not set(n.users) <= set(outside))
    front = []
    if outside:
        front.append(Segment(count, outer_inputs(outside), outside, shown, constant=not timed, timed=timed))
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
                constant=not timed,
                timed=timed,
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
    ordered = _ordered(front)
    if ordered is None:
        return segments
    first = [s for s in rest if s.constant or s.timed]
    result = (*first, *ordered, *rest[len(first) :])
    if any(isinstance(value_of(n), (tuple, list)) for s in result for n in (*s.inputs, *s.outputs)):
        return segments
    numbers: dict[int, int] = {}
    for segment in (*rest, *front) if timed else result:
        numbers.setdefault(segment.template, len(numbers))
    return tuple(replace(s, template=numbers[s.template]) for s in result)


def _ordered(front: list[Segment]) -> list[Segment] | None:
    """The segments so that each follows those that it needs; None where two need each other."""
    made = {n: i for i, s in enumerate(front) for n in s.outputs}
    order = in_order([{made[n] for n in s.inputs if n in made} for s in front])
    return None if order is None else [front[i] for i in order]


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
