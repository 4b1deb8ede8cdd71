"""Plans: what every site does at every step. Host data, complete before the first launch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Annotated, Protocol

import torch

from toca_compile.ir.fields import (
    Basis,
    Checked,
    Count,
    Dtype,
    OneOf,
    Order,
    Seed,
    Threshold,
    Tokens,
    Weight,
)
from toca_compile.ir.types import Action, Site, StepKind

SCORES = ("attention", "entropy", "v_norm", "k_norm", "error", "random", "none")
SELECTING = (Action.PARTIAL, Action.QUERIES)
KEYS = ("fresh", "update", "keep")
Score = Annotated[str, OneOf(SCORES)]
Keys = Annotated[str, OneOf(KEYS)]


@dataclass(frozen=True)
class SiteStep:
    """One site in one step. ``tokens``: how many it computes. ``order``: of COMPUTE, how many differences to earlier
    full steps are made; of FORECAST, and for the tokens that PARTIAL or QUERIES leave out, how many are used. ``keys``:
    of QUERIES, whether keys and values are made ``"fresh"`` for all tokens, taken from the cache with an ``"update"``
    of the selected tokens' part, or taken from it as they are (``"keep"``). ``update``: of PARTIAL and QUERIES, whether
    the selected tokens' new values are kept (each token then has a history of its own), or serve this step alone."""

    action: Action
    tokens: Tokens = 0
    order: Order = 0
    keys: Keys = "fresh"
    update: bool = True


@dataclass(frozen=True)
class StepPlan:
    """One step: its kind and what each site does, in site order."""

    kind: StepKind
    sites: tuple[SiteStep, ...]


@dataclass(frozen=True)
class Selector(Checked):
    """How tokens are ranked (toca-compile's ``select_tokens``): base score, weight of one missed step, and the bonus
    of the best token of each ``cell`` × ``cell`` patch. ``stride``: every how many-th query row is asked for the
    attention score. ``shared_pair``: the two halves of the batch select the same tokens."""

    score: Score = "attention"
    weight: Weight = 0.0
    cell: Count = 1
    bonus: Weight = 0.0
    stride: Count = 1
    seed: Seed = 0
    shared_pair: bool = False

    @property
    def scored(self) -> bool:
        """Whether the score is measured in the model, at full steps."""
        return self.score not in ("random", "none")


@dataclass(frozen=True)
class CacheSpec:
    """What a site keeps: its output and ``order`` differences, in ``dtype`` (None: the output's own).

    Differences are those of a ``"taylor"`` series, repeated slopes between neighbouring full steps, or the divided
    differences of ``"newton"``'s polynomial through the full steps.
    """

    order: Order = 0
    dtype: Annotated[torch.dtype, Dtype()] | None = None
    basis: Basis = "taylor"

    def spacing(self, full: Sequence[int], order: int) -> int:
        """What a difference is divided by at the last of the full steps."""
        back = order if self.basis == "newton" else 1
        return full[-1] - full[-1 - back] if len(full) > back else 1

    def power(self, full: Sequence[int], step: int, order: int) -> int:
        """What a difference is multiplied by at a later step (and ``order``! divides, in a Taylor series)."""
        if self.basis == "taylor":
            return (step - full[-1]) ** order
        return prod(step - at for at in full[-order:])


OUTPUT_ONLY = CacheSpec()


@dataclass(frozen=True)
class Skip:
    """What stands in for a range of blocks that a step skips.

    Args:
        residual: keep what the range added to the residual stream, and add it to what enters the range now; else keep
            the stream as it left the range.
        memory: order, dtype and basis of a forecast of what is kept.
        threshold: a step that the plan skips is computed all the same where the change that the blocks before the
            range make differs by more than this from what they did at the last computed step: mean |difference| over
            mean |change|, one number for the batch (FirstBlockCache). None: the plan alone decides.
        limit: how many steps in a row may be skipped at most; None: any number.
    """

    residual: bool = True
    memory: CacheSpec = OUTPUT_ONLY
    threshold: Threshold | None = None
    limit: Count | None = None


@dataclass(frozen=True)
class Plan:
    """All steps of a run. An ``endless`` plan repeats its last row; another ends after its rows and a further call
    starts a new run."""

    steps: tuple[StepPlan, ...]
    selector: Selector = Selector()
    endless: bool = False
    memory: CacheSpec = OUTPUT_ONLY
    skip: Skip = Skip()

    def reads(self, site: int) -> bool:
        """Whether any step reads the site's cache; without, nothing is stored."""
        return self.ever(site, *SELECTING, Action.REUSE, Action.FORECAST)

    def cache_spec(self, site: int) -> CacheSpec:
        """What a site keeps: as many differences as its steps ask for."""
        return replace(self.memory, order=max(s.order for s in self._does[site]))

    @cached_property
    def skipped(self) -> frozenset[int]:
        """The sites that some step skips."""
        return frozenset(i for i, does in enumerate(self._does) if any(s.action is Action.SKIP for s in does))

    @property
    def adaptive(self) -> bool:
        """Whether what a step does is decided while it runs."""
        return self.skip.threshold is not None and bool(self.skipped)

    def ever(self, site: int, *actions: Action) -> bool:
        """Whether the site does one of these at any step."""
        return any(s.action in actions for s in self._does[site])

    def partial(self, site: int) -> bool:
        """Whether the site ever selects tokens."""
        return self.ever(site, *SELECTING)

    def tokenwise(self, site: int) -> bool:
        """Whether each token of the site has a history of its own."""
        return self.cache_spec(site).order > 0 and any(s.action in SELECTING and s.update for s in self._does[site])

    def keeps_keys(self, site: int) -> bool:
        """Whether any step takes the site's keys and values from the cache."""
        return any(s.action is Action.QUERIES and s.keys != "fresh" for s in self._does[site])

    @cached_property
    def _does(self) -> tuple[frozenset[SiteStep], ...]:
        """The different things that each site does. Asked for at every step of a layout, which stays linear by it."""
        return tuple(frozenset(column) for column in zip(*(step.sites for step in self.steps), strict=True))


def step_kind(sites: tuple[SiteStep, ...]) -> StepKind:
    """The kind of a step in which the sites do this."""
    return kind_of(frozenset(s.action for s in sites))


def kind_of(actions: frozenset[Action]) -> StepKind:
    """A step is full where every site computes all, and skips where any range of blocks is skipped; partial where some
    compute something; else forecast or reuse."""
    if Action.SKIP in actions:
        return StepKind.SKIP
    if actions <= {Action.COMPUTE}:
        return StepKind.FULL
    if actions & {Action.COMPUTE, *SELECTING}:
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
            partial = [site for site, s in zip(sites, step.sites, strict=True) if s.action in SELECTING]
            scorers = [site.scorer(plan.selector.score) for site in partial]
            # Those of this very step too: a site may stand before its scorer.
            read |= {s.site for s in scorers if s is not None}
    return scored[::-1]


class Policy(Protocol):
    """A caching policy: pure host data. It sees the sites of a model and says what each does at each step.

    A policy may also have ``for_run(num_steps: int, guided: bool) -> Policy``, as all of this package's have. A
    pipeline asks it before the first model call of a run for the policy to follow in that run: ``num_steps`` model
    calls, and without guidance (``guided=False``) no batch that is a guidance pair. It must depend on its arguments
    alone, and equal policies must be equal (``==``), so that a plan is laid out once. A policy without it is followed
    as it is, however many steps the run has.
    """

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """The plan for these sites.

        Raises:
            PolicyError: the policy asks a site for what it cannot do.
        """
        ...
