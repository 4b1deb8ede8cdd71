"""TeaCache: what the first block is given, summed from step to step, says when a step computes."""

from dataclasses import dataclass

from toca_compile.ir.fields import Count, Factor, Natural, Order, Threshold
from toca_compile.ir.gates import FirstInput
from toca_compile.ir.registry import register
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import Adaptive


@register
@dataclass(frozen=True)
class TeaCache(Composed):
    """What all blocks add to the residual stream is reused (or forecast, ``order``) while the rescaled relative change
    of the first block's modulated input, from step to step, adds up to less than ``threshold`` since the last full step
    (arXiv 2411.19108). The first and the last step are full. It costs one read of a device value a step.

    Args:
        num_steps: model calls of one run.
        threshold: ``rel_l1_thresh`` of the published code.
        rescale: its ``coefficients``, from the highest power to the constant. They are fitted for one model, for FLUX
            (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861); the default changes nothing.
        warmup: how many first steps are full.
        limit: of steps that are not full in a row; None, as published: any number.
        first, last: blocks that every step computes; the input is that of the first of the others.
        order: as in ``BlockCache``.

    Raises:
        PolicyError: a number is outside its range.
    """

    threshold: Threshold = 0.2
    rescale: tuple[Factor, ...] = (1.0, 0.0)
    warmup: Count = 1
    limit: Count | None = None
    first: Natural = 0
    last: Natural = 0
    order: Order = 0

    def parts(self) -> Composition:
        when = Adaptive(self.threshold, self.warmup, self.limit, FirstInput(self.rescale), ends_full=True)
        skip = SkipBlocks(self.first, self.last, order=self.order)
        return Composition(self.num_steps, when, (Rule(skip),))
