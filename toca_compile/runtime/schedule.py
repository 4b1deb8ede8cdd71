"""Schedule: a plan laid out for one graph, before the first step: what each segment does in each step, with which host
numbers. It knows no tensors, so it can be made, kept and compared without a model.

It is linear in the steps: plans say the same object many times, so whatever follows from one is found by identity.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from toca_compile.ir.actions import Action, Compute, Keep, SkipBlocks
from toca_compile.ir.graph import value_of
from toca_compile.ir.history import History, Numbers, Past
from toca_compile.ir.plan import Plan, StepPlan, scored_sites
from toca_compile.ir.program import BlockRange, Chain, Form, GraphPlan, Kind, Program, Segment, StandIn, Stream
from toca_compile.ir.state import Number, State
from toca_compile.ir.types import Site, StepKind

Row = tuple[Action, ...]


@dataclass(frozen=True, eq=False)
class SegmentCall:
    """One segment in one step: one object for all steps in which its sites have these forms. ``at``: its place among
    the schedule's segments, or that of its first part."""

    segment: Segment
    forms: tuple[Form, ...]
    at: int

    @property
    def variant(self) -> tuple[Kind, tuple[Form, ...]]:
        """What it is compiled as."""
        return self.segment.kind, self.forms


Calls = tuple[SegmentCall, ...]


