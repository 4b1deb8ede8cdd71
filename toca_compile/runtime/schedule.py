"""Schedule: a plan laid out for one graph, before the first step: what each segment does in each step, with which host
numbers. It knows no tensors, so it can be made, kept and compared without a model.

It is linear in the steps: plans say the same object many times, so whatever follows from one is found by identity.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from toca_compile.ir.actions import Action, Compute, Keep
from toca_compile.ir.history import Numbers, Past
from toca_compile.ir.plan import Plan, StepPlan, scored_sites
from toca_compile.ir.program import Form, Program
from toca_compile.ir.state import Number, State
from toca_compile.ir.types import Site, StepKind

Row = tuple[Action, ...]


@dataclass(frozen=True)
class SegmentCall:
    """One segment in one step. ``variant`` numbers the forms, cheaper to look up than they are."""

    forms: tuple[Form, ...]
    variant: int


class Schedule:
    """What each step of a plan does in a graph.

    Args:
        start: the first step that the graph takes part in. Whatever the plan says, that one computes everything, and
            forecasts grow from it.

    Attributes:
        rows: of each step, what each site does as planned.
        unskipped: the same, if the step computes what it could skip.
        calls: of each step, what each segment does if nothing is skipped.
    """

    def __init__(self, program: Program, plan: Plan, start: int = 0) -> None:
        self.program, self.plan, self.start = program, plan, start
        self.keeps = _keeps(program.sites, plan)
        self._full = Compute()
        steps = list(plan.steps)
        if start:
            steps += [steps[-1]] * (start + 2 - len(steps) if plan.endless else 0)
            steps[start] = StepPlan(StepKind.FULL, (self._full,) * len(program.sites))
        # Rows that say the same are one object, and so is a row that skips nothing with its unskipped form.
        same: dict[tuple[int, ...], Row] = {}
        self.rows = [same.setdefault(tuple(map(id, step.sites)), tuple(step.sites)) for step in steps]
        whole = {id(row): self.computed(row) for row in same.values()}
        self.unskipped = [whole[id(row)] for row in self.rows]
        self._scored = scored_sites(replace(plan, steps=tuple(steps)), program.sites)
        self._pasts = list(self._histories())
        self._forms: dict[tuple[int, int, bool], Form] = {}
        self._variants: dict[tuple[Form, ...], SegmentCall] = {}
        self._calls: dict[tuple[int, ...], tuple[SegmentCall, ...]] = {}
        self.calls = [self._step(i) for i in range(len(self.rows))]
        self._numbers: tuple[int, dict[tuple[int, int, int], Numbers]] = (-1, {})

    @property
    def steps(self) -> int | None:
        """How many there are; None: any number."""
        return None if self.plan.endless else len(self.plan.steps)

    def number(self, step: int, site: Site, kind: Number, index: int) -> int:
        """A host number of a site in a step."""
        action = self.unskipped[step][site.index]
        if kind is Number.K:
            return action.computed(site)
        if kind is Number.STEP:
            return step
        if kind is Number.SITE:
            return site.index
        past = self._pasts[step][site.index]
        if kind is Number.SINCE:
            return past.since
        if self._numbers[0] != step:
            self._numbers = (step, {})
        keep = self.keeps[site.index]
        key = (id(action), id(past), id(keep))
        numbers = self._numbers[1].get(key)
        if numbers is None:
            numbers = self._numbers[1][key] = action.numbers(past, step, keep)
        return numbers[kind, index]

    def kept(self) -> list[tuple[State, int, Site]]:
        """The buffers of sites that live from step to step: what, which of several, and whose."""
        scored = set().union(*self._scored) if self._scored else set()
        found: list[tuple[State, int, Site]] = []
        for site, keep in zip(self.program.sites, self.keeps, strict=True):
            count = {State.SCORE: int(site.index in scored), State.STAMP: int(keep.stamp)}
            if keep.history is not None:
                count |= {State.OUTPUT: 1, State.HISTORY: len(keep.history.buffers(site.output.meta["val"]))}
            if keep.stale_inputs and site.row_proof is not None:
                count[State.STALE_INPUT] = len(site.row_proof.stale_inputs)
            if keep.keys and site.query_proof is not None:
                count[State.KEYS] = len(site.query_proof.dense_inputs)
            found += [(kind, i + (kind is State.HISTORY), site) for kind, n in count.items() for i in range(n)]
        return found

    def computed(self, row: Row) -> Row:
        """A row with nothing skipped; the same object where nothing was."""
        if not any(action.by_blocks for action in row):
            return row
        return tuple(self._full if action.by_blocks else action for action in row)

    def _step(self, index: int) -> tuple[SegmentCall, ...]:
        row, scored = self.unskipped[index], self._scored[index]
        forms = [
            self._form(site, action, site.index in scored) for site, action in zip(self.program.sites, row, strict=True)
        ]
        key = tuple(map(id, forms))
        if key not in self._calls:
            parts = (tuple(forms[i] for i in segment.sites) for segment in self.program.segments)
            self._calls[key] = tuple(map(self._call, parts))
        return self._calls[key]

    def _call(self, forms: tuple[Form, ...]) -> SegmentCall:
        return self._variants.setdefault(forms, SegmentCall(forms, len(self._variants)))

    def _form(self, site: Site, action: Action, scored: bool) -> Form:
        keep = self.keeps[site.index]
        key = (id(action), id(keep), scored)
        if key not in self._forms:
            self._forms[key] = Form.of(action, replace(keep, score=scored))
        return self._forms[key]

    def _histories(self) -> Iterator[tuple[Past, ...]]:
        """For each step, of each site: the steps before it that computed all."""
        kept = 1 + max((k.history.depth for k in self.keeps if k.history is not None), default=0)
        pasts: tuple[Past, ...] = (Past(),) * len(self.program.sites)
        for step, row in enumerate(self.rows):
            yield pasts
            if step >= self.start and any(action.dense for action in row):
                # Sites with one schedule share one past.
                new: dict[tuple[int, int], Past] = {}
                pasts = tuple(
                    _after(past, step, action, kept, new) if action.dense else past
                    for past, action in zip(pasts, row, strict=True)
                )


def _after(past: Past, step: int, action: Action, kept: int, known: dict[tuple[int, int], Past]) -> Past:
    key = (id(past), id(action))
    if key not in known:
        made = min(action.made, past.made + 1 if past.times else 0)  # fewer than planned where steps were missed
        known[key] = Past((*past.full, step)[-kept:], past.times + 1, made)
    return known[key]


def _keeps(sites: Sequence[Site], plan: Plan) -> list[Keep]:
    """What of each site lives from step to step, without what the site has none of; equal ones are one object."""
    known: dict[Keep, Keep] = {}
    found = []
    for site in sites:
        keep = plan.keep(site.index)
        keep = replace(
            keep,
            stale_inputs=keep.stale_inputs and site.row_proof is not None and bool(site.row_proof.stale_inputs),
            keys=keep.keys and site.query_proof is not None and bool(site.query_proof.dense_inputs),
        )
        found.append(known.setdefault(keep, keep))
    return found
