"""SkipRange: the segments that stand in for a range of blocks. What it makes and others read, its outputs, is kept: as
what the range added to the residual stream, or as it is::

    keep:   store_(cache, x_out − x_in)        at a step that computes the range (and the rest of its history)
            x_out + Σ cᵢ · kept valueᵢ         where that step makes up for forecasts before it
    skip:   x_out = x_in + cache               at a step that skips it

Beside them stand those of what a gate measures (``gauge.py``).
A forecast replaces ``cache`` by what its history says.
"""

from collections.abc import Callable

import torch
from torch import fx

from toca_compile.ir.graph import value_of
from toca_compile.ir.history import OUTPUT_ONLY, History
from toca_compile.ir.program import BlockRange, Entry, Form, StandIn, Variant
from toca_compile.passes.variants.emit import Builder
from toca_compile.passes.variants.gauge import keep_change, probe_range
from toca_compile.passes.variants.series import series_of

toca = torch.ops.toca
aten = torch.ops.aten


def stand_in(segment: StandIn, forms: tuple[Form, ...]) -> Variant:
    """The variant of a segment that stands in for a range."""
    return GRAPHS[segment.does](segment.range, forms[0].keep.history or OUTPUT_ONLY)


def keep_range(found: BlockRange, memory: History) -> Variant:
    """Keeps the outputs, and where the memory corrects yields them corrected: values are the range's inputs and
    outputs."""
    builder = Builder((*found.inputs, *found.outputs))
    results = []
    for i, stream in enumerate(found.streams):
        left = value = builder.env[stream.output]
        series = series_of(builder, i, memory, stream.places)
        if stream.entry is not None:
            value = builder.call(aten.sub.Tensor, left, _entered(builder, stream.entry, stream.output))
            if memory.corrects:  # where nothing was told since the step before, by nothing: what left stays to the bit
                left = builder.call(aten.add.Tensor, left, builder.cast(series.correction(value), stream.output))
        results.append(left)
        series.keep(value, moving=True)
    return builder.finish(results if memory.corrects else ())


def skip_range(found: BlockRange, memory: History) -> Variant:
    """Yields the outputs from what was kept: values are the range's inputs."""
    builder = Builder(found.inputs)
    results = []
    for i, stream in enumerate(found.streams):
        value = series_of(builder, i, memory, stream.places).forecast()
        if stream.entry is not None:
            if memory.dtype is not None:
                value = builder.cast(value, stream.output)
            value = builder.call(aten.add.Tensor, _entered(builder, stream.entry, stream.output), value)
        # A copy: the next step's writes to the cache must not reach what this step hands out.
        results.append(builder.cast(value, stream.output))
    return builder.finish(results)


GRAPHS: dict[str, Callable[[BlockRange, History], Variant]] = {
    "keep": keep_range,
    "skip": skip_range,
    "probe": probe_range,
    "keep change": keep_change,
}


def _entered(builder: Builder, entry: Entry, output: fx.Node) -> fx.Node:
    nodes = [builder.env[n] for n in entry.nodes]
    value = nodes[0] if len(nodes) == 1 else builder.call(aten.cat.default, nodes, entry.dim)
    if entry.order:
        apart = builder.call(aten.reshape.default, value, list(entry.sizes))
        moved = builder.call(aten.permute.default, apart, list(entry.order))
        value = builder.call(aten.reshape.default, moved, list(value_of(output).shape))
    return value
