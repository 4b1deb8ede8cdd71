"""Actions: what a site does in one step. One class a kind of action; others ask it and never compare with it.

The same objects stand in a policy's rules, in the plan that it makes (with the step's numbers), and in the variants
that are compiled (``form``: without them). A new action is a class here or in a file of its own, and an emission in
``passes/variants``.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, reduce
from operator import or_
from typing import Annotated, Any, ClassVar, TypeVar

from torch import fx

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import MAX_ORDER, Family, Natural, OneOf, Order, Tokens
from toca_compile.ir.history import CacheSpec, History, Numbers, Past
from toca_compile.ir.registry import register
from toca_compile.ir.signature import Signature
from toca_compile.ir.state import Number, State
from toca_compile.ir.types import RowProof, Site, StepKind

KEYS = ("fresh", "update", "keep")
Keys = Annotated[str, OneOf(KEYS)]
Buffers = set[tuple[State, int]]  # of one site: kind, and which of several

A = TypeVar("A", bound="Action")


@dataclass(frozen=True)
class Keep:
    """What of a site lives from step to step: the union of what its actions need of the steps before them."""

    history: History | None = None  # of its output; None: nothing reads it
    tokenwise: bool = False  # tokens are computed one by one and kept, so that each has a history of its own
    stale_inputs: bool = False
    keys: bool = False
    stamp: bool = False
    score: int = 0  # of a step that computes all: how many buffers what is measured of it fills

    def __or__(self, other: "Keep") -> "Keep":
        histories = [h for h in (self.history, other.history) if h is not None]
        return Keep(
            reduce(lambda a, b: a.joined(b), histories) if histories else None,
            self.tokenwise or other.tokenwise,
            self.stale_inputs or other.stale_inputs,
            self.keys or other.keys,
            self.stamp or other.stamp,
            max(self.score, other.score),
        )

    @property
    def by_token(self) -> bool:
        """Whether each token is forecast from a history of its own."""
        return self.tokenwise and self.history is not None and self.history.moves


@dataclass(frozen=True)
class Facts:
    """What a rule's action is asked with: the site's place in the run. ``tokens``: how many the policy would compute;
    ``made``: differences at hand; ``phase``: calls since the last full step; ``block`` of how many ``blocks``."""

    tokens: Callable[[], int]
    made: int
    phase: int
    block: int
    blocks: int


@dataclass(frozen=True)
class Action(Family):
    """What a site does in one step. The base class computes nothing and reads nothing."""

    kind: ClassVar[StepKind]
    word: ClassVar[str]  # as reports and errors say it
    dense: ClassVar[bool] = False  # computes all tokens
    by_blocks: ClassVar[bool] = False  # done by a range of blocks as a whole
    endless: ClassVar[bool] = True  # may be repeated in steps that are not counted

    @property
    def used(self) -> int:
        """How far back a forecast in it goes."""
        return 0

    @property
    def made(self) -> int:
        """How many differences to earlier steps that computed all it makes."""
        return 0

    def refused(self, site: Site) -> str | None:
        """Why the site cannot do it; None where it can."""
        return None

    def proof(self, site: Site) -> RowProof | None:
        """The proof of the rows that it computes; None where it computes none."""
        return None

    def rows(self, site: Site) -> frozenset[fx.Node]:
        """The nodes that it computes for the selected tokens alone."""
        return frozenset()

    def stale(self, site: Site) -> tuple[fx.Node, ...]:
        """Values that are in this step what they were at the last full one, for whoever reads them."""
        return ()

    def from_cache(self, site: Site) -> tuple[fx.Node, ...]:
        """Values inside the branch that its rows take from an earlier step."""
        return self.stale(site)

    def computed(self, site: Site) -> int:
        """How many tokens it computes."""
        return 0

    def needs(self, defaults: CacheSpec) -> Keep:
        """What it needs of the steps before. ``defaults``: the plan's dtype and basis."""
        return Keep(replace(defaults, order=0))

    def touches(self, keep: Keep) -> Keep:
        """The part of what is kept that it reads or writes."""
        return Keep(keep.history.form() if keep.history is not None else None)

    def writes(self, site: Site, keep: Keep) -> Buffers:
        """The buffers that it must leave as later steps read them."""
        return set()

    def numbers(self, past: Past, step: int, keep: Keep) -> Numbers:
        """The numbers of its site's history in one step."""
        if keep.history is None:
            return {}
        numbers = keep.history.numbers(past, step, past.made if self.dense else min(self.used, past.made))
        if keep.by_token:  # each token has an age of its own; the number says whether the term is used
            numbers |= {(kind, i): int(number != 0) for (kind, i), number in numbers.items() if kind is Number.MOVE}
        return numbers

    def planned(self, site: Site, facts: Facts) -> "Action":
        """What a rule that says this plans for the site in a step."""
        return self

    def misfit(self, sites: Sequence[Site], blocks: int) -> str | None:
        """Why a rule that says this to these sites, of a model with so many blocks, cannot be meant; None where it
        can."""
        return None

    def for_run(self, num_steps: int) -> "Action":
        """The same in a run of so many steps."""
        return self

    def for_call(self, call: Signature) -> "Action":
        """The same for a call of which this is known."""
        return self

    def unfit(self, num_steps: int) -> str | None:
        """Why it cannot be meant in a run of so many steps; None where it can."""
        return None

    def neighbours(self) -> "list[Action]":
        """Actions that are a little more or less of the same: what a search may try instead."""
        return []

    def form(self) -> "Action":
        """Itself without what is a number of a step: what a variant is compiled for."""
        return self

    def __str__(self) -> str:
        return self.word


