"""Plan: full steps and weights for one model, sampler and budget, searched in closed loop by the finished sample.

What a schedule does to one step says little of what it does to the picture: errors that are alike from step to step add
up. So each candidate is sampled with, on calibration seeds, and one recorded run of the uncached model only proposes
what to try. The search starts from even spacing and from the schedules of two dynamic programmes over one-step errors,
moves and swaps full steps, shifts weights from rule to rule and corrects more or less, and cools down (as BudCache does
with its masks, arXiv 2606.13496). Needs the ``demo`` extra for the progress shown.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from toca_compile.diffusers import is_pipeline, transformers_of
from toca_compile.errors import PolicyError, TocaError
from toca_compile.ir.anchors import Anchors, Weights
from toca_compile.ir.plan import Plan
from toca_compile.ir.signature import Signature, clock_of
from toca_compile.ir.types import Site
from toca_compile.policies.anchors import Foca, Hermite, Mixed, Polynomial, Taylor
from toca_compile.policies.base import CachingPolicy
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.planned import Planned
from toca_compile.policies.schedules import end_aligned_steps
from toca_compile.policies.when import Listed
from toca_compile.quality.evaluation import Sampler
from toca_compile.quality.settings import PlanningSettings, overridden
from toca_compile.quality.trials import Trials

DEFAULTS = PlanningSettings()
CORRECTED = (0.0, 0.25, 0.5, 0.75)
"""Shares of what was wrong that a computed step may make up for."""
RULES: tuple[Weights, ...] = (Polynomial(1), Polynomial(2), Polynomial(3), Taylor(), Hermite(), Foca())
_TRIALS = 200
_HOT, _COLD = 0.5, 0.02  # dB by which a candidate may be worse and still be gone on from, first and last
_CORRECTED = 4  # candidates, the best first
_DRAWN = 12  # candidates that the recorded run compares before one is sampled with

Full = tuple[int, ...]
Shares = tuple[tuple[float, ...], ...]


def plan(
    model: Any,
    sampler: Sampler,
    *,
    budget: int,
    out: Path | None = None,
    settings: PlanningSettings = DEFAULTS,
    **overrides: Any,
) -> Planned:
    """The best full steps and weights for exactly so many full steps that the time allows to find.

    Args:
        model: the uncached model, in eval mode, or a diffusers pipeline with one transformer, which is given back as it
            was.
        sampler: samples with it; with a pipeline it is given the pipeline and calls it.
        budget: how many steps of a run compute everything.
        out: folder for ``trials.jsonl``, which a later call goes on from; None: nothing is kept.
        settings: steps, seeds, how many samples, and when to stop.
        **overrides: single settings by name, instead of those in ``settings``: ``seconds=60, samples=4``.

    Returns:
        A policy that ``save_policy`` can keep. Its ``found`` has what it was held against, on the same seeds: the best
        rule at even spacing, the schedules of DPCache and CEM with the best rule, and the best of these corrected.

    Raises:
        TocaError: the budget leaves nothing to choose, nothing could be sampled in the time, or a setting is unknown or
            holds what it may not.
    """
    settings = overridden(settings, overrides)
    if not 1 < budget < settings.steps:
        raise TocaError(f"budget must lie between 1 and the number of steps, {settings.steps}, not be {budget}")
    search = _Search(model, sampler, budget, out, settings)
    try:
        return search.run()
    finally:
        search.on.close()


@dataclass(frozen=True)
class Candidate:
    """Full steps, each step's shares of the rules, and the share of what was wrong that a full step corrects."""

    full: Full
    shares: Shares
    correct: float = 0.0


