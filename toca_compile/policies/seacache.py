"""SeaCache: TeaCache's rule on what of the first block's input is picture and not noise."""

from dataclasses import dataclass, replace
from typing import Annotated

from toca_compile.ir.fields import Count, Fraction, Natural, Number, Order, Threshold
from toca_compile.ir.gates import FilteredInput
from toca_compile.ir.registry import register
from toca_compile.ir.signature import Signature
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import Adaptive


@register
@dataclass(frozen=True)
class SeaCache(Composed):
    """What all blocks add to the residual stream is reused (or forecast, ``order``) while the relative change of the
    first block's modulated input, filtered over the token grid for the noise that is in it, adds up to less than
    ``threshold`` since the last full step (arXiv 2602.18993). One number serves all models of flow matching; nothing is
    fitted. It costs one read of a device value a step.

    Args:
        num_steps: model calls of one run.
        threshold: of the sum.
        power: with which a picture's power falls with the frequency, 2 for pictures, 3 for video.
        sigmas: the share of noise at each step. None are needed in a pipeline, or where ``opt.begin(timesteps)`` says
            the times: they are these, in thousandths where they go beyond 1. Where nobody says them, 1 − step / steps.
        warmup: how many first steps are full; the last is, too.
        limit: of steps that are not full in a row; None: any number.
        first, last, order: as in ``TeaCache``.

    Raises:
        PolicyError: a number is outside its range.
    """

    threshold: Threshold = 0.3
    power: Annotated[float, Number(0, 16, above=True)] = 2.0
    sigmas: tuple[Fraction, ...] = ()
    warmup: Count = 1
    limit: Count | None = None
    first: Natural = 0
    last: Natural = 0
    order: Order = 0

    def for_call(self, call: Signature) -> "SeaCache":
        """With the times of a call, where none are given."""
        if self.sigmas or not call.times:
            return self
        unit = 1000.0 if max(call.times) > 1 else 1.0
        return replace(self, sigmas=tuple(min(max(t / unit, 0.0), 1.0) for t in call.times))

    def parts(self) -> Composition:
        by = FilteredInput(power=self.power, sigmas=self.sigmas)
        when = Adaptive(self.threshold, self.warmup, self.limit, by, ends_full=True)
        skip = SkipBlocks(self.first, self.last, order=self.order)
        return Composition(self.num_steps, when, (Rule(skip),))