@register
@dataclass(frozen=True)
class Compute(Action):
    """All tokens, as on a full step. ``order``: how many differences to earlier such steps are made."""

    order: Order = 0

    kind = StepKind.FULL
    word = "compute"
    dense = True

    @property
    def made(self) -> int:
        return self.order

    def computed(self, site: Site) -> int:
        return site.axis.size

    def needs(self, defaults: CacheSpec) -> Keep:
        return Keep()

    def touches(self, keep: Keep) -> Keep:
        if keep.history is None:
            return Keep(score=keep.score)
        return replace(keep, history=keep.history.form(), tokenwise=keep.by_token, stamp=False)

    def writes(self, site: Site, keep: Keep) -> Buffers:
        written: Buffers = {(State.SCORE, i) for i in range(keep.score)}
        if keep.history is not None:
            written |= {(State.OUTPUT, 0)}
            count = keep.history.written(site.output.meta["val"], self.order)
            written |= {(State.HISTORY, i) for i in range(1, count + 1)}
        if keep.stale_inputs and site.row_proof is not None:
            written |= {(State.STALE_INPUT, i) for i in range(len(site.row_proof.stale_inputs))}
        if keep.keys and site.query_proof is not None:
            written |= {(State.KEYS, i) for i in range(len(site.query_proof.dense_inputs))}
        return written

    def form(self) -> Action:
        return replace(self, order=min(self.order, 1))

    def __str__(self) -> str:
        return "compute, differences too" if self.order else "compute"


@register
@dataclass(frozen=True)
class Reuse(Action):
    """The cached output."""

    kind = StepKind.REUSE
    word = "reuse"


@register
@dataclass(frozen=True)
class Forecast(Action):
    """The cached output moved along its differences, as far as the full steps so far allow and up to ``order``."""

    order: Order = 2

    kind = StepKind.FORECAST
    word = "forecast"

    @property
    def endless(self) -> bool:  # type: ignore[override]
        return self.order == 0

    @property
    def used(self) -> int:
        return self.order

    def needs(self, defaults: CacheSpec) -> Keep:
        return Keep(replace(defaults, order=self.order))

    def touches(self, keep: Keep) -> Keep:
        return replace(super().touches(keep), tokenwise=keep.by_token)

    def planned(self, site: Site, facts: Facts) -> Action:
        return _rest(min(self.order, facts.made))

    def neighbours(self) -> list[Action]:
        return [replace(self, order=order) for order in _near(self.order)]

    def form(self) -> Action:
        return replace(self, order=0)