class Schedule:
    """What each step of a plan does in a graph.

    Args:
        start: the first step that the graph takes part in. Whatever the plan says, that one computes everything, and
            forecasts grow from it.

    Attributes:
        rows: of each step, what each site does as planned.
        unskipped: the same, if the step computes what it could skip.
        segments: the program's, and those that stand in for the blocks that steps skip, in the order of the graph.
        skips: the places of those that a step leaves out which skips blocks; before them is the one that it runs
            instead, and no other step does.
        owners: whose buffers there are: the sites, and what leaves those blocks.
        keeps: what of each of them lives from step to step.
        calls: of each step, the segments that it runs as planned. Steps that run the same have one object.
        uncut: the same, if the step computes what it could skip.
        probe: what tells at run time whether a step skips what it may.
    """

    def __init__(self, program: Program, planned: GraphPlan, start: int = 0) -> None:
        self.program, self.planned, self.start = program, planned, start
        self.plan, self.range = planned.plan, planned.range
        plan, found = planned.plan, planned.range
        self.owners: tuple[Site | Stream, ...] = (*program.sites, *(found.owners if found is not None else ()))
        self.segments, self.skips = _with_stand_ins(program.segments, found, corrects=plan.skip.memory.corrects)
        kept = [i for i, s in enumerate(self.segments) if isinstance(s, StandIn) and s.does == "keep change"]
        self._left_out = frozenset((*self.skips, *kept))
        self.keeps = _keeps(program.sites, plan)
        if found is not None:
            self.keeps += [Keep(None if stream.measured else plan.skip.memory) for stream in found.owners]
        self._full, self._skip = Compute(), SkipBlocks()
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
        self._told: dict[int, tuple[frozenset[StepKind], dict[str, int]]] = {}
        self._forms: dict[tuple[int, int, bool], Form] = {}
        self._equal: dict[Form, Form] = {}
        self._made: dict[tuple[int, ...], SegmentCall] = {}
        self._calls: dict[Calls, Calls] = {}
        self._steps: dict[tuple[int, frozenset[int], bool], Calls] = {}
        self._joined: dict[int, Calls] = {}
        self.uncut = [self._step(i, skips=False) for i in range(len(self.rows))]
        self.calls = [
            calls if row is whole else self._step(i, skips=True)
            for i, (calls, row, whole) in enumerate(zip(self.uncut, self.rows, self.unskipped, strict=True))
        ]
        self.probe = None
        if found is not None and found.change is not None:
            form = self._form(found.change.index, self._full, scored=False)
            at = kept[0] if plan.skip.gate.behind else found.first
            self.probe = SegmentCall(found.segment("probe"), (form,), at)
        self._numbers: tuple[int, dict[tuple[int, int, int], Numbers]] = (-1, {})
        self._passed: list[Past] = []  # of the blocks that steps skip, by step
        self._moments: dict[int, Hashable] = {}

    @property
    def steps(self) -> int | None:
        """How many there are; None: any number."""
        return None if self.plan.endless else len(self.plan.steps)

    @property
    def kinds(self) -> dict[Kind, Segment]:
        """The first segment of each kind."""
        probe = [self.probe.segment] if self.probe is not None else []
        chains = [call.segment for calls in self._joined.values() for call in calls]
        return {segment.kind: segment for segment in (*chains, *reversed(self.segments), *probe)}

    def joined(self, calls: Calls) -> Calls:
        """The calls of a step as they are made: those of one that computes no branch are one."""
        if id(calls) not in self._joined:
            self._joined[id(calls)] = self._join(calls)
        return self._joined[id(calls)]

    def _join(self, calls: Calls) -> Calls:
        # What stands in front is computed less often; and before the probe a step stops, to decide what is next.
        first = sum(call.segment.constant or call.segment.timed for call in calls)
        first = max(first, self.until(calls, self.probe.at) if self.probe is not None else 0)
        own = calls[first:]
        # Where tokens are selected, some blocks may have none left to compute: each is compiled on its own, so that
        # other ratios compile nothing.
        selects = any(keep.stamp for keep in self.keeps)
        if len(own) < 2 or selects or any(self._computes_a_branch(call) for call in own):
            return calls
        parts = [call.segment for call in own]
        leads = self._leads([i for part in parts for i in part.sites])
        read = set(self.program.module.graph.output_node().all_input_nodes)
        chain = Chain.of(parts, [call.at for call in own], leads, read)
        return (*calls[:first], SegmentCall(chain, tuple(form for call in own for form in call.forms), own[0].at))

    @staticmethod
    def until(calls: Calls, at: int) -> int:
        """How many calls of a step stand before a place among the segments."""
        return sum(call.at < at for call in calls)

    def _computes_a_branch(self, call: SegmentCall) -> bool:
        if isinstance(call.segment, StandIn):
            return call.segment.does != "skip"
        sites = [self.program.sites[i] for i in call.segment.sites]
        return any(
            form.action.dense or form.action.proof(site) is not None
            for site, form in zip(sites, call.forms, strict=True)
        )

    def _leads(self, owners: Sequence[int]) -> list[int]:
        """For each of them, by position, the first whose numbers are the same in all steps."""
        first: dict[Hashable, int] = {}
        return [first.setdefault(self._alike[i], position) for position, i in enumerate(owners)]

    @cached_property
    def _alike(self) -> list[Hashable]:
        """What is equal for owners whose numbers are the same in all steps: what they do, and when they were
        computed."""
        told: dict[tuple[int, int], tuple[Row, tuple[Past, ...]]] = {}
        for row, pasts in zip(self.unskipped, self._pasts, strict=True):
            told.setdefault((id(row), id(pasts)), (row, pasts))
        sites = [
            (id(self.keeps[i]), *((id(row[i]), id(pasts[i])) for row, pasts in told.values()))
            for i in range(len(self.program.sites))
        ]
        return [*sites, *((i,) for i in range(len(sites), len(self.owners)))]

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

    def past(self, step: int, of: Site | Stream) -> Past:
        """The steps before one that computed all of a site, or of the blocks that others skip; as far as that is
        planned."""
        if isinstance(of, Site):
            return self._pasts[min(step, len(self._pasts) - 1)][of.index]
        while len(self._passed) <= step:
            at, past = len(self._passed), self._passed[-1] if self._passed else Past()
            if at and self.calls[min(at - 1, len(self.calls) - 1)] is self.uncut[min(at - 1, len(self.calls) - 1)]:
                past = self.plan.skip.after(past, at - 1)
            self._passed.append(past)
        return self._passed[step]

    def moment(self, step: int) -> Hashable:
        """What steps must have in common, of this plan or of another for the same graph, to be computed as one batch:
        the variants and the host numbers, but for what tells where in its run a step is, and for those of what leaves
        skipped blocks of which each sample has its own (``passed``). The stamps and rings of a sample are then
        to be taken over into another's count (``since``, ``History.turned``)."""
        index = min(step, len(self.rows) - 1)
        if index not in self._moments or self.plan.endless:
            row = self.unskipped[index]
            numbers: list[Hashable] = []
            for site, action in zip(self.program.sites, row, strict=True):
                keep, past = self.keeps[site.index], self.past(index, site)
                if keep.history is not None:
                    told = action.numbers(_turned(keep.history, past), index, keep)
                    numbers.append(tuple(told.items()))
                if keep.stamp:
                    counted = index if self.plan.selector.counts_steps else None
                    numbers.append((action.computed(site), index - past.since, counted))
            if self.range is not None:
                apart, told = self.plan.skip.memory.by_value, self.passed(step, 0)
                numbers.append(tuple((name, number) for name, number in told.items() if name[0] not in apart))
            variants = tuple(call.variant for call in self.joined(self.calls[index]))
            self._moments[index] = (self.plan.selector, variants, tuple(numbers))
        return self._moments[index]

    def passed(self, step: int, turned: int) -> Numbers:
        """The host numbers of what leaves skipped blocks, if its ring is turned so far."""
        assert self.range is not None
        memory, past = self.plan.skip.memory, self.past(step, self.range.owners[0])
        return memory.numbers(_turned(memory, past, turned), step, past.made)

    def kept(self) -> list[tuple[State, int, Site | Stream]]:
        """The buffers that live from step to step: what, which of several, and whose."""
        scored = set().union(*self._scored) if self._scored else set()
        found: list[tuple[State, int, Site | Stream]] = []
        for owner, keep in zip(self.owners, self.keeps, strict=True):
            count = {State.SCORE: self._measured(owner.index) if owner.index in scored else 0}
            count[State.STAMP] = int(keep.stamp)
            if keep.history is not None:
                count |= {State.OUTPUT: 1, State.HISTORY: len(keep.history.buffers(value_of(owner.output)))}
            elif isinstance(owner, Stream):
                count[State.CHANGE] = len(owner.measured)
            if isinstance(owner, Site) and keep.stale_inputs and owner.row_proof is not None:
                count[State.STALE_INPUT] = len(owner.row_proof.stale_inputs)
            if isinstance(owner, Site) and keep.keys and owner.query_proof is not None:
                count[State.KEYS] = len(owner.query_proof.dense_inputs)
            found += [(kind, i + (kind is State.HISTORY), owner) for kind, n in count.items() for i in range(n)]
        return found

    def computed(self, row: Row) -> Row:
        """A row with nothing skipped; the same object where nothing was."""
        if not any(action.by_blocks for action in row):
            return row
        return tuple(self._full if action.by_blocks else action for action in row)

    def told(self, row: Row) -> tuple[frozenset[StepKind], dict[str, int]]:
        """Of one of its rows, for the record of a step: the kinds of steps that the sites do, and how many tokens each
        computes, by its name."""
        if id(row) not in self._told:
            k = {site.name: action.computed(site) for site, action in zip(self.program.sites, row, strict=True)}
            self._told[id(row)] = frozenset(action.kind for action in row), k
        return self._told[id(row)]

    def _step(self, index: int, *, skips: bool) -> Calls:
        row, scored = self.unskipped[index], frozenset(self._scored[index])
        asked = (id(row), scored, skips)
        if asked not in self._steps:
            forms = [self._form(i, action, scored=i in scored) for i, action in enumerate(row)]
            does = self._skip if skips else self._full
            forms += [self._form(i, does, scored=False) for i in range(len(forms), len(self.owners))]
            stand_in = self.skips.start - 1
            calls = tuple(
                self._call(segment, tuple(forms[i] for i in segment.sites), at)
                for at, segment in enumerate(self.segments)
                if (at not in self._left_out if skips else at != stand_in)
            )
            self._steps[asked] = self._calls.setdefault(calls, calls)
        return self._steps[asked]

    def _call(self, segment: Segment, forms: tuple[Form, ...], at: int) -> SegmentCall:
        key = (at, *map(id, forms))
        if key not in self._made:
            self._made[key] = SegmentCall(segment, forms, at)
        return self._made[key]

    def _form(self, owner: int, action: Action, *, scored: bool) -> Form:
        keep = self.keeps[owner]
        key = (id(action), id(keep), scored)
        if key not in self._forms:
            form = Form.of(action, replace(keep, score=self._measured(owner) if scored else 0))
            self._forms[key] = self._equal.setdefault(form, form)
        return self._forms[key]

    def _measured(self, site: int) -> int:
        """How many buffers hold what is measured of a site to select tokens by."""
        assert self.program.types is not None
        return len(self.plan.selector.measured(self.program.sites[site], self.program.types))

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


