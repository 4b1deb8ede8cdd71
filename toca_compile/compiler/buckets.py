"""Buckets: a plan in which few different numbers of tokens are selected, each no less than the policy says.

A CUDA graph is recorded for one number of tokens a site. Steps that do the same with other numbers share a graph by
computing as many as the largest of them: neighbours are joined, those first that add the fewest tokens.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import pairwise

from toca_compile.ir.actions import Action, Selecting
from toca_compile.ir.plan import Plan, StepPlan, scored_sites
from toca_compile.ir.types import Site

GRAPHS = 10  # of a plan, at best
BUCKETS = 8  # of those, at most, for rows that select tokens

Does = tuple[tuple[Action, ...], frozenset[int]]  # a row without its numbers, and the sites that it measures
Tokens = tuple[int, ...]  # of each site


def bucketed(plan: Plan, sites: Sequence[Site]) -> Plan:
    """The plan with few different rows that select tokens: at most 8, and so many that there are 10 with the others.
    Rows that do different things are never joined, so that there may be more."""
    scored = scored_sites(plan, sites)
    rows = [(_does(step, measured), _tokens(step)) for step, measured in zip(plan.steps, scored, strict=True)]
    groups: dict[Does, dict[Tokens, int]] = {}
    for does, tokens in rows:
        times = groups.setdefault(does, {})
        times[tokens] = times.get(tokens, 0) + 1
    selecting = {does: times for does, times in groups.items() if any(map(any, times))}
    limit = min(BUCKETS, GRAPHS - (len(groups) - len(selecting)))
    if sum(map(len, selecting.values())) <= limit:
        return plan
    known: dict[tuple[int, int], Action] = {}
    made: dict[tuple[int, Tokens], StepPlan] = {}

    def raised(action: Action, tokens: int) -> Action:
        if not isinstance(action, Selecting) or action.tokens == tokens:
            return action
        return known.setdefault((id(action), tokens), action.of(tokens, action.order))

    joined = _joined(selecting, limit)
    steps = []
    for step, (does, tokens) in zip(plan.steps, rows, strict=True):
        more = joined.get((does, tokens), tokens)
        if more != tokens and (id(step), more) not in made:
            made[id(step), more] = replace(step, sites=tuple(map(raised, step.sites, more)))
        steps.append(step if more == tokens else made[id(step), more])
    return replace(plan, steps=tuple(steps))


@dataclass(frozen=True)
class _Bucket:
    """Rows that are given the same tokens. ``times``: how many steps they are."""

    tokens: Tokens
    times: int
    rows: tuple[Tokens, ...]

    @property
    def cost(self) -> int:
        """How many tokens its steps compute."""
        return sum(self.tokens) * self.times

    def __or__(self, other: "_Bucket") -> "_Bucket":
        tokens = tuple(map(max, self.tokens, other.tokens))
        return _Bucket(tokens, self.times + other.times, self.rows + other.rows)


def _joined(groups: dict[Does, dict[Tokens, int]], limit: int) -> dict[tuple[Does, Tokens], Tokens]:
    """For each row of a group, the tokens that it is given."""
    buckets = {
        does: [_Bucket(row, times[row], (row,)) for row in sorted(times, key=sum)] for does, times in groups.items()
    }
    while sum(map(len, buckets.values())) > limit:
        pairs = [
            ((a | b).cost - a.cost - b.cost, n, i)
            for n, own in enumerate(buckets.values())
            for i, (a, b) in enumerate(pairwise(own))
        ]
        if not pairs:
            break
        _, n, i = min(pairs)
        own = list(buckets.values())[n]
        own[i : i + 2] = [own[i] | own[i + 1]]
    return {(does, row): bucket.tokens for does, own in buckets.items() for bucket in own for row in bucket.rows}


def _does(step: StepPlan, measured: AbstractSet[int]) -> Does:
    return tuple(action.form() for action in step.sites), frozenset(measured)


def _tokens(step: StepPlan) -> Tokens:
    return tuple(action.tokens if isinstance(action, Selecting) else 0 for action in step.sites)
