"""Carry-over: a run that goes on in another graph of the model, and what of its caches is true there too.

One sampling may reach several graphs one after the other: under ``torch.autocast`` the first latents are float32, and
later ones bfloat16; guidance that ends early halves the batch. Where the blocks of the two graphs are the same
calls on the same weights, what is kept of a branch in one is what the other would have kept of it.
"""

from typing import Any

import torch
from torch import fx

from toca_compile.ir.graph import value_of
from toca_compile.ir.program import Program, Segment
from toca_compile.ir.types import Site
from toca_compile.runtime.schedule import Schedule
from toca_compile.runtime.step_control import Run

Place = tuple[Any, ...]  # of a value: what tells it in both graphs


def carry_over(run: Run, key: tuple[int, ...], now: Schedule) -> Schedule | None:
    """Let a graph have the caches of the one that took the step before, where they are true for it.

    Args:
        key: of the graph, in the run.
        now: the plan as it would be followed from the first step on.

    Returns:
        The schedule that goes with the caches; None where there are none that fit.
    """
    for other, at in run.last.items():
        before = run.schedules[other]
        if other != key and other[1:] == key[1:] and at == run.step - 1 and _fits(before, now):
            _forget(run, key)
            run.buffers = {_renamed(name, other, key): buffer for name, buffer in run.buffers.items()}
            if other in run.computed:
                run.computed[key] = run.computed[other]
            if other in run.drift:
                run.drift[key] = run.drift[other]
            _forget(run, other)
            return now if not before.start else Schedule(now.program, now.planned, before.start)
    return None


def _forget(run: Run, key: tuple[int, ...]) -> None:
    run.buffers = {name: buffer for name, buffer in run.buffers.items() if name[: len(key)] != key}
    for kept in (run.kept, run.computed, run.drift, run.bound, run.fixed):
        kept.pop(key, None)


def _renamed(name: tuple[Any, ...], old: tuple[int, ...], new: tuple[int, ...]) -> tuple[Any, ...]:
    return (*new, *name[len(old) :]) if name[: len(old)] == old else name


def _fits(before: Schedule, now: Schedule) -> bool:
    """Whether two graphs keep the same values of the same branches, by the same plan."""
    a, b = before.program, now.program
    if before.plan != now.plan or len(a.sites) != len(b.sites) or len(a.segments) != len(b.segments):
        return False
    ours, theirs = _places(a), _places(b)
    same = [_spelled(s, ours) == _spelled(t, theirs) for s, t in zip(a.segments, b.segments, strict=True)]
    for site, twin in zip(a.sites, b.sites, strict=True):
        if _told(site, ours) != _told(twin, theirs):
            return False
    # Between blocks that differ a range would be another one; and what is kept is made in blocks.
    inside = [i for i, segment in enumerate(a.segments) if segment.sites]
    return all(same[inside[0] : inside[-1] + 1])


def _told(site: Site, places: dict[fx.Node, Place]) -> Any:
    """What is known of a site, and the values of which something is kept."""
    proofs = [p for p in (site.row_proof, site.query_proof) if p is not None]
    values = [site.source, site.add, site.output, *(n for p in proofs for n in (*p.stale_inputs, *p.dense_inputs))]
    known = (site.name, site.kind, site.axis.size, site.axis.grid, site.score_by_keys, site.score_by_queries)
    return known, [places.get(n) for n in values]


def _places(program: Program) -> dict[fx.Node, Place]:
    """Where each value stands: an input by its number, another by its segment and its place in it."""
    places: dict[fx.Node, Place] = {n: ("input", i) for i, n in enumerate(program.placeholders)}
    for i, segment in enumerate(program.segments):
        # A segment may differ in what it casts first, and yet yield the same values: these have numbers of their own.
        places |= {n: ("inner", i, j) for j, n in enumerate(segment.nodes)}
        places |= {n: ("made", i, j, _kind(n)) for j, n in enumerate(segment.outputs)}
    return places


def _kind(node: fx.Node) -> Any:
    value = value_of(node)
    return (tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else None


def _spelled(segment: Segment, places: dict[fx.Node, Place]) -> Any:
    """The calls of a segment, with what each reads."""

    def name(node: fx.Node) -> str:  # a string, since that is what stands in an argument
        return repr(places.get(node, (node.op, str(node.target))))

    calls = [(str(n.target), repr(fx.node.map_arg((n.args, n.kwargs), name)), _kind(n)) for n in segment.nodes]
    return calls, [name(n) for n in segment.inputs], [name(n) for n in segment.outputs], segment.sites
