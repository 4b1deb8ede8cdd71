"""MagCache: a curve of magnitudes, measured once, says before a run which of its steps compute."""

from dataclasses import dataclass
from typing import Annotated

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import Fraction, Natural, Number, Order
from toca_compile.ir.registry import register
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import When, since

Ratio = Annotated[float, Number(0, 1e6)]


@register
@dataclass(frozen=True)
class Magnitudes(When):
    """MagCache's steps (arXiv 2506.09045, algorithm 1). With γₜ the magnitude of what the blocks add at step t as a
    share of that at the step before, the blocks are skipped while the sum of |1 − Πγ| since the last full step, the
    product over the steps since then, stays at or below ``threshold``.

    Args:
        ratios: γ, the first of them 1. In a run of another number of steps each takes that of the nearest place.
        threshold: of the sum.
        limit: K, steps skipped in a row at most.
        retention: share of first steps that are full (at least one).
    """

    ratios: tuple[Ratio, ...] = (1.0,)
    threshold: Annotated[float, Number(0, 1e6)] = 0.24
    limit: Natural = 5
    retention: Fraction = 0.1

    def check(self) -> None:
        if not self.ratios:
            raise PolicyError("ratios must be one a step of the measured run (toca_compile.magnitudes), not none")

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the last full step."""
        last = len(self.ratios) - 1
        first = max(int(self.retention * num_steps + 0.5), 1)
        full, product, error, skipped = list(range(min(first, num_steps))), 1.0, 0.0, 0
        for step in range(first, num_steps):
            product *= self.ratios[round(step * (last / (num_steps - 1)))]
            error += abs(1 - product)
            skipped += 1
            if error > self.threshold or skipped > self.limit:
                full.append(step)
                product, error, skipped = 1.0, 0.0, 0
        return since(full, num_steps)


@register
@dataclass(frozen=True)
class MagCache(Composed):
    """What all blocks add to the residual stream is reused (or forecast, ``order``) where ``Magnitudes`` says so.

    The curve is the model's and its sampler's: ``toca_compile.magnitudes`` measures it. Everything is decided before
    the run, so nothing is read from the device.

    Args:
        num_steps: model calls of one run.
        ratios, threshold, limit, retention: as in ``Magnitudes``.
        first: blocks that every step computes.
        order: of the forecast; 0, as published, reuses.

    Raises:
        PolicyError: there are no ratios, or a number is outside its range.
    """

    ratios: tuple[Ratio, ...] = (1.0,)
    threshold: Annotated[float, Number(0, 1e6)] = 0.24
    limit: Natural = 5
    retention: Fraction = 0.1
    first: Natural = 0
    order: Order = 0

    def parts(self) -> Composition:
        when = Magnitudes(self.ratios, self.threshold, self.limit, self.retention)
        return Composition(self.num_steps, when, (Rule(SkipBlocks(self.first, order=self.order)),))
