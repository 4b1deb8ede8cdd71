"""Tune: search a policy for a target on calibration seeds.

The search starts from a grid of schedules and forecasts, of single sites and of the whole stack of blocks, moves the
full steps of the best one by one, and lets a sensitivity analysis say which kinds of sites, at which depths, are worth
computing. Every trial is on disk, so a search that was cut off goes on where it stopped. Needs the ``demo`` extra for
the progress shown.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from toca_compile.api import explain
from toca_compile.errors import PolicyError, TocaError
from toca_compile.ir.anchors import Anchors
from toca_compile.ir.plan import Policy
from toca_compile.policies.anchors import Foca, Hermite, Polynomial
from toca_compile.policies.composition import Composition, Compute, Forecast, Rule, SkipBlocks
from toca_compile.policies.when import Every, Listed, When
from toca_compile.quality.evaluation import Sampler
from toca_compile.quality.settings import TuningSettings, overridden
from toca_compile.quality.trials import Trial, Trials, told_of

DEFAULTS = TuningSettings()
_DEPTHS = ((0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))
_SLACK = 0.005  # by how much a speed-up may miss its target


@dataclass(frozen=True)
class Target:
    """What a policy has to reach: at least so large a FLOP or latency speed-up, at the best PSNR; or at least so high a
    PSNR in dB to the uncached samples, at the largest FLOP speed-up. Give one."""

    flops: float | None = None
    latency: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        given = [x for x in (self.flops, self.latency, self.psnr) if x is not None]
        if len(given) != 1 or not given[0] > 0:
            raise TocaError("a target is one positive number: Target(flops=…), Target(latency=…) or Target(psnr=…)")


def tune(
    model: nn.Module,
    sampler: Sampler,
    *,
    target: Target,
    out: Path | None = None,
    settings: TuningSettings = DEFAULTS,
    **overrides: Any,
) -> Policy:
    """The best policy for a target that the time allows to find.

    Args:
        model: the uncached model, in eval mode.
        sampler: samples with it.
        target: what to reach.
        out: folder for ``trials.jsonl``, which a later call goes on from; None: nothing is kept.
        settings: steps, seeds, how many samples, and when to stop.
        **overrides: single settings by name, instead of those in ``settings``: ``seconds=60, samples=4``.

    Returns:
        A policy that ``save_policy`` can keep.

    Raises:
        TocaError: nothing that was tried reaches the target, a setting is unknown or holds what it may not, or there
            are to be workers and Ray is not installed.
    """
    search = _Search(model, sampler, target, out, overridden(settings, overrides))
    try:
        return search.run()
    finally:
        search.on.close()


class _Search:
    def __init__(
        self, model: nn.Module, sampler: Sampler, target: Target, out: Path | None, settings: TuningSettings
    ) -> None:
        self.target, self.steps = target, settings.steps
        start = Composition(self.steps, Every(2), (Rule(Forecast(1)),))
        self.on = Trials(model, sampler, settings, out, start, timed=target.latency is not None)

    def run(self) -> Policy:
        """Schedules, forecasts, groups of sites, then single full steps, as long as time lasts."""
        for stage in (self._grid, self._series, self._groups):
            for _ in self.on.measured(self._in_reach(stage())):
                pass
        improved = True
        while improved and not self.on.over():
            best, improved = self._best(), False
            for trial in self.on.measured(self._in_reach(self._moves(best))):
                if trial is not None and self._rank(trial) > self._rank(best):
                    improved = True  # go on from there
                    break
        best = self._best()
        self.on.say(f"best: PSNR {best.psnr:.2f} dB at {best.flop_speedup:.2f}× FLOPs, of {len(self.on.known)} trials")
        return best.policy

    def sensitivity(self, base: Composition) -> dict[tuple[str, tuple[float, float]], float]:
        """PSNR of a run in which one group of sites alone is cached, by kind and depth: low is sensitive."""
        kinds = dict.fromkeys(s.kind for s in explain(self.on.opt).sites)
        found = {}
        for kind in kinds:
            for depths in _DEPTHS:
                alone = (Rule(Forecast(_order(base)), (kind,), depths), Rule(Compute()))
                trial = self.on.measure(replace(base, rules=alone))
                if trial is not None:
                    found[kind, depths] = trial.psnr
        for (kind, depths), value in sorted(found.items(), key=lambda item: item[1]):
            self.on.say(f"sensitivity: {kind} at depths {depths[0]:.2f} to {depths[1]:.2f}: {value:.2f} dB")
        return found

    # -- what to try --------------------------------------------------------------------------------------------------

    def _grid(self) -> Iterator[Composition]:
        """Schedules, of single sites and of the whole stack: as many full steps as the target allows, and one less; for
        a latency, some fewer, since the clock may lag behind the FLOPs; for a PSNR, ever fewer."""
        for do in (SkipBlocks(order=2), Forecast(2)):
            counts = 0
            for count in self._counts():
                rows = [Composition(self.steps, when, (Rule(do),), basis="newton") for when in self._schedules(count)]
                if self.target.psnr is None and not self._reaches(rows[0]):
                    continue
                yield from rows
                counts += 1
                if self.target.psnr is None and counts == (2 if self.target.flops else 8):
                    break

    def _counts(self) -> list[int]:
        if self.target.psnr is None:
            return list(range(self.steps - 1, 1, -1))
        return sorted({max(self.steps // n, 2) for n in (2, 3, 4, 5, 6, 8)}, reverse=True)

    def _schedules(self, count: int) -> list[When]:
        """``count`` full steps: evenly, with what is left at the end; or up to the last but one, evenly or denser
        towards the end."""
        even = tuple(round(i * self.steps / count) for i in range(count))
        found = [even]
        for bend in (1.0, 0.9, 0.8):
            found.append(tuple(sorted({round((self.steps - 2) * (i / (count - 1)) ** bend) for i in range(count)})))
        return [Listed(full) for full in dict.fromkeys(found)]

    def _series(self) -> Iterator[Composition]:
        """The best schedule of single sites and that of blocks, with other forecasts and with blocks spared; of blocks
        also corrected."""
        for by_blocks in (True, False):
            own = [t for t in self.on.known.values() if _forecasts(t.policy, by_blocks=by_blocks)]
            start = max(own, key=self._rank).policy if own else None
            if not isinstance(start, Composition):
                continue
            for basis, order in (("newton", 3), ("newton", 4), ("newton", 1), ("taylor", 2)):
                yield replace(start, rules=(Rule(replace(_do(start), order=order)),), basis=basis)
            if by_blocks:
                for first, last in ((1, 0), (0, 1)):
                    yield replace(start, rules=(Rule(replace(_do(start), first=first, last=last)),))
                for by, share in product((Polynomial(), Foca(), Hermite()), (0.0, 0.25, 0.5)):
                    do = SkipBlocks(do=Anchors(by, 3, correct=share))
                    yield Composition(self.steps, start.when, (Rule(do),))

    def _groups(self) -> Iterator[Composition]:
        """The best schedule of single sites with the most sensitive groups computed at every step, or the least
        sensitive ones at a lower order."""
        sites = [t for t in self.on.known.values() if _forecasts(t.policy, by_blocks=False)]
        if not sites:
            return
        best = max(sites, key=self._rank)
        start = best.policy
        if self._rank(best) < self._rank(self._best()) - 1.0 or not isinstance(start, Composition):
            return  # forecasts of single sites are far behind those of blocks
        ranked = sorted(self.sensitivity(start).items(), key=lambda item: item[1])
        order = _order(start)
        for count in (1, 2):
            spared = tuple(Rule(Compute(), (kind,), depths) for (kind, depths), _ in ranked[:count])
            # The computing costs, so there are fewer full steps; the most that the target allows.
            for number in self._counts():
                rows = [
                    replace(start, when=when, rules=(*spared, Rule(Forecast(order))))
                    for when in self._schedules(number)
                ]
                if self.target.psnr is None and self._reaches(rows[0]):
                    yield from rows
                    break
        for (kind, depths), _ in ranked[::-1][:2]:
            yield replace(start, rules=(Rule(Forecast(max(order - 1, 0)), (kind,), depths), Rule(Forecast(order))))

    def _moves(self, best: Trial) -> Iterator[Composition]:
        """The best policy with one full step a little earlier or later, or another order."""
        policy = best.policy
        assert isinstance(policy, Composition)
        full = policy.full_steps()
        for i in range(len(full) - 1, 0, -1):
            for shift in (1, -1):
                moved = tuple(sorted({*full[:i], full[i] + shift, *full[i + 1 :]}))
                if len(moved) == len(full) and moved[-1] < self.steps:
                    yield replace(policy, when=Listed(moved))
        do = _do(policy)
        for other in do.neighbours() if do is not None else ():
            yield replace(policy, rules=(*policy.rules[:-1], Rule(other)))

    # -- trying it ----------------------------------------------------------------------------------------------------

    def _in_reach(self, policies: Iterator[Composition]) -> Iterator[Composition]:
        """Those worth a sampling, while there is time."""
        for policy in policies:
            if self.on.over():
                return
            if self._reaches(policy):
                yield policy

    def _reaches(self, policy: Composition) -> bool:
        """Whether a policy is legal, and by its FLOPs neither too slow for the target nor much faster than it asks
        for."""
        try:
            flops = self.on.price(policy)
        except PolicyError:
            return False
        wanted = self.target.flops or self.target.latency
        # FLOPs fall at least as much as the clock.
        most = 1.5 if self.target.flops else 2.0
        return wanted is None or wanted - _SLACK <= flops <= most * wanted

    def _rank(self, trial: Trial) -> float:
        target = self.target
        if target.psnr is not None:
            return trial.flop_speedup if trial.psnr >= target.psnr else -1e6 + trial.psnr
        reached = trial.flop_speedup if target.flops is not None else trial.latency_speedup
        wanted = target.flops or target.latency or 0.0
        return trial.psnr if reached >= wanted - _SLACK else -1e6 + reached

    def _best(self) -> Trial:
        if not self.on.known:
            raise TocaError("nothing in reach of the target was tried: give more seconds or another target")
        best = max(self.on.known.values(), key=self._rank)
        if self._rank(best) < -1e5 and self.on.over():
            raise TocaError(f"no trial reaches {self.target}; the nearest is {told_of(best.policy)}")
        return best


def _do(policy: Policy) -> Any:
    return policy.rules[-1].do if isinstance(policy, Composition) and policy.rules else None


def _forecasts(policy: Policy, *, by_blocks: bool) -> bool:
    """Whether its last rule forecasts by an order that may be another: blocks as one, or single sites."""
    do = _do(policy)
    return do is not None and do.by_blocks == by_blocks and bool(do.neighbours())


def _order(policy: Composition) -> int:
    return getattr(_do(policy), "order", 2)
