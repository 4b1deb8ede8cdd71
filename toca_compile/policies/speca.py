"""SpeCa: a forecast that the last block, which is computed, accepts or refuses."""

from dataclasses import dataclass
from typing import Annotated

from toca_compile.ir.fields import Basis, Count, Natural, Number, Order, Threshold
from toca_compile.ir.gates import LastBlocks
from toca_compile.ir.registry import register
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import Adaptive


@register
@dataclass(frozen=True)
class SpeCa(Composed):
    """Forecast, then verify (arXiv 2509.11628). What all blocks but the last add to the stream is forecast, the last is
    computed from that, and what it adds is held against a forecast of its own: where the error mean|forecast −
    computed| / mean|computed| is beyond max(τ₀ · β^(share of the run that is done), ``floor``), the step is refused and
    turns full. It costs the last block, one read of a device value a step, and at a refused step the last block twice.

    As published, what a refused forecast led to is thrown away; the published code uses it, and computes the next step
    in full. It also forecasts each module of each block, where the stack is one value here, and means the ratio of
    errors element by element.

    Args:
        num_steps: model calls of one run.
        threshold: τ₀.
        decay: β; 1 keeps the threshold.
        floor: beneath which the threshold does not fall.
        drafts: forecasts after a full step that are not verified.
        limit: of forecasts in a row.
        order: of the forecasts.
        warmup: how many first steps are full.
        last: blocks that verify.
        basis: as in ``TaylorSeer``.

    Raises:
        PolicyError: a number is outside its range.
    """

    threshold: Threshold = 0.3
    decay: Annotated[float, Number(0, 1, above=True)] = 0.5
    floor: Annotated[float, Number(0, 1e6)] = 0.01
    drafts: Natural = 0
    limit: Count | None = 8
    order: Order = 2
    warmup: Count = 3
    last: Count = 1
    basis: Basis = "taylor"

    def parts(self) -> Composition:
        by = LastBlocks(self.decay, self.floor, self.drafts)
        when = Adaptive(self.threshold, self.warmup, self.limit, by)
        skip = SkipBlocks(0, self.last, order=self.order)
        return Composition(self.num_steps, when, (Rule(skip),), basis=self.basis)
