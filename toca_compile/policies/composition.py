"""Compositions: when a step is full, what each site does on the others, on which tokens, and on how many.

The published methods are compositions; so are others that nobody has named::

    Composition(50, when=Every(4), rules=(
        Rule(Queries("fresh", order=2), kinds=("self_attention",)),  # some tokens of attention, a forecast of others
        Rule(Forecast(2)),                                           # everything else
    ), which=Selector("error"), how_many=Share(0.3))
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from toca_compile.errors import PolicyError
from toca_compile.ir.actions import Action, Compute, Facts, Forecast, Partial, Queries, Reuse, SkipBlocks, skips
from toca_compile.ir.fields import Basis, Checked, Count, Counting, DeviceName, DtypeName, Fraction, Kind, Steps
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.plan import Plan, Skip, StepPlan, step_kind
from toca_compile.ir.registry import register
from toca_compile.ir.selectors import Selector, TokenSelector
from toca_compile.ir.signature import Signature
from toca_compile.ir.types import Site
from toca_compile.policies.base import CachingPolicy
from toca_compile.policies.schedules import RatioSchedule, counted
from toca_compile.policies.when import Adaptive, Every, Listed, When, check_range


@dataclass(frozen=True)
class Rule(Checked):
    """``do`` it at sites of these ``kinds`` (empty: all) whose place in their stack of blocks, from 0 to 1, lies within
    ``depths``."""

    do: Action
    kinds: tuple[Kind, ...] = ()
    depths: tuple[Fraction, Fraction] = (0.0, 1.0)

    def check(self) -> None:
        check_range("depths", self.depths)
        if getattr(self.do, "tokens", 0):
            raise PolicyError("do.tokens belongs to a plan: in a rule how_many says how many")

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
            self.ratio,
            site.axis.size,
            kind=site.kind,
            layer=(site.depth, self.span or site.depths - 1),
            step=(counted(call, num_steps, self.count), num_steps),
        )


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
        which: how tokens are selected.
        how_many: of them, unless ``which`` says it.
        basis: of forecasts: ``"taylor"`` as published, or ``"newton"``, exact on polynomials of its order.
        cache_dtype: in which dtype outputs and what is kept beside them lie in memory, by name: ``"bfloat16"``;
            ``"float8_e4m3fn"`` or another of one byte, packed with an exponent for each row; None: the outputs' own.
        cache_device: where they lie, by name: ``"cpu"`` for a model on a GPU whose memory is short, which costs a copy
            there and back wherever they are read and written; None: where the model is.
        differences_from: the call from which on full steps make differences.

    Raises:
        PolicyError: parts that contradict each other.
    """

    num_steps: Steps = 50
    when: When = field(default_factory=Every)
    rules: tuple[Rule, ...] = ()
    alternate: tuple[Rule, ...] = ()
    which: TokenSelector = field(default_factory=lambda: Selector("none"))
    how_many: Share = field(default_factory=Share)
    basis: Basis = "taylor"
    cache_dtype: DtypeName | None = None
    differences_from: Count = 1
    cache_device: DeviceName | None = None

    def check(self) -> None:
        if isinstance(self.when, Listed):
            self.full_steps()
        done = [rule.do for rule in (*self.rules, *self.alternate)]
        for keep in (do.needs(CacheSpec(basis=self.basis)) for do in done):
            if keep.by_token and keep.history is not None and keep.history.why_not_by_token():
                remedy = keep.history.why_not_by_token()
                raise PolicyError(f"tokens that are kept one by one have a history each: {remedy}, or update=False")
        ranges = skips(done)
        if len(ranges) > 1:
            raise PolicyError("all steps that skip blocks must skip the same ones")
        if ranges and not ranges[0].residual and ranges[0].history(CacheSpec()).corrects:
            raise PolicyError("correct is of what blocks add to the stream: leave residual=False out")
        for why in (do.unfit(self.num_steps) for do in done):
            if why is not None:
                raise PolicyError(why)
        for rules in (self.rules, self.alternate):
            own = [rule for rule in rules if rule.do.by_blocks]
            if own and (len(rules) > 1 or own[0].kinds or own[0].depths != (0.0, 1.0)):
                raise PolicyError("blocks are skipped as a whole: their rule must be the only one of its steps")
        if isinstance(self.when, Adaptive):
            if self.alternate or not ranges:
                raise PolicyError(
                    "whether a step is full is decided when its first blocks have run, so that the others can only be "
                    "skipped: Adaptive goes with one rule, SkipBlocks"
                )
            if ranges[0].history(CacheSpec()).corrects:
                raise PolicyError(
                    "correct needs to know which steps are skipped, and a threshold decides: leave it out"
                )
            if self.when.by.first and not all(do.first for do in ranges):
                raise PolicyError("Adaptive is measured on the first blocks: SkipBlocks(first=1) or more")
            if self.when.by.behind and not all(do.last for do in ranges):
                raise PolicyError("Adaptive is measured on the last blocks: SkipBlocks(last=1) or more")

    def full_steps(self, kind: str = "") -> tuple[int, ...]:
        """The full steps of a kind of site as call indices, 0 first."""
        return tuple(call for call, phase in enumerate(self.when.phases(self.num_steps, kind)) if phase == 0)

    def for_call(self, call: Signature) -> "Composition":
        """With what is known of a call, as far as a rule asks for it."""
        rules, alternate = (
            tuple(replace(rule, do=rule.do.for_call(call)) for rule in rules) for rules in (self.rules, self.alternate)
        )
        if call.moves is None or (rules, alternate) == (self.rules, self.alternate):
            return self
        return replace(self, num_steps=len(call.moves), rules=rules, alternate=alternate)

    def for_run(self, num_steps: int, guided: bool) -> "Composition":
        rules, alternate = (
            tuple(replace(rule, do=rule.do.for_run(num_steps)) for rule in rules)
            for rules in (self.rules, self.alternate)
        )
        which = self.which.for_run(guided)
        return replace(self, num_steps=num_steps, which=which, rules=rules, alternate=alternate)

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """What each site does at each step, decided once for the whole step."""
        phases = {kind: self.when.phases(self.num_steps, kind) for kind in {s.kind for s in sites}}
        rules = [self._rules(site, self.rules) for site in sites]
        alternate = [self._rules(site, self.alternate) for site in sites] if self.alternate else rules
        orders = [
            max((r.do.used for r in (*self.rules, *self.alternate) if r.matches(site)), default=0) for site in sites
        ]
        made = [0] * len(sites)
        blocks = _blocks(sites)
        count = max(blocks, default=-1) + 1
        self._check_able(sites, count)
        computed = [Compute(order) for order in range(max(orders, default=0) + 1)]
        steps = []
        for call in range(self.num_steps):
            row: list[Action] = []
            for i, site in enumerate(sites):
                phase = phases[site.kind][call]
                do: Action = computed[0]
                if phase:
                    facts = Facts(partial(self._tokens, site, call), made[i], phase, blocks[i], count)
                    do = (rules if phase % 2 else alternate)[i].planned(site, facts)
                if do.dense:
                    made[i] = 0 if call < self.differences_from else min(orders[i], made[i] + 1)
                    do = computed[made[i]]
                row.append(do)
            steps.append(StepPlan(step_kind(row), tuple(row)))
        return Plan(tuple(steps), self.which, memory=self._memory(), skip=self._skip())

    def _rules(self, site: Site, rules: tuple[Rule, ...]) -> Action:
        return next((rule.do for rule in rules if rule.matches(site)), Reuse())

    def _tokens(self, site: Site, call: int) -> int:
        tokens = self.which.tokens(site)
        return self.how_many.tokens(site, call, self.num_steps) if tokens is None else tokens

    def _check_able(self, sites: tuple[Site, ...], blocks: int) -> None:
        """Refuse a rule that no site can follow."""
        for rule in (*self.rules, *self.alternate):
            why = rule.do.misfit([site for site in sites if rule.matches(site)], blocks)
            if why is not None:
                raise PolicyError(why)
        selecting = [s for s in sites if any(r.matches(s) and r.do.proof(s) for r in (*self.rules, *self.alternate))]
        why = self.which.misfit(selecting)
        if why is not None:
            raise PolicyError(why)
        if self.how_many != Share() and any(self.which.tokens(site) is not None for site in selecting):
            name = type(self.which).__name__
            raise PolicyError(f"{name} says itself how many tokens are computed: leave how_many out")

    def _skip(self) -> Skip:
        ranges = skips(rule.do for rule in (*self.rules, *self.alternate))
        if not ranges:
            return Skip()
        history = ranges[0].history(self._memory())
        if not isinstance(self.when, Adaptive):
            return Skip(ranges[0].residual, history)
        return Skip(ranges[0].residual, history, self.when.threshold, self.when.limit, self.when.by)

    def _memory(self) -> CacheSpec:
        """How a last version is kept."""
        dtype = getattr(torch, self.cache_dtype) if self.cache_dtype is not None else None
        return CacheSpec(0, dtype, self.basis, self.cache_device)


def _blocks(sites: tuple[Site, ...]) -> list[int]:
    """The number of each site's block. What is compiled apart but has one place in one stack is one block."""
    places = {s.block: (s.depth, s.depths) for s in reversed(sites)}
    numbers: dict[int, int] = {}
    before, number = None, -1
    for block in sorted(places):
        number += places[block] != before or places[block][1] == 1
        numbers[block], before = number, places[block]
    return [numbers[s.block] for s in sites]


__all__ = ["Composition", "Compute", "Forecast", "Partial", "Queries", "Reuse", "Rule", "Share", "SkipBlocks"]
