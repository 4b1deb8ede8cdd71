"""Levels: how much to leave out, by name, for any model and any number of steps."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from toca_compile.ir.fields import OneOf, Steps
from toca_compile.ir.plan import Plan
from toca_compile.ir.registry import register
from toca_compile.ir.signature import FLOW, NOISE, Move, Signature
from toca_compile.ir.types import Site
from toca_compile.policies.anchors import Anchors, Foca, Hermite, Polynomial
from toca_compile.policies.base import CachingPolicy
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import EndAligned

LEVELS = ("quality", "balanced", "fast", "max")

# From so many steps of a run on, one of how many is computed after the warm-up, level by level; with 1 all are. Chosen
# on a trained DiT by the finished sample: the fewer steps there are, the further apart they lie, and the shorter the
# gap that a forecast can bridge.
_INTERVALS = (
    (40, (2, 3, 4, 6)),
    (16, (2, 3, 4, 5)),
    (7, (2, 2, 3, 4)),
    (4, (1, 1, 2, 2)),
    (1, (1, 1, 1, 1)),
)
# The first steps decide the picture; a third brings anchors so near each other that a forecast overshoots, and where it
# bridges six steps the second does.
_WARMUP, _WIDE = 2, 6
# Chosen by the worse of two trained models: FoCa's rule, and Newton's polynomial where full steps are so far apart that
# FoCa's recursion drifts (benchmarks/results/levels.md).
_NEAR, _FAR, _DRIFTS = Anchors(Foca(), 3), Anchors(Polynomial(), 3), 5
# What flow matching predicts goes almost straight, and a polynomial overshoots where one gap is more than a seventh of
# the run: Hermite's damped ones do not. Where noise is predicted they lag behind by 15 dB and more.
_FLOW, _LONG = Anchors(Hermite(), 3), 1 / 7
# Where noise is predicted, and none added, a computed step makes up for what was told before it, which loses 3 dB on
# flow: for a quarter of that, or half where every second step is computed and the rule is Newton's. FoCa's is beyond it
# where gaps are of three steps and a sixteenth of the run at most. In short runs the sampler's moves differ so much
# from step to step that a share of one is more than all of another: there all count alike.
_NOISE_DRIFTS, _NOISE_LONG, _SHARE, _EVEN_BELOW = 4, 1 / 16, 0.25, 16
# Samplers with which that was measured. Where noise is added at each step, or the model asked twice, it loses.
_SMOOTH = {"DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"}
_LAST = 16  # from so many steps on, "quality" computes the last too


@register
@dataclass(frozen=True)
class Level(CachingPolicy):
    """A policy by name that fits the number of steps: the first two steps are computed (the first alone, where one of
    six is), and one of several counted back from the last but one; on the others what all blocks add to the stream is
    forecast from the last three computed steps by FoCa's rule, or Newton's polynomial where one of five or more is
    computed (each site's output, where the blocks cannot be skipped as a whole). With flow matching it is HiCache's
    rule where these lie more than a seventh of the run apart, and FoCa's elsewhere. Where noise is predicted, by DDIM,
    Euler or DPM-Solver++, it is Newton's from one of four steps or a sixteenth of the run on, FoCa's below that, and a
    computed step corrects a quarter, or half where it is Newton's and every second step is computed, from 16 steps on
    by the sampler's moves (``Anchors(correct=, moves=)``), where blocks are skipped as a whole. From 16 steps on
    ``"quality"`` computes the last step too. Of how many steps one is computed:

    =========  =========  ==========  ======  =====
    steps      "quality"  "balanced"  "fast"  "max"
    =========  =========  ==========  ======  =====
    40 on      2          3           4       6
    16 to 39   2          3           4       5
    7 to 15    2          2           3       4
    4 to 6     all        all         2       2
    below 4    all        all         all     all
    =========  =========  ==========  ======  =====

    Args:
        name: of the level.
        num_steps: model calls of one run. In a pipeline its own number of steps takes its place.
        flow: whether the model predicts the velocity of flow matching. A pipeline's scheduler says it.
        noise: whether it predicts noise, and the sampler adds none. The scheduler says that, too.
        moves: as of ``Anchors``, of which the scheduler tells as well.

    Raises:
        PolicyError: there is no such level.
    """

    name: Annotated[str, OneOf(LEVELS)] = field(default="balanced", metadata={"told": True})
    num_steps: Steps = 50
    flow: bool = False
    noise: bool = False
    moves: tuple[Move, ...] = ()

    @property
    def when(self) -> EndAligned:
        """Which steps are computed."""
        intervals = next(row for least, row in _INTERVALS if self.num_steps >= least)
        last = self.name == "quality" and self.num_steps >= _LAST
        interval = intervals[LEVELS.index(self.name)]
        return EndAligned(interval, _WARMUP if interval < _WIDE else 1, last)

    @property
    def choices(self) -> tuple[Composition, ...]:
        """What it may mean for a graph; the first that the graph can follow is meant."""
        interval = self.when.interval
        if self.flow:
            forecast = _FLOW if interval > _LONG * self.num_steps else _NEAR
        elif self.noise:
            forecast = self._corrected(interval)
        else:
            forecast = _NEAR if interval < _DRIFTS else _FAR
        ways = SkipBlocks(do=forecast), replace(forecast, correct=0.0, moves=())
        return tuple(Composition(self.num_steps, self.when, (Rule(do),)) for do in ways)

    def _corrected(self, interval: int) -> Anchors:
        """The forecast where noise is predicted."""
        long = self.num_steps >= _EVEN_BELOW
        near = interval < _NOISE_DRIFTS and interval <= _NOISE_LONG * self.num_steps
        share = 2 * _SHARE if interval == 2 and long and not near else _SHARE
        by = Foca() if near else Polynomial()
        return Anchors(by, 3, correct=share, moves=self.moves if long else ())

    def full_steps(self, kind: str = "") -> tuple[int, ...]:
        """The computed steps as call indices, 0 first."""
        return self.choices[0].full_steps(kind)

    def for_run(self, num_steps: int, guided: bool) -> "Level":
        return replace(self, num_steps=num_steps, moves=self.moves if len(self.moves) == num_steps else ())

    def for_call(self, call: Signature) -> "Level":
        """The same for a call of which this is known."""
        if call.prediction == NOISE and call.sampler in _SMOOTH:
            moves = call.moves or ()
            return replace(self, noise=True, num_steps=len(moves) or self.num_steps, moves=moves)
        return replace(self, flow=True) if call.prediction == FLOW else self

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        return self.choices[0].plan(sites)

    def meaning(self, plan: Plan, computed: int) -> str:
        """What a graph makes of it, as a sentence. ``computed``: how many steps are."""
        if computed == len(plan.steps):
            steps = f"all {computed} steps" if computed > 1 else "the one step"
            return (
                f"level {self.name!r} computes {steps} of a run this short, so nothing is cached: take another level "
                "or policy, or more steps"
            )
        what = "what all blocks add to the stream" if plan.skipped else "the output of each site"
        return (
            f"level {self.name!r} in a run of {len(plan.steps)} steps: {computed} are computed, on the others {what} "
            "is forecast"
        )