def _with_stand_ins(
    segments: tuple[Segment, ...], found: BlockRange | None, *, corrects: bool
) -> tuple[tuple[Segment, ...], range]:
    """The segments with those that stand in for a range, and the places of those that are left out with it."""
    if found is None:
        return segments, range(0)
    before = {found.first: [found.segment("skip")], found.last: [found.segment("keep", corrects=corrects)]}
    if found.probe is not None:
        before.setdefault(found.probe.kept, []).append(found.segment("keep change"))
    ordered: list[Segment] = []
    for i in range(len(segments) + 1):
        ordered += [*before.get(i, ()), *segments[i : i + 1]]
    inside = found.last - found.first + sum(map(len, (v for i, v in before.items() if i <= found.last))) - 1
    return tuple(ordered), range(found.first + 1, found.first + 1 + inside)


def _after(past: Past, step: int, action: Action, kept: int, known: dict[tuple[int, int], Past]) -> Past:
    key = (id(past), id(action))
    if key not in known:
        made = min(action.made, past.made + 1 if past.times else 0)  # fewer than planned where steps were missed
        known[key] = Past((*past.full, step)[-kept:], past.times + 1, made)
    return known[key]


def _turned(history: History, past: Past, by: int = 0) -> Past:
    """A past of which numbers say that the history's ring has turned so far, whatever it has."""
    return past._replace(times=past.times - history.turned(past)[0] + by)


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
