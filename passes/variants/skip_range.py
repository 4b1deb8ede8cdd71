"""SkipRange: the graphs that stand in for a range of blocks. What it makes and others read, its outputs, is kept: as
what the range added to the residual stream, or as it is::

    keep:   store_(cache, x_out − x_in)        at a step that computes the range (and the rest of its history)
    skip:   x_out = x_in + cache               at a step that skips it
    probe:  mean|r − kept| / mean|kept|        where r = x_in − x_0 is what the blocks before the range changed

A forecast replaces ``cache`` by what its history says.
"""

from collections.abc import Callable

import torch
from torch import fx

from toca_compile.ir.graph import value_of
from toca_compile.ir.plan import Skip
from toca_compile.ir.program import BlockRange, Entry, Variant
from toca_compile.ir.state import State
from toca_compile.passes.variants.emit import Builder
from toca_compile.passes.variants.series import series_of

toca = torch.ops.toca
aten = torch.ops.aten


def keep_range(found: BlockRange, skip: Skip) -> Variant:
    """Keeps the outputs: values are the range's inputs and outputs."""
    builder = Builder((*found.inputs, *found.outputs))
    for i, (node, entry) in enumerate(zip(found.outputs, found.entries, strict=True)):
        value = builder.env[node]
        if entry is not None:
            value = builder.call(aten.sub.Tensor, value, _entered(builder, entry, node))
        series_of(builder, i, skip.memory).keep(value, moving=True)
    return builder.finish(())


def skip_range(found: BlockRange, skip: Skip) -> Variant:
    """Yields the outputs from what was kept: values are the range's inputs."""
    builder = Builder(found.inputs)
    results = []
    for i, (node, entry) in enumerate(zip(found.outputs, found.entries, strict=True)):
        value = series_of(builder, i, skip.memory).forecast()
        if entry is not None:
            if skip.memory.dtype is not None:  # torch adds no float8 to another dtype
                value = builder.cast(value, node)
            value = builder.call(aten.add.Tensor, _entered(builder, entry, node), value)
        # A copy: the next step's writes to the cache must not reach what this step hands out.
        results.append(builder.cast(value, node))
    return builder.finish(results)


def keep_change(found: BlockRange, skip: Skip) -> Variant:
    """Keeps what the blocks before the range changed. Values: the probe's."""
    builder = Builder(found.probe or ())
    builder.call(toca.store_.default, builder.slot(State.CHANGE, 0), _change(builder, found))
    return builder.finish(())


def probe_range(found: BlockRange, skip: Skip) -> Variant:
    """How much the change before the range differs from the kept one. Values: the probe's."""
    builder = Builder(found.probe or ())
    change = _change(builder, found)
    return builder.finish([builder.call(toca.relative_change.default, change, builder.slot(State.CHANGE, 0))])


GRAPHS: dict[str, Callable[[BlockRange, Skip], Variant]] = {
    "keep": keep_range,
    "skip": skip_range,
    "probe": probe_range,
    "keep change": keep_change,
}


def range_values(found: BlockRange, name: str) -> tuple[fx.Node, ...]:
    """The values that a graph of a range is given, from which its variant chooses."""
    if name in ("probe", "keep change"):
        return tuple(dict.fromkeys(found.probe or ()))
    return tuple(dict.fromkeys(found.inputs if name == "skip" else (*found.inputs, *found.outputs)))


def range_buffer(kind: State, position: int, index: int, found: BlockRange, skip: Skip) -> torch.Tensor:
    """A fake tensor of the shape, dtype and device of a buffer of the range."""
    changes = kind is State.CHANGE and found.probe is not None
    value: torch.Tensor = value_of(found.probe[0] if changes and found.probe else found.outputs[position])
    like = value.new_empty(value.shape, dtype=None if changes else skip.memory.dtype)
    return skip.memory.buffers(like)[index - 1] if kind is State.HISTORY else like


def _change(builder: Builder, found: BlockRange) -> fx.Node:
    assert found.probe is not None
    start, enters = (builder.env[n] for n in found.probe)
    return builder.call(aten.sub.Tensor, enters, start)


def _entered(builder: Builder, entry: Entry, output: fx.Node) -> fx.Node:
    nodes = [builder.env[n] for n in entry.nodes]
    value = nodes[0] if len(nodes) == 1 else builder.call(aten.cat.default, nodes, entry.dim)
    if entry.order:
        apart = builder.call(aten.reshape.default, value, list(entry.sizes))
        moved = builder.call(aten.permute.default, apart, list(entry.order))
        value = builder.call(aten.reshape.default, moved, list(value_of(output).shape))
    return value
