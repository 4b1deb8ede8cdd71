"""Compositions: when a step is full, what each site does on the others, on which tokens, and on how many.

The published methods are compositions; so are others that nobody has named::

    Composition(50, when=Every(4), rules=(
        Rule(Queries("fresh", order=2), kinds=("self_attention",)),  # some tokens of attention, a forecast of others
        Rule(Forecast(2)),                                           # everything else
    ), which=Selector("error"), how_many=Share(0.3))
"""

from dataclasses import dataclass, field, replace

import torch

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import Basis, Checked, Count, Counting, DtypeName, Fraction, Kind, Natural, Order, Steps
from toca_compile.ir.plan import CacheSpec, Keys, Plan, Selector, SiteStep, Skip, StepPlan, step_kind
from toca_compile.ir.registry import register
from toca_compile.ir.types import Action, Site
from toca_compile.policies.base import CachingPolicy
from toca_compile.policies.schedules import RatioSchedule, counted
from toca_compile.policies.when import Adaptive, Every, Listed, When, check_range


@dataclass(frozen=True)
class Compute(Checked):
    """All tokens, as on a full step."""


@dataclass(frozen=True)
class Reuse(Checked):
    """The cached output."""


@dataclass(frozen=True)
class Forecast(Checked):
    """The cached output moved along its differences, as far as the full steps so far allow and up to ``order``."""

    order: Order = 2


@dataclass(frozen=True)
class Partial(Checked):
    """The selected tokens, where the site is token-wise; the others are reused, or forecast (``order``), as is the
    whole site where it is not. ``update``: whether the new values are kept, with their differences; else they serve
    their step alone."""

    order: Order = 0
    update: bool = True


@dataclass(frozen=True)
class Queries(Checked):
    """The selected tokens through an attention, against keys and values of all tokens; the others as in ``Partial``.

    Args:
        keys: made ``"fresh"`` for all tokens; ``"update"``: cached, the selected tokens' part made anew; ``"keep"``:
            cached.
        refresh: with cached keys, make them fresh every so many steps after a full one; 0: at full steps alone.
        order, update: as in ``Partial``.
    """

    keys: Keys = "fresh"
    refresh: Natural = 0
    order: Order = 0
    update: bool = True

    def check(self) -> None:
        if self.refresh and self.keys == "fresh":
            raise PolicyError("keys that are fresh at every step have no refresh of their own: keys='update' or 'keep'")


@dataclass(frozen=True)
class SkipBlocks(Checked):
    """All blocks but the ``first`` and ``last`` so many, as one: what they add to the residual stream is reused, or
    forecast (``order``); with ``residual=False`` it is the stream itself behind them. The others are computed."""

    first: Natural = 0
    last: Natural = 0
    residual: bool = True
    order: Order = 0


What = Compute | Reuse | Forecast | Partial | Queries | SkipBlocks


@dataclass(frozen=True)
class Rule(Checked):
    """``do`` it at sites of these ``kinds`` (empty: all) whose place in their stack of blocks, from 0 to 1, lies within
    ``depths``."""

    do: What
    kinds: tuple[Kind, ...] = ()
    depths: tuple[Fraction, Fraction] = (0.0, 1.0)

    def check(self) -> None:
        check_range("depths", self.depths)

    def matches(self, site: Site) -> bool:
        """Whether the rule speaks of this site."""
        place = site.depth / (site.depths - 1) if site.depths > 1 else 0.0
        return (not self.kinds or site.kind in self.kinds) and self.depths[0] <= place <= self.depths[1]


@dataclass(frozen=True)
class Share(Checked):
    """How many tokens: floor(``ratio`` · factors · tokens). ``span``: divisor of the layer factor (by default the depth
    of the stack less one); ``count``: as in ``IntervalFunction``."""

    ratio: Fraction = 0.1
    factors: RatioSchedule = field(default_factory=RatioSchedule)
    span: Count | None = None
    count: Counting = "up"

    def tokens(self, site: Site, call: int, num_steps: int) -> int:
        """K of one site at one call."""
        return self.factors.tokens(
            self.ratio, site.axis.size, kind=site.kind, depth=site.depth, span=self.span or site.depths - 1,
            s=counted(call, num_steps, self.count), num_steps=num_steps,
        )  # fmt: skip