class Selecting(Action):
    """Some tokens are computed, the others reused or forecast. ``tokens``: how many, 0 in a rule, whose policy says it;
    ``order``: of the forecast; ``update``: whether the new values are kept (each token then has a history of its own),
    or serve this step alone."""

    tokens: int
    order: int
    update: bool

    kind = StepKind.PARTIAL
    endless = False
    updates_keys = False  # whether the selected tokens' part of cached keys and values is made anew

    @property
    def used(self) -> int:
        return self.order

    def computed(self, site: Site) -> int:
        return self.tokens

    def refused(self, site: Site) -> str | None:
        why = self._unproven(site)
        if why is not None:
            return f"cannot be {self.word}: {why}"
        size = site.axis.size
        return None if 1 <= self.tokens <= size else f"has {size} tokens, not {self.tokens} to compute"

    def _unproven(self, site: Site) -> str | None:
        return None

    def rows(self, site: Site) -> frozenset[fx.Node]:
        proof = self.proof(site)
        return proof.rows if proof is not None else frozenset()

    def needs(self, defaults: CacheSpec) -> Keep:
        return Keep(replace(defaults, order=self.order), tokenwise=self.update, stamp=True)

    def touches(self, keep: Keep) -> Keep:
        return replace(super().touches(keep), tokenwise=keep.by_token)

    def writes(self, site: Site, keep: Keep) -> Buffers:
        return {(State.OUTPUT, 0)} if self.update else set()

    def planned(self, site: Site, facts: Facts) -> Action:
        order = min(self.order, facts.made)
        if self.proof(site) is None:
            return _rest(order)
        tokens = facts.tokens()
        if tokens in (0, site.axis.size):
            # All tokens is the dense path: nothing to gather.
            return _rest(order) if tokens == 0 else Compute()
        return self.of(tokens, order)

    def of(self, tokens: int, order: int) -> Action:
        """The same of so many tokens, with a forecast of that order for the others."""
        changes: dict[str, Any] = {"tokens": tokens, "order": order}
        return _altered(self, **changes)

    def form(self) -> Action:
        return self.of(0, 0)


@register
@dataclass(frozen=True)
class Partial(Selecting):
    """The selected tokens, where the site is token-wise; the others are reused, or forecast (``order``), as is the
    whole site where it is not. ``update``: whether the new values are kept, with their differences; else they serve
    their step alone."""

    order: Order = 0
    update: bool = True
    tokens: Tokens = 0

    word = "partial"

    def _unproven(self, site: Site) -> str | None:
        return None if site.row_proof is not None else site.reason or "it is not token-wise"

    def proof(self, site: Site) -> RowProof | None:
        return site.row_proof

    def stale(self, site: Site) -> tuple[fx.Node, ...]:
        return site.row_proof.stale_inputs if site.row_proof is not None else ()

    def needs(self, defaults: CacheSpec) -> Keep:
        return replace(super().needs(defaults), stale_inputs=True)

    def __str__(self) -> str:
        return "partial" if self.update else "partial beside a forecast"


@register
@dataclass(frozen=True)
class Queries(Selecting):
    """The selected tokens through an attention, against keys and values of all tokens; the others as in ``Partial``.

    Args:
        keys: made ``"fresh"`` for all tokens; ``"update"``: cached, the selected tokens' part made anew; ``"keep"``:
            cached.
        refresh: of a rule: with cached keys, make them fresh every so many steps after a full one; 0: at full steps
            alone.
        order, update: as in ``Partial``.
    """

    keys: Keys = "fresh"
    refresh: Natural = 0
    order: Order = 0
    update: bool = True
    tokens: Tokens = 0

    word = "queries"

    def check(self) -> None:
        if self.refresh and self.keys == "fresh":
            raise PolicyError("keys that are fresh at every step have no refresh of their own: keys='update' or 'keep'")

    def _unproven(self, site: Site) -> str | None:
        return None if site.query_proof is not None else site.no_queries or "it holds no attention"

    def refused(self, site: Site) -> str | None:
        why = super().refused(site)
        if why is None and self.updates_keys and site.query_proof is not None and not site.query_proof.updates:
            return "cannot update its keys: they are not token-wise in its input; take keys='fresh' or 'keep'"
        return why

    @property
    def cached_keys(self) -> bool:
        """Whether keys and values come from an earlier step."""
        return self.keys != "fresh"

    @property
    def updates_keys(self) -> bool:  # type: ignore[override]
        """Whether the selected tokens' part of the cached ones is made anew."""
        return self.keys == "update"

    def proof(self, site: Site) -> RowProof | None:
        return site.query_proof

    def rows(self, site: Site) -> frozenset[fx.Node]:
        proof = self.proof(site)
        own = super().rows(site)
        return own.union(*(u.rows for u in proof.updates)) if proof is not None and self.updates_keys else own

    def from_cache(self, site: Site) -> tuple[fx.Node, ...]:
        return site.query_proof.dense_inputs if site.query_proof is not None and self.cached_keys else ()

    def needs(self, defaults: CacheSpec) -> Keep:
        return replace(super().needs(defaults), keys=self.cached_keys)

    def touches(self, keep: Keep) -> Keep:
        return replace(super().touches(keep), keys=keep.keys)

    def misfit(self, sites: Sequence[Site], blocks: int) -> str | None:
        able = [site for site in sites if site.attention]
        # What one graph of a model cannot do, another may: there it is done, and here the user is told.
        if not able or any(site.fragment or site.query_proof or not site.no_queries for site in able):
            return None
        return f"{able[0].name} cannot be computed for some queries alone: {able[0].no_queries}"

    def writes(self, site: Site, keep: Keep) -> Buffers:
        written = super().writes(site, keep)
        if (keep.keys and not self.cached_keys) or self.updates_keys:
            assert site.query_proof is not None
            written |= {(State.KEYS, i) for i in range(len(site.query_proof.dense_inputs))}
        return written

    def planned(self, site: Site, facts: Facts) -> Action:
        planned = super().planned(site, facts)
        if not isinstance(planned, Queries) or site.query_proof is None:
            return planned
        # Keys that are not token-wise (a token mixer makes them) cannot be updated for some tokens.
        fresh = self.updates_keys and not site.query_proof.updates
        fresh = fresh or bool(self.refresh and facts.phase % self.refresh == 0)
        return _altered(planned, keys="fresh" if fresh else self.keys, refresh=0)

    def __str__(self) -> str:
        return f"queries, keys {self.keys}" + ("" if self.update else ", beside a forecast")


