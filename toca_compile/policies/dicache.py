"""DiCache: the first blocks, computed at every step, say when the others are and how their last results are mixed."""

from collections.abc import Sequence
from dataclasses import dataclass

from toca_compile.ir.anchors import Anchors, Weights
from toca_compile.ir.fields import Count, Fraction, Natural, Threshold
from toca_compile.ir.gates import FirstOutput
from toca_compile.ir.registry import register
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import Adaptive


@register
@dataclass(frozen=True)
class Along(Weights):
    """Of the last two values r₋₂ and r₋₁ the mean r₋₂ + γ · (r₋₁ − r₋₂), γ as a gate measures it at the step; the last
    value where none does."""

    steered = True

    def weights(self, full: Sequence[int], step: int) -> list[float]:
        return [0.0] * (len(full) - 1) + [1.0]


@register
@dataclass(frozen=True)
class DiCache(Composed):
    """The first blocks are a probe, which every step computes: while what leaves them changes, from step to step, by
    less than ``threshold`` in all since the last full step, the others are skipped; a step that is not skipped goes on
    behind the probe, and computes nothing twice (arXiv 2508.17356).

    A skipped step adds r₋₂ + γ · (r₋₁ − r₋₂) of what the skipped blocks added at the last two full steps, where γ, from
    1 to 1.5, is |p − p₋₂| / |p₋₁ − p₋₂| for what the probe adds. It costs one read of both numbers a step.

    The published code mixes what all blocks added, the probe's among it; here the probe's part is the step's own.

    Args:
        num_steps: model calls of one run.
        threshold: ``rel_l1_thresh`` of the published code, whose distance is ``delta_y``.
        probe: m, how many first blocks.
        retention: share of first steps that are full (at least one).
        limit: of steps that are not full in a row; None, as published: any number.
        last: as in ``BlockCache``.

    Raises:
        PolicyError: a number is outside its range.
    """

    threshold: Threshold = 0.4
    probe: Count = 1
    retention: Fraction = 0.2
    limit: Count | None = None
    last: Natural = 0

    def parts(self) -> Composition:
        warmup = max(int(self.retention * self.num_steps), 1)
        when = Adaptive(self.threshold, warmup, self.limit, FirstOutput())
        skip = SkipBlocks(self.probe, self.last, do=Anchors(Along(), 2))
        return Composition(self.num_steps, when, (Rule(skip),))
