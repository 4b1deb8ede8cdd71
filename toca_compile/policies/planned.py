"""Planned: full steps and weights that a search found for one model and sampler (``toca_compile.plan``)."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

from toca_compile.errors import PolicyError
from toca_compile.ir.anchors import MAX_ANCHORS, Anchors, Weights
from toca_compile.ir.fields import Call, Factor, Number, Steps, Whole, told
from toca_compile.ir.plan import Plan
from toca_compile.ir.registry import register
from toca_compile.ir.signature import Signature, relative, same_times
from toca_compile.ir.types import Site
from toca_compile.policies.anchors import Mixed
from toca_compile.policies.base import CachingPolicy
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import Listed

_WORDS = {
    "model": "weights", "sampler": "sampler", "size": "size of a sample", "guidance": "guidance scale",
    "dtype": "dtype", "prediction": "kind of prediction",
}  # fmt: skip


@register
@dataclass(frozen=True)
class Planned(CachingPolicy):
    """What all blocks add to the stream (each site's output, where they cannot be skipped as a whole) is forecast
    between the listed full steps, by the weights of each step. ``plan`` finds it, ``save_policy`` and ``load_policy``
    keep it.

    It holds for what it was made for. ``optimize``'d models and pipelines ask it at a run's first call, and it refuses
    other weights, another size, guidance, dtype or sampler, as far as these are known there; ``anyway`` says that one
    of them does not matter. A run of another number of steps, or through other times, is one that it is adapted to: as
    large a share of the steps is full, and steps and weights lie where the denoising time is the same. That is said
    once, since nobody measured it.

    Args:
        num_steps: model calls of one run.
        full: the full steps, as rising call indices with 0 among them.
        by: the weights.
        kept: full steps whose values they are of.
        made_for: what it was searched with.
        found: PSNR in dB on the calibration seeds, by what was tried; ``"plan"`` is this.
        adapted: the number of steps that it was searched for, if that is another.
        correct: as in ``Anchors``, of blocks that are skipped as a whole.

    Raises:
        PolicyError: the weights, times or moves are of another number of steps.
    """

    num_steps: Steps = 50
    full: tuple[Call, ...] = (0,)
    by: Weights | None = None
    kept: Annotated[int, Whole(1, MAX_ANCHORS)] = 3
    made_for: Signature = field(default_factory=Signature)
    found: Mapping[str, Factor] = field(default_factory=dict)
    adapted: Steps | None = None
    correct: Annotated[float, Number(0, 1)] = field(default=0.0, kw_only=True)

    def check(self) -> None:
        times = self.made_for.times
        if times is not None and len(times) != self.num_steps:
            raise PolicyError(f"made_for.times must be {self.num_steps}, one a step, not {len(times)}")
        if isinstance(self.by, Mixed) and len(self.by.shares) != self.num_steps:
            raise PolicyError(f"by.shares must be {self.num_steps}, one a step, not {len(self.by.shares)}")
        for part in self.choices:
            part.full_steps()

    @property
    def choices(self) -> tuple[Composition, ...]:
        """What it may mean for a graph; the first that the graph can follow is meant."""
        do = Anchors(self.by, self.kept)
        moves = (self.made_for.moves or ()) if self.correct else ()
        blocks = SkipBlocks(do=replace(do, correct=self.correct, moves=moves))
        return tuple(Composition(self.num_steps, Listed(self.full), (Rule(d),)) for d in (blocks, do))

    def full_steps(self, kind: str = "") -> tuple[int, ...]:
        """The full steps as call indices, 0 first."""
        return self.full

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        return self.choices[0].plan(sites)

    def for_run(self, num_steps: int, guided: bool) -> "Planned":
        return self if num_steps == self.num_steps else self._over(num_steps)

    def for_call(self, call: Signature) -> "Planned":
        """The same for a call of which this is known.

        Raises:
            PolicyError: it was made for something else.
        """
        unlike = self.made_for.unlike(call)
        if unlike:
            name = unlike[0]
            raise PolicyError(
                f"this plan was made for another {_WORDS[name]}: {told(getattr(self.made_for, name))}, and the call "
                f"has {told(getattr(call, name))}. Make one for it (toca_compile.plan), or say that it does "
                f"not matter: policy.anyway({name!r})"
            )
        if call.times is None or (self.made_for.times is not None and same_times(self.made_for.times, call.times)):
            return self
        if self.made_for.times is None and len(call.times) == self.num_steps:
            return self
        return self._over(len(call.times), call.times, call.moves)

    def anyway(self, *facts: str) -> "Planned":
        """The same, whatever these facts of a call are: names of ``Signature``'s fields."""
        return replace(self, made_for=self.made_for.without(facts))

    def _over(
        self, num_steps: int, times: Sequence[float] | None = None, moves: tuple[float, ...] | None = None
    ) -> "Planned":
        """Laid out over other steps, by the times of both, or evenly where one is not known."""
        own = self.made_for.times
        if own is None or times is None or num_steps < 2:
            ours, theirs = _even(self.num_steps), _even(num_steps)
        else:
            ours, theirs = relative(own), relative(times)
        count = min(max(round(len(self.full) * num_steps / self.num_steps), 1), num_steps)
        places = [i * (len(self.full) - 1) / max(count - 1, 1) for i in range(count)]
        at = [_between([ours[f] for f in self.full], place) for place in places]
        by = self.by
        if isinstance(by, Mixed):
            rows = [by.row(_position(ours, t)) for t in theirs]
            by = replace(by, shares=tuple(rows))
        made_for = replace(self.made_for, times=tuple(times) if times is not None else None, moves=moves)
        return replace(
            self, num_steps=num_steps, full=_nearest(theirs, at), by=by, made_for=made_for, found={},
            adapted=self.adapted or self.num_steps,
        )  # fmt: skip

    def meaning(self, plan: Plan, computed: int) -> str:
        """What must be said of it; nothing where it runs as it was found."""
        if self.adapted is None:
            return ""
        return (
            f"a plan that was found for {self.adapted} steps is laid out over {len(plan.steps)}, of which {computed} "
            "are computed, by the denoising time; how good it is there nobody measured: toca_compile.plan finds one "
            "for this many"
        )


def _even(count: int) -> tuple[float, ...]:
    return tuple(1 - i / count for i in range(count))


def _between(values: Sequence[float], place: float) -> float:
    """The value at a place between items."""
    i = min(int(place), max(len(values) - 2, 0))
    return values[i] + (place - i) * (values[min(i + 1, len(values) - 1)] - values[i])


def _position(times: Sequence[float], time: float) -> float:
    """Where a time lies among falling or rising ones, as a place between items."""
    sign = -1 if times[-1] < times[0] else 1
    rising = [sign * t for t in times]
    i = min(max(bisect_right(rising, sign * time) - 1, 0), max(len(times) - 2, 0))
    if len(times) < 2:
        return 0.0
    return min(max(i + (sign * time - rising[i]) / (rising[i + 1] - rising[i]), 0.0), len(times) - 1.0)


def _nearest(times: Sequence[float], wanted: Sequence[float]) -> tuple[int, ...]:
    """For each wanted time a step near it, each step once, in order, the first step for the first."""
    steps: list[int] = []
    for i, time in enumerate(wanted):
        nearest = min(range(len(times)), key=lambda s, t=time: abs(times[s] - t))  # type: ignore[misc]
        least = steps[-1] + 1 if steps else 0
        steps.append(0 if i == 0 else min(max(nearest, least), len(times) - (len(wanted) - i)))
    return tuple(steps)
