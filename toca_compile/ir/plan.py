"""Plans: what every site does at every step. Host data, complete before the first launch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

from toca_compile.ir.actions import Action, Keep, union
from toca_compile.ir.fields import Count, Threshold
from toca_compile.ir.gates import FirstBlocks, Gate, value_at
from toca_compile.ir.history import OUTPUT_ONLY, CacheSpec, History, Past
from toca_compile.ir.selectors import Selector, TokenSelector
from toca_compile.ir.storage import Storage
from toca_compile.ir.types import Site, StepKind

RANK = {k: i for i, k in enumerate(("reuse", "forecast", "full", "partial", "skip"))}


@dataclass(frozen=True)
class StepPlan:
    """One step: its kind and what each site does, in site order."""

    kind: StepKind
    sites: tuple[Action, ...]


@dataclass(frozen=True)
class Skip:
    """What stands in for a range of blocks that a step skips.

    Args:
        residual: keep what the range added to the residual stream, and add it to what enters the range now; else keep
            the stream as it left the range.
        memory: what is kept of it, for a forecast.
        threshold: a step that the plan skips is computed all the same where what ``gate`` measures goes beyond this.
            None: the plan alone decides.
        limit: how many steps in a row may be skipped at most; None: any number.
        gate: what is measured.
    """

    residual: bool = True
    memory: History = OUTPUT_ONLY
    threshold: Threshold | None = None
    limit: Count | None = None
    gate: Gate = field(default_factory=FirstBlocks)

    def may(self, past: Past, step: int) -> bool | None:
        """Whether a step skips the blocks whatever is measured; None where that decides."""
        since = step - past.since
        if past.times < self.gate.asks or (self.limit is not None and since > self.limit):
            return False
        return True if since <= self.gate.trusted else None

    def after(self, past: Past, step: int) -> Past:
        """The past of the blocks after a step that computed them."""
        depth = self.memory.depth
        return Past((*past.full, step)[-(depth + 1) :], past.times + 1, min(past.times, depth))

    def judged(self, measured: torch.Tensor, added: float, step: int, steps: int) -> "Judged":
        """What a measure of a step says, by the one read of a device value. ``added``: what had added up before."""
        assert self.threshold is not None
        distance, *more = measured.tolist() if measured.dim() else (float(measured),)
        if not self.gate.adds_up:
            return Judged(not distance > self.gate.bound(self.threshold, step, steps), added, self.gate.share(more))
        added += value_at(self.gate.polynomial, distance)
        return Judged(added < self.threshold, added, self.gate.share(more))


class Judged(NamedTuple):
    """Whether a step ``skips``, what has ``added`` up, and the ``share`` (``Gate.share``) that its forecast goes by."""

    skips: bool
    added: float
    share: float | None


@dataclass(frozen=True)
class Plan:
    """All steps of a run. An ``endless`` plan repeats its last row; another ends after its rows and a further call
    starts a new run."""

    steps: tuple[StepPlan, ...]
    selector: TokenSelector = field(default_factory=Selector)
    endless: bool = False
    memory: CacheSpec = OUTPUT_ONLY
    skip: Skip = Skip()

    def keep(self, site: int) -> Keep:
        """What of the site lives from step to step.

        Raises:
            PolicyError: its steps need different things of it.
        """
        return self._keeps[site]

    @cached_property
    def _keeps(self) -> tuple[Keep, ...]:
        return tuple(union(action.needs(self.memory) for action in does) for does in self.does)

    @cached_property
    def skipped(self) -> frozenset[int]:
        """The sites that some step skips."""
        return frozenset(i for i, does in enumerate(self.does) if any(a.by_blocks for a in does))

    @property
    def adaptive(self) -> bool:
        """Whether what a step does is decided while it runs."""
        return self.skip.threshold is not None and bool(self.skipped)

    @cached_property
    def _storages(self) -> tuple[Storage, ...]:
        """How what is kept lies in memory."""
        kept = [keep.history for keep in self._keeps] + ([self.skip.memory] if self.skipped else [])
        return tuple(dict.fromkeys(history.storage for history in kept if history is not None))

    @property
    def cache_dtypes(self) -> frozenset[torch.dtype]:
        """Those in which something is kept that is made in others."""
        return frozenset(storage.dtype for storage in self._storages if storage.dtype is not None)

    @property
    def cache_devices(self) -> frozenset[str]:
        """Those that a policy names to keep something on."""
        return frozenset(storage.device for storage in self._storages if storage.device is not None)

    def selects(self, site: int) -> bool:
        """Whether the site ever selects tokens."""
        return self.keep(site).stamp

    @cached_property
    def does(self) -> tuple[tuple[Action, ...], ...]:
        """The different things that each site does. Objects stand many times in a plan: first by identity."""
        columns = zip(*(step.sites for step in self.steps), strict=True)
        return tuple(tuple(dict.fromkeys({id(a): a for a in column}.values())) for column in columns)


def step_kind(sites: Iterable[Action]) -> StepKind:
    """The kind of a step in which the sites do this."""
    return kind_of(frozenset(action.kind for action in sites))


def kind_of(kinds: frozenset[StepKind]) -> StepKind:
    """The kind of a step whose sites do steps of these kinds: it skips where any does, is full where all are, and
    partial where only some compute."""
    if StepKind.FULL in kinds and len(kinds) > 1:
        kinds = kinds - {StepKind.FULL} | {StepKind.PARTIAL}
    return max(kinds, key=lambda kind: RANK[kind.value], default=StepKind.FULL)


def scored_sites(plan: Plan, sites: Sequence[Site]) -> list[set[int]]:
    """For each step, the sites of which it measures what some selecting site reads before it is measured anew."""
    read: set[int] = set()
    scored: list[set[int]] = []
    for step in reversed(plan.steps):
        computed = {i for i, action in enumerate(step.sites) if action.dense}
        scored.append(read & computed)
        read -= computed
        selecting = [sites[i] for i, action in enumerate(step.sites) if action.kind is StepKind.PARTIAL]
        sources = [plan.selector.source(site) for site in selecting]
        # Those of this very step too: a site may stand before its source.
        read |= {s.site for s in sources if s is not None}
    return scored[::-1]


class Policy(Protocol):
    """A caching policy: pure host data. It sees the sites of a model and says what each does at each step.

    A policy may also have ``for_run(num_steps: int, guided: bool) -> Policy``, as all of this package's have. A
    pipeline asks it before the first model call of a run for the policy to follow in that run: ``num_steps`` model
    calls, and without guidance (``guided=False``) no batch that is a guidance pair. It must depend on its arguments
    alone, and equal policies must be equal (``==``), so that a plan is laid out once. A policy without it is followed
    as it is, however many steps the run has. One with ``for_call(call: Signature) -> Policy`` is asked at a run's first
    call with what is known of it, and may refuse it by a ``PolicyError``; of the weights it is told if it has a
    ``made_for``. One with ``choices``, a sequence of policies, is each graph's first among them that the graph can
    follow; one with ``meaning(plan, computed) -> str`` says once what it made of a run.
    """

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """The plan for these sites.

        Raises:
            PolicyError: the policy asks a site for what it cannot do.
        """
        ...
