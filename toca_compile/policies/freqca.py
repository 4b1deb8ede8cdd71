"""FreqCa: what all blocks add, in two bands of the token grid. The low one is reused, the high one forecast."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from toca_compile.errors import PolicyError
from toca_compile.ir.actions import Keep
from toca_compile.ir.anchors import MAX_ANCHORS, Anchors, BandRing, Weights
from toca_compile.ir.fields import Count, Fraction, Natural, Number, Whole
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.registry import register
from toca_compile.ir.types import Site
from toca_compile.policies.anchors import Hermite
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import Every


@register
@dataclass(frozen=True)
class Bands(Anchors):
    """A forecast as ``Anchors`` make it of what is high in frequency over the token grid (height and width, in a video
    frames too), and the last full step's value of what is low. Tokens outside the grid, such as text, are forecast.

    Args:
        by, kept: as in ``Anchors``.
        cutoff: up to which share of an axis's highest frequency it is low, on every axis; 0: the mean alone.
    """

    by: Weights | None = field(default_factory=Hermite)
    cutoff: Fraction = 0.25

    word = "forecast in bands"

    def check(self) -> None:
        super().check()
        if self.correct:
            raise PolicyError("what is told in bands is no sum of what is kept, so that nothing of it can be corrected")

    def needs(self, defaults: CacheSpec) -> Keep:
        ring = super().needs(defaults).history
        assert ring is not None
        return Keep(BandRing(self.kept, ring.dtype, self.by, ring.device, self.cutoff))

    def refused(self, site: Site) -> str | None:
        return "is no stream of tokens by itself: bands are those of all blocks, SkipBlocks(do=Bands(…))"

    def __str__(self) -> str:
        return "forecast in two bands"

    def misfit(self, sites: Sequence[Site], blocks: int) -> str | None:
        return "bands are those of all blocks: Rule(SkipBlocks(do=Bands(…)))"


@register
@dataclass(frozen=True)
class FreqCa(Composed):
    """The cumulative residual feature, which is what all blocks add to the stream, is split by frequency over the token
    grid: the low band, which hardly moves in direction, is reused, and the high band is forecast by Hermite's
    polynomials of second order (arXiv 2510.08669). One value a model is kept, not one a layer.

    The split is a Fourier transform over the picture's axes, as the graph or ``optimize(grid=…)`` tells them. Where the
    bands meet (``cutoff``) is our choice.

    Args:
        num_steps: model calls of one run.
        interval, warmup: as in ``Every``.
        cutoff: as in ``Bands``.
        scale: of Hermite's polynomials, as in ``Hermite``.
        kept: full steps that the forecast goes through, its order and one more.
        first, last: blocks that every step computes.

    Raises:
        PolicyError: a number is outside its range; or, in a graph, the picture's height and width are not known.
    """

    interval: Count = 5
    warmup: Count = 2
    cutoff: Fraction = 0.25
    scale: Annotated[float, Number(0, 1, above=True)] = 0.5
    kept: Annotated[int, Whole(1, MAX_ANCHORS)] = 3
    first: Natural = 0
    last: Natural = 0

    def parts(self) -> Composition:
        skip = SkipBlocks(self.first, self.last, do=Bands(Hermite(self.scale), self.kept, self.cutoff))
        when = Every(self.interval, self.warmup)
        return Composition(self.num_steps, when, (Rule(skip),))