@register
@dataclass(frozen=True)
class SkipBlocks(Action):
    """All blocks but the ``first`` and ``last`` so many, as one: what they add to the residual stream is reused, or
    forecast (``order``, or whatever ``do`` says); with ``residual=False`` it is the stream itself behind them. The
    others are computed."""

    first: Natural = 0
    last: Natural = 0
    residual: bool = True
    order: Order = 0
    do: Action | None = None

    kind = StepKind.SKIP
    word = "skip"
    by_blocks = True

    def stands_in(self) -> Action:
        """What is done with what the blocks added."""
        return self.do if self.do is not None else _rest(self.order)

    def for_run(self, num_steps: int) -> Action:
        return replace(self, do=self.do.for_run(num_steps)) if self.do is not None else self

    def for_call(self, call: Signature) -> Action:
        return replace(self, do=self.do.for_call(call)) if self.do is not None else self

    def unfit(self, num_steps: int) -> str | None:
        return self.do.unfit(num_steps) if self.do is not None else None

    def neighbours(self) -> list[Action]:
        return [replace(self, order=order) for order in _near(self.order)] if self.do is None else []

    def check(self) -> None:
        if self.do is not None and (self.order or self.do.kind not in (StepKind.REUSE, StepKind.FORECAST)):
            raise PolicyError(
                f"SkipBlocks(do=…) reuses or forecasts what the blocks add, without order; not {self.do!r}"
            )

    def history(self, defaults: CacheSpec) -> History:
        """What is kept of what the blocks added."""
        history = self.stands_in().needs(defaults).history
        assert history is not None
        return history

    def needs(self, defaults: CacheSpec) -> Keep:
        return Keep()

    def misfit(self, sites: Sequence[Site], blocks: int) -> str | None:
        if self.first + self.last < blocks:
            return None
        return f"the model has {blocks} blocks: first={self.first} and last={self.last} leave none to skip"

    def planned(self, site: Site, facts: Facts) -> Action:
        inside = self.first <= facts.block < facts.blocks - self.last
        return _altered(self, first=0, last=0) if inside else Compute()


def _near(order: int) -> set[int]:
    return {max(order - 1, 0), min(order + 1, MAX_ORDER)} - {order}


@cache
def _rest(order: int) -> Action:
    return Forecast(order) if order else Reuse()


@lru_cache(maxsize=4096)
def _altered(action: A, **changes: Any) -> A:
    """The same with other fields: one object for all steps of a plan that say the same, whose layout is faster by it.
    Bounded, so that policies that are gone do not stay."""
    return replace(action, **changes)


def legal_actions(site: Site) -> frozenset[str]:
    """The kinds of actions that a site can do, by their words."""
    whole = {action.word: action for action in (cls() for cls in Action.members.values())}
    return frozenset(word for word, action in whole.items() if can(site, action))


def can(site: Site, action: Action) -> bool:
    """Whether the site can do this with some number of tokens."""
    return (action.of(1, 0) if isinstance(action, Selecting) else action).refused(site) is None


def skips(actions: Iterable[Action]) -> list[SkipBlocks]:
    """Those that skip blocks, each once."""
    return list(dict.fromkeys(a for a in actions if isinstance(a, SkipBlocks)))


def union(keeps: Iterable[Keep]) -> Keep:
    """What serves all of them.

    Raises:
        PolicyError: no history does.
    """
    return reduce(or_, keeps, Keep())