class _Recorded:
    """One run of the uncached model: what it made at each step, and which times it was told."""

    def __init__(self, model: Any, sampler: Sampler, settings: PlanningSettings) -> None:
        parts = list(transformers_of(model).values()) if is_pipeline(model) else [model]
        if len(parts) != 1 or not isinstance(parts[0], nn.Module):
            raise TocaError(f"plan takes a model or a pipeline with one transformer, not {type(model).__name__}")
        calls: list[tuple[dict[Any, Any], Tensor]] = []

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            made = result if isinstance(result, Tensor) else result[0]
            told = {
                k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in (*enumerate(args), *kwargs.items())
            }
            calls.append((told, made.detach().float().flatten().clone()))

        hook = parts[0].register_forward_hook(look, with_kwargs=True)
        try:
            sampler(model, settings.steps, settings.seeds[0], min(settings.samples, 4))
        finally:
            hook.remove()
        passes, odd = divmod(len(calls), settings.steps)
        if odd or not passes:
            raise TocaError(
                f"a sampling in {settings.steps} steps called the model {len(calls)} times: steps must be how many "
                "calls there are, or the passes of guidance times it"
            )
        steps = range(settings.steps)
        self.values = torch.stack([torch.cat([calls[s * passes + p][1] for p in range(passes)]) for s in steps])
        self.times = clock_of([calls[s * passes][0] for s in steps])

    def error(self, full: Full, by: Mixed, kept: int) -> float:
        """Mean |error| of the forecasts of a run in which nothing but the forecast were wrong."""
        total = 0.0
        for step, done in _between(full, len(self.values)):
            anchors = full[:done][-kept:]
            weights = torch.tensor(by.weights(anchors, step))
            total += float((weights @ self.values[list(anchors)] - self.values[step]).abs().mean())
        return total

    def dpcache(self, budget: int) -> Full:
        """DPCache (arXiv 2602.22654): the full steps of least summed error of a line through the last two of them, by
        exact dynamic programming over (the one before, the last one); the first three steps are full."""
        values, steps = self.values, len(self.values)
        cost = torch.zeros(steps, steps, steps + 1)  # before, last, next (or the end): the error between these two
        for j in range(steps - 1):
            ahead = torch.arange(1, steps - j)
            for i in range(j):
                lines = values[j] + ahead[:, None] * ((values[j] - values[i]) / (j - i))
                error = (lines - values[j + 1 :]).abs().mean(1)
                cost[i, j, j + 2 :] = error.cumsum(0)
        fixed = min(3, budget)
        best = {(fixed - 2, fixed - 1): (0.0, tuple(range(fixed)))} if fixed > 1 else {}
        for _ in range(budget - fixed):
            longer: dict[tuple[int, int], tuple[float, Full]] = {}
            for (i, j), (so_far, full) in best.items():
                for k in range(j + 1, steps):
                    total = so_far + float(cost[i, j, k])
                    if total < longer.get((j, k), (math.inf, ()))[0]:
                        longer[j, k] = (total, (*full, k))
            best = longer
        return min((total + float(cost[i, j, steps]), full) for (i, j), (total, full) in best.items())[1]

    def cem(self, budget: int, slack: int = 1) -> Full:
        """CEM (arXiv 2512.23258): gaps near the even one, of least summed error, by dynamic programming from the first
        step to the last. The error of a gap that ends at a step is 1 − cos between what the model made there and at the
        gap's start, summed over the steps so far, times the square of the calls that it leaves out."""
        steps, features = len(self.values), nn.functional.normalize(self.values, dim=1)
        mean = round(steps / budget)
        best: dict[int, tuple[float, Full]] = {0: (0.0, (0,))}
        for least, most in ((max(1, mean - slack), min(10, mean + slack)), (1, steps)):
            gaps = range(least, most + 1)
            error = {g: [0.0] * steps for g in gaps}
            for g in gaps:
                for t in range(1, steps):
                    own = float(1 - features[t] @ features[t - g + 1]) if t >= g - 1 else 0.0
                    error[g][t] = error[g][t - 1] + own
            best = {0: (0.0, (0,))}
            for _ in range(budget - 1):
                longer: dict[int, tuple[float, Full]] = {}
                for at, (so_far, full) in best.items():
                    for g in gaps:
                        total = so_far + error[g][at + g] * (g - 1) ** 2 if at + g < steps else math.inf
                        if total < longer.get(at + g, (math.inf, ()))[0]:
                            longer[at + g] = (total, (*full, at + g))
                best = longer
            if steps - 1 in best:
                break
        return best[steps - 1][1]


