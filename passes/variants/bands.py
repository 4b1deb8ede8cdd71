"""The emission of a forecast in two bands of the token grid: y = high(Σ wᵢ·hᵢ) + low(h), h the last value."""

import torch
from torch import fx

from toca_compile.ir.anchors import BandRing
from toca_compile.passes.variants.ring import Values
from toca_compile.passes.variants.series import HISTORIES

toca = torch.ops.toca


@HISTORIES.of(BandRing)
class Banded(Values):
    """The last values as they were; ``tokens`` says where the grid lies."""

    history: BandRing

    def forecast(self, age: fx.Node | None = None) -> fx.Node:
        value = super().forecast(age)
        if self.tokens is None:
            return value
        dim, span, *grid, offset = self.tokens
        where = (dim, span, grid, offset, self.history.cutoff)
        return self.builder.call(toca.with_low_band.default, value, self.output, *where)
