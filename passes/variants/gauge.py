"""Gauge: the emissions of gates. What is kept of what a gate measures, and the distance from that::

    keep:      store_(kept, r)                       at a step that computes the blocks
    distance:  mean|r − kept| / mean|kept|           at one that may skip them

Where it adds up, each step keeps what it measured.
"""

import torch
from torch import fx

from toca_compile.ir.gates import FirstOutput, Gate, LastBlocks, Rate
from toca_compile.ir.history import History
from toca_compile.ir.program import BlockRange, Variant
from toca_compile.ir.state import Number, State
from toca_compile.passes.variants.emit import Builder, Emissions
from toca_compile.passes.variants.series import series_of

toca = torch.ops.toca
aten = torch.ops.aten

GAUGES: "Emissions[type[Gauge]]" = Emissions()


def keep_change(found: BlockRange, memory: History) -> Variant:
    """Keeps what is measured. Values: the probe's, and what leaves the range where that is kept too."""
    gauge = _gauge(found, memory)
    gauge.keep()
    return gauge.builder.finish(())


def probe_range(found: BlockRange, memory: History) -> Variant:
    """What is measured, as processes that share the work agree on it. Values: the probe's."""
    gauge = _gauge(found, memory)
    return gauge.builder.finish([gauge.builder.agreed(gauge.distance(), gauge.probe.groups, "max")])


def _gauge(found: BlockRange, memory: History) -> "Gauge":
    assert found.probe is not None
    return GAUGES.find(found.probe.gate)(found, memory)


@GAUGES.of(Gate)
class Gauge:
    """What a gate measures, in the graph of a variant: here, one value, or its difference to another."""

    def __init__(self, found: BlockRange, memory: History) -> None:
        assert found.probe is not None
        self.probe, self.memory = found.probe, memory
        more = [self.probe.leaves] if self.probe.leaves is not None else []
        self.builder = Builder((*self.probe.given, *more))
        for node in self.probe.nodes:
            self.builder.env[node] = self.builder.graph.node_copy(node, lambda n: self.builder.env[n])

    def kept(self, index: int = 0) -> fx.Node:
        """A buffer of what it keeps."""
        return self.builder.slot(State.CHANGE, 0, index)

    def store(self, index: int, value: fx.Node) -> None:
        """Overwrite one."""
        self.builder.call(toca.store_.default, self.kept(index), value)

    def value(self) -> fx.Node:
        """What is measured now."""
        builder, probe = self.builder, self.probe
        value = builder.env[probe.value]
        if probe.filter is not None:
            value = builder.call(toca.sea_filter.default, value, builder.slot(Number.SIGMA, 0), *probe.filter)
        return value if probe.minus is None else self.change()

    def change(self) -> fx.Node:
        """What became of the stream on the way."""
        assert self.probe.minus is not None
        ends = self.builder.env[self.probe.value], self.builder.env[self.probe.minus]
        return self.builder.call(aten.sub.Tensor, *ends)

    def keep(self) -> None:
        """What a step that computes the blocks leaves."""
        self.store(0, self.value())

    def distance(self) -> fx.Node:
        """How far a step is from that: a float32 scalar, or a vector that begins with it."""
        value = self.value()
        distance = self.builder.call(toca.relative_change.default, value, self.kept())
        if self.probe.gate.adds_up:
            self.store(0, value)
        return distance


@GAUGES.of(Rate)
class Rates(Gauge):
    """The stream at each step; as it entered and left at the last computed one; and the rate of the last two of
    these."""

    def keep(self) -> None:
        assert self.probe.leaves is not None
        now, out = self.builder.env[self.probe.value], self.builder.env[self.probe.leaves]
        self.store(3, self.builder.call(toca.relative_rate.default, out, self.kept(2), now, self.kept(1)))
        for index, value in enumerate((now, now, out)):
            self.store(index, value)

    def distance(self) -> fx.Node:
        now = self.builder.env[self.probe.value]
        expected = self.builder.call(toca.expected_change.default, now, *(self.kept(i) for i in (0, 2, 3)))
        self.store(0, now)
        return expected


@GAUGES.of(FirstOutput)
class Outputs(Gauge):
    """What leaves the first blocks at each step, and what they changed at the last two computed ones."""

    def value(self) -> fx.Node:
        return self.builder.env[self.probe.value]

    def keep(self) -> None:
        self.store(2, self.kept(1))
        self.store(1, self.change())
        super().keep()

    def distance(self) -> fx.Node:
        share = self.builder.call(toca.share_of_way.default, self.change(), self.kept(1), self.kept(2))
        return self.builder.call(aten.stack.default, [super().distance(), share])


@GAUGES.of(LastBlocks)
class Forecasts(Gauge):
    """What the last blocks change, kept as what leaves the range is."""

    def keep(self) -> None:
        series_of(self.builder, 0, self.memory).keep(self.change(), moving=True)

    def distance(self) -> fx.Node:
        forecast = series_of(self.builder, 0, self.memory).forecast()
        return self.builder.call(toca.relative_change.default, forecast, self.change())
