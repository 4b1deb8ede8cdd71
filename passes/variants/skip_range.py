"""SkipRange: the segments that stand in for a range of blocks. What it makes and others read, its outputs, is kept: as
what the range added to the residual stream, or as it is::

    keep:   store_(cache, x_out − x_in)        at a step that computes the range (and the rest of its history)
    skip:   x_out = x_in + cache               at a step that skips it
    probe:  mean|r − kept| / mean|kept|        where r is what a gate measures, such as x_in − x_0

A forecast replaces ``cache`` by what its history says.
"""

from collections.abc import Callable

import torch
from torch import fx

from toca_compile.ir.graph import value_of
from toca_compile.ir.history import OUTPUT_ONLY, History
from toca_compile.ir.program import BlockRange, Entry, Form, StandIn, Variant
from toca_compile.ir.state import Number, State
from toca_compile.passes.variants.emit import Builder
from toca_compile.passes.variants.series import series_of

toca = torch.ops.toca
aten = torch.ops.aten


def stand_in(segment: StandIn, forms: tuple[Form, ...]) -> Variant:
    """The variant of a segment that stands in for a range."""
    return GRAPHS[segment.does](segment.range, forms[0].keep.history or OUTPUT_ONLY)


def keep_range(found: BlockRange, memory: History) -> Variant:
    """Keeps the outputs: values are the range's inputs and outputs."""
    builder = Builder((*found.inputs, *found.outputs))
    for i, stream in enumerate(found.streams):
        value = builder.env[stream.output]
        if stream.entry is not None:
            value = builder.call(aten.sub.Tensor, value, _entered(builder, stream.entry, stream.output))
        series_of(builder, i, memory).keep(value, moving=True)
    return builder.finish(())


def skip_range(found: BlockRange, memory: History) -> Variant:
    """Yields the outputs from what was kept: values are the range's inputs."""
    builder = Builder(found.inputs)
    results = []
    for i, stream in enumerate(found.streams):
        value = series_of(builder, i, memory).forecast()
        if stream.entry is not None:
            if memory.dtype is not None:
                value = builder.cast(value, stream.output)
            value = builder.call(aten.add.Tensor, _entered(builder, stream.entry, stream.output), value)
        # A copy: the next step's writes to the cache must not reach what this step hands out.
        results.append(builder.cast(value, stream.output))
    return builder.finish(results)


def keep_change(found: BlockRange, memory: History) -> Variant:
    """Keeps what is measured. Values: the probe's."""
    builder, value = _measured(found)
    builder.call(toca.store_.default, builder.slot(State.CHANGE, 0), value)
    return builder.finish(())


def probe_range(found: BlockRange, memory: History) -> Variant:
    """How much what is measured differs from what was kept of it, which it then becomes if each step keeps it. Values:
    the probe's."""
    builder, value = _measured(found)
    kept = builder.slot(State.CHANGE, 0)
    distance = builder.call(toca.relative_change.default, value, kept)
    assert found.probe is not None
    if found.probe.at_each_step:
        builder.call(toca.store_.default, kept, value)
    return builder.finish([builder.agreed(distance, found.probe.groups, "max")])


GRAPHS: dict[str, Callable[[BlockRange, History], Variant]] = {
    "keep": keep_range,
    "skip": skip_range,
    "probe": probe_range,
    "keep change": keep_change,
}


def _measured(found: BlockRange) -> tuple[Builder, fx.Node]:
    """A graph that makes what is measured, and that."""
    probe = found.probe
    assert probe is not None
    builder = Builder(probe.given)
    for node in probe.nodes:
        builder.env[node] = builder.graph.node_copy(node, lambda n: builder.env[n])
    value = builder.env[probe.value]
    if probe.filter is not None:
        value = builder.call(toca.sea_filter.default, value, builder.slot(Number.SIGMA, 0), *probe.filter)
    return builder, value if probe.minus is None else builder.call(aten.sub.Tensor, value, builder.env[probe.minus])


def _entered(builder: Builder, entry: Entry, output: fx.Node) -> fx.Node:
    nodes = [builder.env[n] for n in entry.nodes]
    value = nodes[0] if len(nodes) == 1 else builder.call(aten.cat.default, nodes, entry.dim)
    if entry.order:
        apart = builder.call(aten.reshape.default, value, list(entry.sizes))
        moved = builder.call(aten.permute.default, apart, list(entry.order))
        value = builder.call(aten.reshape.default, moved, list(value_of(output).shape))
    return value
