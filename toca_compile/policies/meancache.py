"""MeanCache: forecasts as mean velocities, told by how the latents moved."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated

from toca_compile.errors import PolicyError
from toca_compile.ir.anchors import MAX_ANCHORS, Anchors, Weights
from toca_compile.ir.fields import Call, Count, Fraction, Natural, Steps, Whole
from toca_compile.ir.registry import register
from toca_compile.ir.signature import Signature
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import Every, Listed

Span = Annotated[int, Whole(1, MAX_ANCHORS)]


@register
@dataclass(frozen=True)
class MeanVelocity(Weights):
    """MeanCache (arXiv 2601.19961) and its published code: of the velocity v, forecast or computed, at the last K steps
    from i₀ on, at which the latents were x₀ and are x₁ now::

        v̂ᵢ = vᵢ₋₁ − J · (σᵢ₊₁ − σᵢ)        J = (v(i₀) − (x₁ − x₀) / (σ₁ − σ₀)) / (σ₁ − σ₀)

    The latents moved by Euler's method, x₁ − x₀ = Σ vⱼ · (σⱼ₊₁ − σⱼ), so that this is linear in the velocities and no
    latents are kept. The recursion begins at the oldest anchor. With K = 1 it reuses.

    Args:
        span: K.
        num_steps: of a run.
        sigmas: σ at each step, falling; behind the last it is 0. None: 1 − step / num_steps.

    Raises:
        PolicyError: the noise is not told for each step, or does not fall.
    """

    span: Span = 2
    num_steps: Steps = 50
    sigmas: tuple[Fraction, ...] = ()

    def check(self) -> None:
        if self.sigmas and len(self.sigmas) != self.num_steps:
            raise PolicyError(f"sigmas must be {self.num_steps}, one a step, not {len(self.sigmas)}")
        if any(b >= a for a, b in pairwise(self.sigmas)):
            raise PolicyError("sigmas must fall from step to step: a mean velocity is one of flow matching")

    def weights(self, full: Sequence[int], step: int) -> list[float]:
        unit = {f: [float(i == j) for j in range(len(full))] for i, f in enumerate(full)}
        track = {full[0]: unit[full[0]]}
        for at in range(full[0] + 1, step + 1):
            if at in unit and at != step:
                track[at] = unit[at]
                continue
            start = max(at - self.span, full[0])
            gap, ahead = self._sigma(at) - self._sigma(start), self._sigma(at + 1) - self._sigma(at)
            moved = [0.0] * len(full)
            for j in range(start, at):
                moved = [m + v * (self._sigma(j + 1) - self._sigma(j)) for m, v in zip(moved, track[j], strict=True)]
            slope = [(v - m / gap) / gap for v, m in zip(track[start], moved, strict=True)]
            track[at] = [v - s * ahead for v, s in zip(track[at - 1], slope, strict=True)]
        return track[step]

    def for_run(self, num_steps: int) -> "MeanVelocity":
        return replace(self, num_steps=num_steps)

    def _sigma(self, step: int) -> float:
        if not self.sigmas:
            return 1 - step / self.num_steps
        return self.sigmas[step] if step < len(self.sigmas) else 0.0


@register
@dataclass(frozen=True)
class MeanCache(Composed):
    """Between full steps the velocity is a mean velocity over the step, from how the latents moved over the last steps
    (``MeanVelocity``). For flow matching with Euler's method; nothing is read from the device.

    The rule is linear in the velocity, and here it is that of what all blocks add to the stream: what the head makes of
    that is computed at every step. The published steps come from a shortest path over a measured graph, and each takes
    a span of its own; here they are counted, or given, and the span is one.

    Args:
        num_steps: model calls of one run.
        interval, warmup: as in ``Every``.
        full: the full steps themselves, in place of those; none: counted.
        span: as in ``MeanVelocity``.
        sigmas: the share of noise at each step. None are needed in a pipeline, or where ``opt.begin(timesteps)`` says
            the times: they are these, in thousandths where they go beyond 1. Where nobody says them, 1 − step / steps.
        kept: full steps whose values the recursion goes through.
        first, last: blocks that every step computes.

    Raises:
        PolicyError: a number is outside its range, or the noise does not fall.
    """

    interval: Count = 4
    warmup: Count = 3
    full: tuple[Call, ...] = ()
    span: Span = 2
    sigmas: tuple[Fraction, ...] = ()
    kept: Annotated[int, Whole(1, MAX_ANCHORS)] = 4
    first: Natural = 0
    last: Natural = 0

    def for_call(self, call: Signature) -> "MeanCache":
        """With the times of a call, where none are given."""
        if self.sigmas or not call.times:
            return self
        unit = 1000.0 if max(call.times) > 1 else 1.0
        sigmas = tuple(min(max(t / unit, 0.0), 1.0) for t in call.times)
        return replace(self, num_steps=len(sigmas), sigmas=sigmas)

    def parts(self) -> Composition:
        by = MeanVelocity(self.span, self.num_steps, self.sigmas)
        skip = SkipBlocks(self.first, self.last, do=Anchors(by, self.kept))
        when = Listed(self.full) if self.full else Every(self.interval, self.warmup)
        return Composition(self.num_steps, when, (Rule(skip),))
