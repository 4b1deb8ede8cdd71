"""The emission of anchors: a weighted sum of the last values, and the ring that keeps them::

store_at_(ring, place, cache); store_(cache, y)            at a step that computes all
y = w₀·cache + w₁·ring[0] + w₂·ring[1] + …                 at one that forecasts

Weights that follow from the values are made of their products where they are kept, and are then a row of a table.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import fx

from toca_compile.ir.anchors import AHEAD, Anchors, Ring
from toca_compile.ir.state import Number, State
from toca_compile.passes.variants.compute import EMISSIONS, forecast
from toca_compile.passes.variants.series import HISTORIES, Series

toca = torch.ops.toca
aten = torch.ops.aten

EMISSIONS[Anchors] = forecast


@HISTORIES.of(Ring)
class Values(Series):
    """The last values as they were."""

    history: Ring

    @property
    def ring(self) -> fx.Node:
        """The buffer of the values before the last one."""
        return self.builder.slot(State.HISTORY, self.position, 1)

    def forecast(self, age: fx.Node | None = None) -> fx.Node:
        builder, at, kept = self.builder, self.position, self.history.kept
        values = self._values()
        if self.history.measured is not None:
            table = builder.slot(State.HISTORY, at, 2)
            row = builder.call(toca.weights_at.default, table, builder.slot(Number.MOVE, at, 0))
            return self._sum([builder.call(toca.weighted_by.default, value, row, i) for i, value in enumerate(values)])
        channels, groups = self.history.channels, []
        for group in range(max(channels, default=0) + 1):
            groups.append(self._weighted(values, group * kept))
        return builder.call(toca.by_channel.default, groups, list(channels)) if channels else groups[0]

    def correction(self, value: fx.Node) -> fx.Node:
        return self._weighted([*self._values(), value], self.history.kept)

    def _values(self) -> list[fx.Node]:
        kept = range(self.history.kept - 1)
        return [self.output, *(self.builder.call(aten.select.int, self.ring, 0, i) for i in kept)]

    def _weighted(self, values: Sequence[fx.Node], first: int) -> fx.Node:
        """The sum of values, by as many numbers of the step."""
        numbers = [self.builder.slot(Number.MOVE, self.position, first + i) for i in range(len(values))]
        both = zip(values, numbers, strict=True)
        return self._sum([self.builder.call(toca.weighted.default, value, number) for value, number in both])

    def _sum(self, parts: Sequence[fx.Node]) -> fx.Node:
        return reduce(lambda a, b: self.builder.call(aten.add.Tensor, a, b), parts)

    def keep(self, value: fx.Node, *, moving: bool, age: fx.Node | None = None) -> None:
        builder, at, measured = self.builder, self.position, self.history.measured
        if self.history.kept > 1:
            builder.call(toca.store_at_.default, self.ring, builder.slot(Number.KEEP, at, 0), self.output)
        super().keep(value, moving=moving)
        if measured is not None:
            products = builder.call(toca.gram.default, self.output, self.ring)
            numbers = (builder.slot(Number.KEEP, at, i) for i in range(3))
            table = builder.call(getattr(toca, measured.op).default, products, *numbers, AHEAD, measured.ridge)
            builder.call(toca.store_.default, builder.slot(State.HISTORY, at, 2), table)
