"""Plans: what every site does at every step. Host data, complete before the first launch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from toca_compile.ir.types import Action, Site, StepKind

SCORES = ("attention", "entropy", "v_norm", "k_norm", "random", "none")


@dataclass(frozen=True)
class SiteStep:
    """One site in one step. ``tokens``: how many it computes. ``order``: of COMPUTE, how many differences to earlier
    full steps are made; of FORECAST, how many are used."""

    action: Action
    tokens: int = 0
    order: int = 0


@dataclass(frozen=True)
class StepPlan:
    """One step: its kind and what each site does, in site order."""

    kind: StepKind
    sites: tuple[SiteStep, ...]


@dataclass(frozen=True)
class Selector:
    """How tokens are ranked (toca-compile's ``select_tokens``): base score, weight of one missed step, and the bonus
    of the best token of each ``cell`` × ``cell`` patch. ``stride``: every how many-th query row is asked for the
    attention score. ``shared_pair``: the two halves of the batch select the same tokens."""

    score: str = "attention"
    weight: float = 0.0
    cell: int = 1
    bonus: float = 0.0
    stride: int = 1
    seed: int = 0
    shared_pair: bool = False

    @property
    def scored(self) -> bool:
        """Whether the score is measured in the model, at full steps."""
        return self.score not in ("random", "none")


@dataclass(frozen=True)
class Memory:
    """What a site keeps: its output and ``order`` differences, in ``dtype`` (None: the output's own).

    Differences are those of a ``"taylor"`` series, repeated slopes between neighbouring full steps, or the divided
    differences of ``"newton"``'s polynomial through the full steps.
    """

    order: int = 0
    dtype: torch.dtype | None = None
    basis: str = "taylor"

    def spacing(self, full: Sequence[int], order: int) -> int:
        """What a difference is divided by at the last of the full steps."""
        back = order if self.basis == "newton" else 1
        return full[-1] - full[-1 - back] if len(full) > back else 1

    def power(self, full: Sequence[int], step: int, order: int) -> int:
        """What a difference is multiplied by at a later step (and ``order``! divides, in a Taylor series)."""
        if self.basis == "taylor":
            return (step - full[-1]) ** order
        return prod(step - at for at in full[-order:])


OUTPUT_ONLY = Memory()


@dataclass(frozen=True)
class Plan:
    """All steps of a run. An ``endless`` plan repeats its last row; another ends after its rows and a further call
    starts a new run."""

    steps: tuple[StepPlan, ...]
    selector: Selector = Selector()
    endless: bool = False
    memory: Memory = OUTPUT_ONLY

    @property
    def caches(self) -> bool:
        """Whether any step reads a cache; without, nothing is stored."""
        return any(s.action is not Action.COMPUTE for step in self.steps for s in step.sites)

    def partial(self, site: int) -> bool:
        """Whether the site ever selects tokens."""
        return any(step.sites[site].action is Action.PARTIAL for step in self.steps)


def step_kind(sites: tuple[SiteStep, ...]) -> StepKind:
    """A step is full where every site computes all, partial where some compute something; else forecast or reuse."""
    actions = {s.action for s in sites}
    if actions <= {Action.COMPUTE}:
        return StepKind.FULL
    if actions & {Action.COMPUTE, Action.PARTIAL}:
        return StepKind.PARTIAL
    return StepKind.FORECAST if Action.FORECAST in actions else StepKind.REUSE


def scored_sites(plan: Plan, sites: Sequence[Site]) -> list[set[int]]:
    """For each step, the sites whose scores of that step some partial site reads before they are made anew."""
    read: set[int] = set()
    scored: list[set[int]] = []
    for step in reversed(plan.steps):
        computed = {site.index for site, s in zip(sites, step.sites, strict=True) if s.action is Action.COMPUTE}
        scored.append(read & computed)
        read -= computed
        if plan.selector.scored:
            partial = [site for site, s in zip(sites, step.sites, strict=True) if s.action is Action.PARTIAL]
            scorers = [site.scorer(plan.selector.score) for site in partial]
            # Those of this very step too: a site may stand before its scorer.
            read |= {s.site for s in scorers if s is not None}
    return scored[::-1]


class Policy(Protocol):
    """A caching policy: pure host data. It sees the sites of a model and says what each does at each step."""

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """The plan for these sites.

        Raises:
            PolicyError: the policy asks a site for what it cannot do.
        """
        ...
