"""The emission of anchors: a weighted sum of the last values, and the ring that keeps them::

store_at_(ring, place, cache); store_(cache, y)            at a step that computes all
y = w₀·cache + w₁·ring[0] + w₂·ring[1] + …                 at one that forecasts
"""

import torch
from torch import fx

from toca_compile.ir.anchors import Anchors, Ring
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

    def forecast(self, age: fx.Node | None = None) -> fx.Node:
        builder, at = self.builder, self.position
        total = builder.call(toca.weighted.default, self.output, builder.slot(Number.MOVE, at, 0))
        for i in range(self.history.kept - 1):
            earlier = builder.call(aten.select.int, builder.slot(State.HISTORY, at, 1), 0, i)
            part = builder.call(toca.weighted.default, earlier, builder.slot(Number.MOVE, at, i + 1))
            total = builder.call(aten.add.Tensor, total, part)
        return total

    def keep(self, value: fx.Node, *, moving: bool, age: fx.Node | None = None) -> None:
        if self.history.kept > 1:
            ring = self.builder.slot(State.HISTORY, self.position, 1)
            place = self.builder.slot(Number.KEEP, self.position, 0)
            self.builder.call(toca.store_at_.default, ring, place, self.output)
        super().keep(value, moving=moving)
