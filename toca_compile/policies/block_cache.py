"""BlockCache: a range of blocks reused as a whole, as FirstBlockCache (ParaAttention) and DBCache (cache-dit) do."""

from dataclasses import dataclass

from toca_compile.ir.fields import Basis, Count, Natural, Order, Threshold
from toca_compile.ir.registry import register
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import Adaptive, Bend, Every, Spread, When


@register
@dataclass(frozen=True)
class BlockCache(Composed):
    """The first and last blocks are computed at every step; what the others add to the residual stream is reused or
    forecast between full steps.

    With a ``threshold`` a test at run time decides which steps are full: the change that the first blocks make to the
    stream, held against that at the last full step, mean |difference| / mean |change| over the whole batch. It costs
    one read of a device value a step. Without, every ``interval``-th step is full, and nothing is read.

    Args:
        num_steps: model calls of one run.
        first, last: Fn and Bn, blocks that every step computes.
        threshold: of the relative change, or None.
        warmup: how many first steps are full.
        limit: of steps that are not full in a row, with a threshold; None: any number.
        interval, bend: without a threshold, as in ``TaylorSeer``; a ``bend`` spreads the full steps.
        order: of the forecast of what the blocks add; 0 reuses it.
        basis: as in ``TaylorSeer``.

    Raises:
        PolicyError: a number outside its range, or a threshold with no first block to measure it on.
    """

    first: Natural = 1
    last: Natural = 0
    threshold: Threshold | None = None
    warmup: Count = 1
    limit: Count | None = None
    interval: Count = 4
    bend: Bend | None = None
    order: Order = 0
    basis: Basis = "taylor"

    @property
    def when(self) -> When:
        """Which steps are full."""
        if self.threshold is not None:
            return Adaptive(self.threshold, self.warmup, self.limit)
        if self.bend is not None:
            return Spread(self.interval, self.bend, self.warmup)
        return Every(self.interval, self.warmup)

    def parts(self) -> Composition:
        skip = SkipBlocks(self.first, self.last, order=self.order)
        return Composition(
            self.num_steps, self.when, (Rule(skip),), basis=self.basis
        )  # fmt: skip