@register
@dataclass(frozen=True)
class Composition(CachingPolicy):
    """A policy made of parts.

    Args:
        num_steps: model calls of one run.
        when: which steps are full.
        rules: what sites do on the other steps; of the rules that match a site the first holds, and without one it is
            reused.
        alternate: the rules at even phases, if there are any: two kinds of steps take turns (DuCa).
        which: how tokens are ranked.
        how_many: of them are selected.
        basis: of forecasts: ``"taylor"`` as published, or ``"newton"``, exact on polynomials of its order.
        cache_dtype: a dtype's name, such as ``"bfloat16"``; None: the outputs' own.
        differences_from: the call from which on full steps make differences.

    Raises:
        PolicyError: parts that contradict each other.
    """

    num_steps: Steps = 50
    when: When = field(default_factory=Every)
    rules: tuple[Rule, ...] = ()
    alternate: tuple[Rule, ...] = ()
    which: Selector = field(default_factory=lambda: Selector("none"))
    how_many: Share = field(default_factory=Share)
    basis: Basis = "taylor"
    cache_dtype: DtypeName | None = None
    differences_from: Count = 1

    def check(self) -> None:
        if isinstance(self.when, Listed):
            self.full_steps()
        done = [rule.do for rule in (*self.rules, *self.alternate)]
        if self.basis == "newton" and any(isinstance(do, Partial | Queries) and do.order and do.update for do in done):
            raise PolicyError("tokens that are kept one by one have a history each: basis='taylor', or update=False")
        skips = {do for do in done if isinstance(do, SkipBlocks)}
        if len(skips) > 1:
            raise PolicyError("all steps that skip blocks must skip the same ones")
        for rules in (self.rules, self.alternate):
            own = [rule for rule in rules if isinstance(rule.do, SkipBlocks)]
            if own and (len(rules) > 1 or own[0].kinds or own[0].depths != (0.0, 1.0)):
                raise PolicyError("blocks are skipped as a whole: their rule must be the only one of its steps")
        if isinstance(self.when, Adaptive):
            if self.alternate or not skips:
                raise PolicyError(
                    "whether a step is full is decided when its first blocks have run, so that the others can only be "
                    "skipped: Adaptive goes with one rule, SkipBlocks"
                )
            if not all(do.first for do in skips):
                raise PolicyError("Adaptive is measured on the first blocks: SkipBlocks(first=1) or more")

    def full_steps(self, kind: str = "") -> tuple[int, ...]:
        """The full steps of a kind of site as call indices, 0 first."""
        return tuple(call for call, phase in enumerate(self.when.phases(self.num_steps, kind)) if phase == 0)

    def for_run(self, num_steps: int, guided: bool) -> "Composition":
        # Without guidance the halves of a batch are unrelated pictures, which select tokens of their own.
        which = replace(self.which, shared_pair=self.which.shared_pair and guided)
        return replace(self, num_steps=num_steps, which=which)

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """What each site does at each step, decided once for the whole step."""
        phases = {kind: self.when.phases(self.num_steps, kind) for kind in {s.kind for s in sites}}
        orders = [max((_order(r.do) for r in (*self.rules, *self.alternate) if r.matches(s)), default=0) for s in sites]
        made = [0] * len(sites)
        blocks = _blocks(sites)
        count = max(blocks, default=-1) + 1
        for rule in (*self.rules, *self.alternate):
            if isinstance(rule.do, SkipBlocks) and rule.do.first + rule.do.last >= count:
                raise PolicyError(
                    f"the model has {count} blocks: first={rule.do.first} and last={rule.do.last} leave none to skip"
                )
            able = [s for s in sites if rule.matches(s) and s.attention] if isinstance(rule.do, Queries) else []
            if able and all(Action.QUERIES not in s.actions and s.no_queries for s in able):
                raise PolicyError(f"{able[0].name} cannot be computed for some queries alone: {able[0].no_queries}")
        steps = []
        for call in range(self.num_steps):
            row = []
            for site, block in zip(sites, blocks, strict=True):
                phase = phases[site.kind][call]
                todo = self._site(site, call, phase, (block, count), made[site.index])
                if todo.action is Action.COMPUTE:
                    early = call < self.differences_from
                    made[site.index] = 0 if early else min(orders[site.index], made[site.index] + 1)
                    todo = SiteStep(Action.COMPUTE, site.axis.size, made[site.index])
                row.append(todo)
            steps.append(StepPlan(step_kind(tuple(row)), tuple(row)))
        dtype = self._dtype()
        return Plan(tuple(steps), self.which, memory=CacheSpec(0, dtype, self.basis), skip=self._skip())

    def _site(self, site: Site, call: int, phase: int, block: tuple[int, int], made: int) -> SiteStep:
        if phase == 0:
            return SiteStep(Action.COMPUTE)
        rules = self.alternate if self.alternate and phase % 2 == 0 else self.rules
        do = next((rule.do for rule in rules if rule.matches(site)), Reuse())
        if isinstance(do, Compute):
            return SiteStep(Action.COMPUTE)
        if isinstance(do, SkipBlocks):
            inside = do.first <= block[0] < block[1] - do.last
            return SiteStep(Action.SKIP if inside else Action.COMPUTE)
        order = min(_order(do), made)
        rest = SiteStep(Action.FORECAST, 0, order) if order else SiteStep(Action.REUSE)
        action = {Partial: Action.PARTIAL, Queries: Action.QUERIES}.get(type(do))
        if action is None or action not in site.actions:
            return rest
        update = getattr(do, "update", True)
        k = self.how_many.tokens(site, call, self.num_steps)
        if k in (0, site.axis.size):
            # All tokens is the dense path: nothing to gather.
            return rest if k == 0 else SiteStep(Action.COMPUTE)
        if not isinstance(do, Queries):
            return SiteStep(action, k, order, update=update)
        assert site.query_proof is not None
        # Keys that are not token-wise (a token mixer makes them) cannot be updated for some tokens.
        fresh = do.keys == "update" and not site.query_proof.updates
        fresh = fresh or bool(do.refresh and phase % do.refresh == 0)
        return SiteStep(action, k, order, "fresh" if fresh else do.keys, update)

    def _skip(self) -> Skip:
        does = [r.do for r in (*self.rules, *self.alternate) if isinstance(r.do, SkipBlocks)]
        if not does:
            return Skip()
        memory = CacheSpec(does[0].order, self._dtype(), self.basis)
        test = (self.when.threshold, self.when.limit) if isinstance(self.when, Adaptive) else (None, None)
        return Skip(does[0].residual, memory, *test)

    def _dtype(self) -> torch.dtype | None:
        return getattr(torch, self.cache_dtype) if self.cache_dtype is not None else None


def _order(do: What) -> int:
    return do.order if isinstance(do, Forecast | Partial | Queries) else 0


def _blocks(sites: tuple[Site, ...]) -> list[int]:
    """The number of each site's block. What is compiled apart but has one place in one stack is one block."""
    places = {s.block: (s.depth, s.depths) for s in reversed(sites)}
    numbers: dict[int, int] = {}
    before, number = None, -1
    for block in sorted(places):
        number += places[block] != before or places[block][1] == 1
        numbers[block], before = number, places[block]
    return [numbers[s.block] for s in sites]