@dataclass(frozen=True)
class _Witness(CachingPolicy):
    """A policy that keeps what it is told of a call."""

    of: Composition
    seen: list[Signature] = field(default_factory=list, compare=False)
    made_for: ClassVar[Signature] = Signature()  # it asks for the weights, too

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        return self.of.plan(sites)

    def for_call(self, call: Signature) -> "_Witness":
        self.seen.append(call)
        return self

    def for_run(self, num_steps: int, guided: bool) -> "_Witness":
        if num_steps != self.of.num_steps:
            raise PolicyError(f"the sampler's run has {num_steps} model calls: give steps={num_steps}")
        return self


class _Search:
    def __init__(
        self,
        model: Any,
        sampler: Sampler,
        budget: int,
        out: Path | None,
        settings: PlanningSettings,
    ) -> None:
        recorded = _Recorded(model, sampler, settings)
        self.budget, self.settings, self.recorded = budget, settings, recorded
        self.steps, self.kept = settings.steps, settings.kept
        self.random = Random(settings.seed)
        self.most = _TRIALS if settings.trials is None else settings.trials
        self.skipping = True
        try:
            self.on = self._trials(model, sampler, out)
        except PolicyError:  # the blocks cannot be skipped as a whole
            self.skipping = False
            self.on = self._trials(model, sampler, out)
        self.corrected = CORRECTED if self.skipping and self.kept > 1 else CORRECTED[:1]
        self.used = 0  # samplings asked for, known ones too
        self.asked: set[Candidate] = set()

    def _trials(self, model: Any, sampler: Sampler, out: Path | None) -> Trials:
        self.witness = _Witness(self._composition(Candidate(self._even(), self._alone(5))))
        trials = Trials(model, sampler, self.settings, out, self.witness, timed=False)
        trials.left = None  # those that are known count too, which is done here
        return trials

    def run(self) -> Planned:
        """Even spacing with each rule, the two programmes, then candidates near the best, ever more strictly."""
        found: dict[str, float] = {}
        tried: list[tuple[float, Candidate]] = []

        def sampled(name: str, candidate: Candidate) -> None:
            new = self._quality(candidate)
            if new is not None:
                tried.append((new, candidate))
                if name:
                    found[name] = max(new, found.get(name, -math.inf))

        def best_first() -> list[tuple[float, Candidate]]:
            return sorted(tried, key=lambda one: -one[0])

        for i in range(len(RULES)):
            for full in (self._even(), *self._spread()):
                sampled("even" if full == self._even() else "", Candidate(full, self._alone(i)))
        if not tried:
            raise TocaError("nothing was sampled: give more seconds or trials")
        shares = best_first()[0][1].shares
        for name, full in (("DPCache", self.recorded.dpcache(self.budget)), ("CEM", self.recorded.cem(self.budget))):
            sampled(name, Candidate(full, shares))
        # Which rule and spacing a correction does most for, those without it do not tell.
        for _, candidate in best_first()[:_CORRECTED]:
            for share in self.corrected[1:]:
                sampled("corrected", replace(candidate, correct=share))
        quality, start = best_first()[0]
        found["start"] = quality
        best, top, now, at = start, quality, start, quality
        while not self._over():
            candidate = self._drawn(now)
            new = self._quality(candidate)
            if new is None:
                break
            heat = _HOT * (_COLD / _HOT) ** (self.used / max(self.most, 1))
            if new > at or self.random.random() < math.exp((new - at) / heat):
                now, at = candidate, new
            if new > top:
                best, top = candidate, new
            elif at < top - 2 * heat:
                now, at = best, top  # back from where it led nowhere
        found["plan"] = top
        self.on.say(", ".join(f"{name} {value:.2f} dB" for name, value in found.items()))
        call = self.witness.seen[0] if self.witness.seen else Signature()
        times = call.times or self.recorded.times
        return Planned(
            self.steps, best.full, self._by(best.shares), self.kept, replace(call, times=times), found,
            correct=best.correct,
        )  # fmt: skip

    # -- candidates ---------------------------------------------------------------------------------------------------

    def _even(self) -> Full:
        return tuple(round(i * self.steps / self.budget) for i in range(self.budget))

    def _spread(self) -> Iterator[Full]:
        """Up to the last step but one and to the last, and every so many back from the last but one."""
        for last in (self.steps - 2, self.steps - 1):
            full = {round(last * i / max(self.budget - 1, 1)) for i in range(self.budget)}
            if len(full) == self.budget and last > 0:
                yield tuple(sorted(full))
        for interval in range(1, self.steps):
            steps = end_aligned_steps(self.steps, interval, 2)
            if len(steps) <= self.budget:
                # What is left of the budget goes where a gap is, from the start on.
                more = [s for s in range(self.steps) if s not in steps]
                yield tuple(sorted({*steps, *more[: self.budget - len(steps)]}))
                return

    def _alone(self, rule: int) -> Shares:
        return (tuple(float(i == rule) for i in range(len(RULES))),) * self.steps

    def _drawn(self, now: Candidate) -> Candidate:
        """Of some changes of a candidate that were not tried, the one that the recorded run likes best, or, as often,
        any: what it likes is not what the picture needs."""
        drawn: list[Candidate] = []
        for _ in range(_DRAWN * 20):
            new = self._changed(now)
            if new not in self.asked and new not in drawn:
                drawn.append(new)
            if len(drawn) == _DRAWN:
                break
        if not drawn:
            return self._changed(now)
        if self.random.random() < 0.5:
            return drawn[0]
        return min(drawn, key=lambda c: self.recorded.error(c.full, self._by(c.shares), self.kept))

    def _changed(self, now: Candidate) -> Candidate:
        draw = self.random
        full, shares = list(now.full), list(now.shares)
        other = [share for share in self.corrected if share != now.correct]
        if other and draw.random() < 0.1:
            return replace(now, correct=draw.choice(other))
        what = draw.random()
        if what < 0.35:  # a full step a little earlier or later
            i = draw.randrange(1, len(full))
            full[i] += draw.choice((-2, -1, 1, 2))
        elif what < 0.55:  # one given up for another elsewhere
            full[draw.randrange(1, len(full))] = draw.randrange(1, self.steps)
        else:  # weights of a gap, or of the whole run, nearer to one rule's or further from it
            rule, part = draw.randrange(len(RULES)), draw.choice((-0.25, 0.25, 0.5, 1.0))
            i = draw.randrange(len(full))
            gap = range(full[i] + 1, full[i + 1] if i + 1 < len(full) else self.steps)
            for step in gap if draw.random() < 0.8 else range(self.steps):
                old = shares[step]
                shares[step] = tuple((1 - part) * s + part * (r == rule) for r, s in enumerate(old))
        kept = tuple(sorted(set(full)))
        valid = len(kept) == self.budget and kept[0] == 0 and kept[-1] < self.steps
        return Candidate(kept if valid else now.full, tuple(shares), now.correct)

    # -- sampling with them -------------------------------------------------------------------------------------------

    def _quality(self, candidate: Candidate) -> float | None:
        """PSNR of a candidate; None where the search is over."""
        if self._over():
            return None
        self.used += candidate not in self.asked
        self.asked.add(candidate)
        trial = self.on.measure(self._composition(candidate))
        return None if trial is None else trial.psnr

    def _over(self) -> bool:
        return self.used >= self.most or self.on.over()

    def _by(self, shares: Shares) -> Mixed:
        return Mixed(RULES, shares)

    def _composition(self, candidate: Candidate) -> Composition:
        do = Anchors(self._by(candidate.shares), self.kept, correct=candidate.correct)
        rule = Rule(SkipBlocks(do=do) if self.skipping else do)
        return Composition(self.steps, Listed(candidate.full), (rule,))


def _between(full: Sequence[int], steps: int) -> Iterator[tuple[int, int]]:
    """The steps that are not full, and how many full ones come before each."""
    for done, (this, following) in enumerate(pairwise((*full, steps)), 1):
        for step in range(this + 1, following):
            yield step, done


__all__ = ["plan"]
