"""EasyCache: how much the stream changes says how much the blocks' output will."""

from dataclasses import dataclass

from toca_compile.ir.fields import Count, Natural, Order, Threshold
from toca_compile.ir.gates import Rate
from toca_compile.ir.registry import register
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import Adaptive


@register
@dataclass(frozen=True)
class EasyCache(Composed):
    """What all blocks add to the residual stream is reused (or forecast, ``order``) while the change that is expected
    of what leaves them adds up to less than ``threshold`` since the last full step (arXiv 2507.02860): k · |Δx| / |v|
    a step, with the transformation rate k = |Δv| / |Δx| between the last two full steps. Nothing is fitted, and it
    costs one read of a device value a step.

    The published code measures the latents and the model's output, and adds to the latents what was added to them
    before; here x is the stream of the picture's tokens as it enters the blocks and v as it leaves them, of the whole
    batch.

    Args:
        num_steps: model calls of one run.
        threshold: τ of the sum.
        warmup: how many first steps are full, of which a rate needs two; the last is, too.
        limit: of steps that are not full in a row; None, as published: any number.
        first, last: blocks that every step computes.
        order: as in ``BlockCache``.

    Raises:
        PolicyError: a number is outside its range.
    """

    threshold: Threshold = 0.05
    warmup: Count = 5
    limit: Count | None = None
    first: Natural = 0
    last: Natural = 0
    order: Order = 0

    def parts(self) -> Composition:
        when = Adaptive(self.threshold, self.warmup, self.limit, Rate(), ends_full=True)
        skip = SkipBlocks(self.first, self.last, order=self.order)
        return Composition(self.num_steps, when, (Rule(skip),))
