"""Executor: runs one captured graph, segment by segment, each in the variant that the plan names for the step.

All decisions are made when the plan is laid out; a call only looks them up. A call of a block costs one dictionary
look-up and one list of arguments on top of the compiled variant.
"""

import logging
import operator
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx

from toca_compile.errors import UnsupportedGraphError
from toca_compile.ir.actions import Keep
from toca_compile.ir.graph import ancestors, viewed
from toca_compile.ir.history import Numbers, Past
from toca_compile.ir.plan import Plan
from toca_compile.ir.program import Chain, Form, GraphPlan, Kind, Program, Segment, StandIn, Stream, Use, Variant
from toca_compile.ir.selectors import TokenSelector
from toca_compile.ir.state import Number, Slot, State
from toca_compile.ir.types import Site
from toca_compile.progress import working
from toca_compile.runtime.cache_state import allocate, bytes_of, like_buffer, owner
from toca_compile.runtime.carry_over import carry_over
from toca_compile.runtime.conditioning import Conditioning, Table
from toca_compile.runtime.graphs import Fixed, Graphs, Work, without
from toca_compile.runtime.peers import Peers, about
from toca_compile.runtime.schedule import Calls, Row, Schedule, SegmentCall
from toca_compile.runtime.step_control import Run, RunConstants, StepControl, Unexpected

log = logging.getLogger(__name__)

Graph = tuple[Callable[..., Sequence[Any]], tuple[int, ...], tuple[Slot, ...]]
NumberOf = Callable[[Stream, Number, int], torch.Tensor]  # of what leaves skipped blocks, for each sample
_Variant = tuple[Kind, tuple[Form, ...]]  # the kind of segment, and what its sites do

FOLLOWED = 8  # plans that stay laid out: pipelines of several lengths may take turns


class Variants(Protocol):
    """Where an executor's graphs come from (``compiler/variants.py``). ``checked``: seconds for each variant that was
    held against its plain meaning; ``uses``: what those that are compiled do with their buffers; ``by_sample``: the
    shape of numbers that each sample has its own of."""

    by_sample: Callable[[Stream], tuple[int, ...] | None] | None
    checked: dict[Any, float]
    uses: dict[_Variant, dict[Slot, Use]]

    def build(self, segment: Segment, forms: tuple[Form, ...], plan: Plan) -> Variant:
        """A segment's variant, verified."""
        ...

    def lowered(self, lower: Any, *, dense: bool, numbers: torch.device | None) -> "Variants":
        """The same, lowered another way."""
        ...

    def compiled(self, segment: Segment, forms: tuple[Form, ...], plan: Plan) -> Graph:
        """A segment's variant, built, verified and lowered."""
        ...

    def told_apart(self, slot: Slot, of: Site | Stream, keep: Keep) -> tuple[int, ...] | None:
        """The shape of a number that each sample has its own of; None where it is none."""
        ...


class WholeStep(Protocol):
    """Whole steps of a plan as one callable (``compiler/step_program.py``). ``kept``: whose its buffers are."""

    @property
    def kept(self) -> Sequence[tuple[State, int, int]]: ...

    def begin(self, caches: Sequence[torch.Tensor], step: int, past: Past) -> dict[str, torch.Tensor]:
        """All buffers of a run that is about to do a step."""
        ...

    def __call__(self, state: dict[str, torch.Tensor], inputs: Sequence[Any], index: int) -> Sequence[Any]:
        """A step: the graph's results that are computed."""
        ...

    def computed(self, state: dict[str, torch.Tensor], past: Past) -> bool:
        """Whether the last step computed what it could skip."""
        ...


class Flat(Protocol):
    """What takes wrappers among a graph's inputs apart (``compiler/wrappers.py``)."""

    def __call__(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The plain tensors of a call."""
        ...

    def parameter(self, values: Sequence[Any]) -> Any:
        """The first of the model's parameters, as the model has it."""
        ...


@dataclass(frozen=True, slots=True)
class _BoundCall:
    """A variant with its arguments in one run: where values lie, the buffers, and where which numbers go among them:
    those of sites, and those of what leaves skipped blocks. ``apart``: those of the latter that each sample has its
    own of. ``held``: those that lie in memory. ``free``: which values nothing later needs."""

    call: Callable[..., Sequence[Any]]
    values: tuple[int, ...]
    buffers: tuple[torch.Tensor | None, ...]
    numbers: tuple[tuple[int, Site, Number, int], ...]
    moves: tuple[tuple[int, tuple[Number, int]], ...]
    apart: tuple[tuple[int, Stream, Number, int], ...]
    held: tuple[tuple[Hashable, Site | Stream, Number, int], ...]
    results: tuple[int, ...]
    free: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _BoundCalls:
    """Those of a step, and the places that they read of what follows from the time. Of those behind the
    front, ``reads``: the places that they read and do not make, but for constants; ``makes``: those that they make and
    the graph hands out."""

    calls: list[_BoundCall]
    timed: frozenset[int]
    reads: tuple[int, ...]
    makes: tuple[int, ...]


@dataclass(frozen=True)
class _Followed:
    """A plan as one graph follows it.

    Attributes:
        free: after each of its segments, which values nothing later needs.
        ready: the variants that are compiled.
        like: fake tensors like the buffers, made when a run first asks for them.
        inputs: those of the graph that a step takes, if what stands in front was made before; by its calls.
    """

    schedule: Schedule
    free: list[tuple[int, ...]]
    ready: dict[_Variant, Graph]
    like: dict[tuple[State, int, int], torch.Tensor] = field(default_factory=dict)
    inputs: dict[int, tuple[int, ...]] = field(default_factory=dict)


class Executor:
    """A captured graph with a plan. Called with the graph's inputs; returns its outputs.

    Args:
        program: the graph after all passes.
        planned: what each site does at each step.
        control: says which step a call is.
        variants: where the graphs come from.
        number: of this graph in its model.
        flat: takes wrappers (quantised weights) among the inputs apart into the tensors that the program has for them.

    Attributes:
        graphs: the steps as CUDA graphs, set before the first call. Numbers other than K are then tensors for the
            variants.
        whole: makes one callable of all steps of a plan, in the place of one for each variant.
        peers: the processes that share the graph's work, which are to do the same.
        names: of the inputs, as the model's caller knows them.
        given: which of the inputs of a call are none of the model's own.
    """

    def __init__(
        self,
        program: Program,
        planned: GraphPlan,
        control: StepControl,
        variants: Variants,
        number: int,
        flat: Flat | None = None,
    ) -> None:
        self.program, self.control, self.variants = program, control, variants
        self.number = number
        self.graphs: Graphs | None = None
        self.whole: Callable[[Executor, Schedule], WholeStep] | None = None
        self.peers: Peers | None = None
        self.names: tuple[str, ...] = ()
        self.given = frozenset[int]()
        self._flat = flat
        self._apart: NumberOf | None = None
        self._state = next((i for i, fixed in enumerate(program.static_inputs) if fixed), None)
        graph = program.module.graph
        self._place: dict[fx.Node, int] = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
        self._inputs = len(self._place)
        self._clock = [self._place[n] for n in program.clock]
        # Segments that are constant during a run stand first; these are the inputs on which they depend.
        self._constant = sum(s.constant for s in program.segments)
        self._varying = [self._place[n] for n in program.varying]
        read = {n for s in program.segments[: self._constant] for n in s.inputs}
        self._watched = sorted(self._place[n] for n in read if n in self._place)
        # Behind them those that follow from the time.
        self._front = self._constant + sum(s.timed for s in program.segments)
        made = [n for s in program.segments[self._constant : self._front] for n in s.outputs]
        given = sorted(self._place[n] for n in ancestors(made) if n in self._place)
        labels = [i for i in given if i in self._varying and i not in self._clock]
        weights = [i for i in given if i not in self._varying]
        self._conditioning = Conditioning(self._clock, labels, weights, bytes_of(n.meta["val"] for n in made))
        # What a step takes of its inputs, whatever it computes: by these the call is judged.
        always = {*self._varying, *self._clock, *self._watched, *labels, *weights[:1]}
        handed_out = {self._place[n] for n in graph.output_node().all_input_nodes if n in self._place}
        self._always = always | handed_out | ({self._state} if self._state is not None else set())
        held = [n for n in graph.nodes if n.op == "get_attr"]
        self._constants = [(n, operator.attrgetter(str(n.target))(program.module)) for n in held]
        for segment in program.segments:
            for node in segment.outputs:
                self._place.setdefault(node, len(self._place))
        self._timed = {self._place[n] for s in program.segments[self._constant : self._front] for n in s.outputs}
        for node, _ in self._constants:
            self._place[node] = len(self._place)
        # The values of a step beside the inputs, before anything is computed.
        self._unset = [None] * (len(self._place) - self._inputs - len(self._constants))
        self._unset += [constant for _, constant in self._constants]
        self._output = graph.output_node().args[0]
        # What a step may take from a cache or a table, and hands out: the caller may write to it.
        kept = {n for site in program.sites for n in (*site.region, site.add)}
        kept |= {n for s in program.segments[: self._front] for n in s.outputs}
        self._copied = frozenset(n for n in graph.output_node().all_input_nodes if viewed(n) in kept)
        self._shared: dict[TokenSelector, dict[_Variant, Graph]] = {}
        self._last: tuple[weakref.ref[Run], tuple[int, ...], int, Schedule] | None = None
        self._followed: list[_Followed] = []
        self.set_plan(planned)

    def set_plan(self, planned: GraphPlan) -> None:
        """Follow another plan in runs that begin; one that was followed before is laid out already."""
        known = next((f for f in self._followed if f.schedule.plan is planned.plan), None)
        if known is None:
            schedule = Schedule(self.program, planned)
            # Variants know selector and memories, not the plan: plans that share those share them.
            ready = self._shared.setdefault(planned.plan.selector, {})
            known = _Followed(schedule, self._last_uses(schedule), ready)
            self._followed = [*self._followed[1 - FOLLOWED :], known]
        self._now = known

    def set_variants(self, variants: Variants) -> None:
        """Take the graphs from elsewhere in runs that begin."""
        planned = self._now.schedule.planned
        self.variants, self._shared, self._followed = variants, {}, []
        self.set_plan(planned)

    @property
    def plan(self) -> Plan:
        """The plan that is followed."""
        return self._now.schedule.plan

    @property
    def schedule(self) -> Schedule:
        """The plan, laid out."""
        return self._now.schedule

    @property
    def ready(self) -> dict[_Variant, Graph]:
        """The variants compiled so far for plans that rank tokens alike."""
        return self._now.ready

    def __call__(self, *inputs: Any) -> Any:
        return self.call(inputs)

    def call(self, inputs: Sequence[Any], *, some: bool = False) -> Any:
        """As ``__call__``. ``some``: only those of the inputs are there that ``reads`` names; the others are None.

        Raises:
            Unexpected: with ``some``, where the step turns out to need more; then nothing was done.
        """
        instance = id(self.parameter(inputs))
        inputs = inputs if self._flat is None else self._flat(inputs)
        with self.control.lock:
            seen = {i: inputs[i] for i in self._varying}
            clock = [inputs[i] for i in self._clock]
            run, key = self.control.enter_graph(self.number, instance, self.schedule.steps, seen, clock)
            self.control.expected(self.is_cached(run, key))
            try:
                if self.peers is not None and key not in run.last:
                    self.peers.begin(about(self.program, self.schedule.planned, inputs, self.names))
                with nullcontext() if self.graphs is None else self.graphs.capture.turn():
                    results = self._execute(inputs, run, key, some)
                    if self.program.written:
                        results = self._write(inputs, results)
            except Unexpected:
                raise
            except BaseException as error:
                self.control.void()
                lost = self.peers.failed(error, run.step) if self.peers is not None else None
                if lost is not None:
                    raise lost from error
                raise
            self.control.leave_graph(run, key, [tuple(r.shape) for r in results if isinstance(r, torch.Tensor)])
        return results

    def _write(self, inputs: Sequence[Any], results: Sequence[Any]) -> Sequence[Any]:
        """Change the inputs that the graph changes in place; the results without what they become.

        Raises:
            UnsupportedGraphError: another input has come to share memory with one of them.
        """
        written, own = self.program.written, len(results) - len(self.program.written)
        storages = [x.untyped_storage()._cdata for x in inputs if isinstance(x, torch.Tensor) and x.numel()]
        for i, value in zip(written, results[own:], strict=True):
            if storages.count(inputs[i].untyped_storage()._cdata) > 1:
                raise UnsupportedGraphError(
                    "the model changes one of its inputs in place, and another shares its memory: clone it in forward"
                )
            inputs[i].copy_(value)
        return results[:own]

    def is_cached(self, run: Run, key: tuple[int, ...] | None = None) -> bool:
        """Whether the graph's next step in a run takes some branch from a cache, whatever is met on the way."""
        keys = [k for k in run.schedules if k[0] == self.number] if key is None else [key]
        schedule = run.schedules.get(keys[0]) if len(keys) == 1 else None
        if schedule is None or schedule.plan is not self.plan or schedule.probe is not None:
            return False
        if run.last[keys[0]] != run.step - 1:
            return False
        row = schedule.rows[min(run.step, len(schedule.rows) - 1)]
        return not all(action.dense for action in row)

    def reads(self, run: Run) -> Sequence[int] | None:
        """The inputs that the graph's next step in a run reads, which takes from caches what it can; None where it may
        be any."""
        if self.whole is not None or self._flat is not None or self.program.written:
            return None
        (key,) = (k for k in run.schedules if k[0] == self.number)
        schedule = run.schedules[key]
        if schedule is not self._now.schedule:
            return None
        return self._now.inputs.get(id(schedule.calls[min(run.step, len(schedule.rows) - 1)]))

    def parameter(self, inputs: Sequence[Any]) -> Any:
        """The first of the model's parameters among a call's inputs."""
        if self._flat is not None:
            return self._flat.parameter(inputs)
        return inputs[self._state] if self._state is not None else None

    def fresh_tokens(self) -> dict[str, torch.Tensor]:
        """For each site, which tokens the last step computed: bool ``[batch, tokens]`` by site name."""
        run = self._last[0]() if self._last is not None else None
        if run is None or self._last is None:
            return {}
        _, key, index, schedule = self._last
        fresh = {}
        skipped = run.record is not None and run.record.skipped(key)
        row = (schedule.rows if skipped else schedule.unskipped)[index]
        for site, action in zip(self.program.sites, row, strict=True):
            shape = like_buffer(
                State.STAMP, 0, site, schedule.keeps[site.index], self.program, schedule.plan.selector
            ).shape
            stamp = run.buffers.get((*key, State.STAMP, site.index, 0))
            if action.proof(site) is not None and stamp is not None:
                fresh[site.name] = stamp == index
            else:
                fresh[site.name] = torch.full(shape, action.dense)
        return fresh

    def compile_plan(self) -> int:
        """Compile all variants of the plan that are not compiled yet, instead of each when a step first meets it.

        Returns:
            How many were compiled.
        """
        now = self._now
        if self.whole is not None:
            self.whole(self, now.schedule)
            return 0
        pending = [call for variant, call in _planned(now.schedule).items() if variant not in now.ready]
        for i, call in enumerate(pending, 1):
            self._graph(call, now, f"{i} of {len(pending)}")
        return len(pending)

    def planned_bytes(self) -> int:
        """Bytes that a run under the plan keeps from step to step."""
        schedule, selector = self.schedule, self.plan.selector
        buffers = [
            like_buffer(kind, index, of, schedule.keeps[of.index], self.program, selector)
            for kind, index, of in schedule.kept()
        ]
        return bytes_of(buffers) + self._constant_bytes()

    def _constant_bytes(self) -> int:
        front, rest = self.program.segments[: self._constant], self.program.segments[self._constant :]
        read = {n for s in rest for n in s.inputs}
        return bytes_of(n.meta["val"] for s in front for n in s.outputs if n in read)

    def _execute(self, inputs: Sequence[Any], run: Run, key: tuple[int, ...], some: bool = False) -> Any:
        now = self._now
        if run.step and len(now.schedule.rows) > 1:
            now = self._going_on(now, run, key)
        schedule = now.schedule
        index = min(run.step, len(schedule.rows) - 1)
        past = run.computed.get(key, Past())
        if self.whole is not None:
            self._enter(run, key, schedule, index)
            return self._as_one(self.whole(self, schedule), inputs, run, key, past)
        # What leaves skipped blocks has a past of its own, which a test at run time may decide.
        moves = schedule.plan.skip.memory.numbers(past, run.step, past.made) if schedule.range is not None else {}
        if schedule.probe is not None:
            moves = moves | schedule.plan.skip.gate.numbers(run.step, len(schedule.rows))
        fixed = self._fixed(run, key)
        step = _Step(schedule, index, moves, [*inputs, *self._unset], fixed, self._apart)
        calls, uncut, done = schedule.calls[index], schedule.uncut[index], 0
        bound = self._bound(calls, now, run, key)
        if some and not (self._restored(inputs, step.values, run, key) and self._conditioned(step, bound, run, key)):
            raise Unexpected
        self._enter(run, key, schedule, index)
        if not some:
            if not self._restored(inputs, step.values, run, key):
                step.run(bound.calls[: self._constant])
                self._keep(inputs, step.values, run, key)
            full = all(action.dense for action in schedule.unskipped[index])
            self._condition(step, bound, (run, key), full=full and calls is uncut)
        done = self._front
        if schedule.probe is not None and calls is not uncut:
            ahead = schedule.joined(calls)
            stop = schedule.until(ahead, schedule.skips.start - 1)
            step.run(bound.calls[done:stop])
            done, skips = stop, schedule.plan.skip.may(past, run.step)
            if skips is None:
                entered, stop = list(step.values), schedule.until(ahead, schedule.probe.at)
                step.run(bound.calls[done:stop])
                skips = self._skips(step, past, now, run, key)
                if skips:
                    done = stop
                else:  # blocks that were computed from a forecast are none of the step
                    step.values[:] = entered
            if not skips:
                calls = uncut
                bound = self._bound(calls, now, run, key)
                self._condition(step, bound, (run, key), full=full)
                self._record(run, key, schedule, schedule.unskipped[index])
        kept = self._kept_storages(step, run) if self.program.fragment else frozenset[int]()
        if self.graphs is not None and fixed is not None and self._is_planned(schedule):
            self._replay(step, bound, calls, self.graphs, fixed)
        else:
            step.run(bound.calls[done:])
        if schedule.range is not None and calls is uncut:
            run.drift[key] = 0.0
            run.computed[key] = schedule.plan.skip.after(past, run.step)

        def result(node: fx.Node) -> Any:
            value = _as_traced(node, step.values[self._place[node]])
            return value.clone() if node in self._copied and isinstance(value, torch.Tensor) else _unkept(value, kept)

        return fx.node.map_arg(self._output, result)

    def _enter(self, run: Run, key: tuple[int, ...], schedule: Schedule, index: int) -> None:
        """A step begins."""
        run.last[key], run.schedules[key] = run.step, schedule
        self._last = (weakref.ref(run), key, index, schedule)
        self._record(run, key, schedule, schedule.rows[index])

    def _as_one(self, program: WholeStep, inputs: Sequence[Any], run: Run, key: tuple[int, ...], past: Past) -> Any:
        """A step as one call."""
        schedule = run.schedules[key]
        index = min(run.step, len(schedule.rows) - 1)
        known = run.bound.setdefault(key, {})
        if program not in known:
            owners, selector = schedule.owners, schedule.plan.selector
            likes = [
                like_buffer(kind, i, owners[of], schedule.keeps[of], self.program, selector)
                for kind, of, i in program.kept
            ]
            caches = [
                allocate(run.buffers, (*key, *whose), like) for whose, like in zip(program.kept, likes, strict=True)
            ]
            known[program] = program.begin(caches, run.step, past)
        made = iter(program(known[program], inputs, index))
        if schedule.range is not None:
            can_skip = schedule.calls[index] is not schedule.uncut[index]
            if not can_skip or (schedule.probe is not None and program.computed(known[program], past)):
                run.computed[key] = schedule.plan.skip.after(past, run.step)
                if can_skip:
                    self._record(run, key, schedule, schedule.unskipped[index])
        return fx.node.map_arg(self._output, lambda n: _as_traced(n, next(made)))

    def _fixed(self, run: Run, key: tuple[int, ...]) -> Fixed | None:
        """The memory of a run for graphs; None without them."""
        if self.graphs is None:
            return None
        return self.graphs.fixed(run, key, self.control.fixed.setdefault(key, []))

    def _is_planned(self, schedule: Schedule) -> bool:
        """Whether a graph can hold the steps of a plan."""
        why = None
        if schedule.probe is not None:
            why = "the policy decides at each step, by a threshold, whether blocks are computed"
        elif schedule.plan.cache_devices:
            why = f"what is kept lies on {', '.join(sorted(schedule.plan.cache_devices))}, from where steps copy it"
        if why is not None and self.graphs is not None and not self.graphs.refused:
            self.graphs.warn(without(why))
        return why is None

    def _replay(self, step: "_Step", bound: "_BoundCalls", calls: Calls, graphs: Graphs, fixed: Fixed) -> None:
        """What stands behind the front, as a graph."""
        own = bound.calls[self._front :]
        known = fixed.steps.setdefault(step.schedule, {})
        told = known.get((step.index, id(calls)))
        if told is None or step.moves:
            number = step.schedule.number
            tokens = tuple(number(step.index, site, kind, i) for call in own for _, site, kind, i in call.numbers)
            told = known[step.index, id(calls)] = tokens, step.packed(own, fixed)
        tokens, numbers = told
        fixed.numbers.write(numbers)
        work = Work(bound.reads, bound.makes, lambda values: replace(step, values=values).make(own))
        graphs.run(fixed, step.schedule, (id(calls), tokens), step.values, work)

    def _kept_storages(self, step: "_Step", run: Run) -> frozenset[int]:
        """Where what is kept for steps to come lies in memory: what stands behind a fragment may change in place what
        it is given."""
        kept = (*run.buffers.values(), *step.values[self._inputs :])
        return frozenset(x.untyped_storage()._cdata for x in kept if isinstance(x, torch.Tensor))

    def _condition(self, step: "_Step", bound: "_BoundCalls", of: tuple[Run, tuple[int, ...]], *, full: bool) -> None:
        """Put what follows from the time where the step reads it."""
        if bound.timed:
            parts = bound.calls[self._constant : self._front]
            tables, times = self._tables(step, *of), self.control.times
            self._conditioning.fill(step.values, parts, bound.timed, tables, full=full, times=times)

    def _conditioned(self, step: "_Step", bound: "_BoundCalls", run: Run, key: tuple[int, ...]) -> bool:
        """As ``_condition``, where it was made before; whether it was."""
        if not bound.timed:
            return True
        return self._conditioning.find(step.values, bound.timed, self._tables(step, run, key), self.control.times)

    def _tables(self, step: "_Step", run: Run, key: tuple[int, ...]) -> list[Table]:
        # Between two runs weights may change where the host does not look: what was made with them goes with a run.
        kept = self.control.tables if self._conditioning.sees_weights(step.values) else run.tables
        return kept.setdefault(key, [])

    def _skips(self, step: "_Step", past: Past, now: _Followed, run: Run, key: tuple[int, ...]) -> bool:
        """Whether a step skips the blocks that its plan lets it skip."""
        skip, probe = now.schedule.plan.skip, now.schedule.probe
        assert probe is not None
        (measured,) = step.run([self._bind(probe, now, run, key)])
        judged = skip.judged(measured, run.drift.get(key, 0.0), run.step, len(now.schedule.rows))
        run.drift[key] = judged.added
        if judged.share is not None:
            step.moves.update(skip.memory.steered(past, judged.share))
        return judged.skips

    def _going_on(self, now: _Followed, run: Run, key: tuple[int, ...]) -> _Followed:
        """The plan as a step follows it that is not the run's first: it goes with what the graph has of the step
        before, or with what another graph hands over, or computes everything."""
        schedule, before = now.schedule, run.schedules.get(key)
        if before is not None and run.last[key] == run.step - 1 and before.plan is schedule.plan:
            return now if before is schedule else replace(now, schedule=before, inputs={})
        carried = carry_over(run, key, schedule)
        if carried is not None:
            return replace(now, schedule=carried, inputs={})
        if before is not None:
            # It did not run in the step before (another model shares the run, or a branch of the model was skipped),
            # or by another plan, so its caches are not what the plan thinks.
            log.warning("a graph of the model missed step %d; it computes all of step %d", run.step - 1, run.step)
        else:
            log.info("another graph of the model goes on with the run: it computes all of step %d", run.step)
        run.forget(key)
        start = run.step if schedule.plan.endless else min(run.step, len(schedule.rows) - 1)
        return replace(now, schedule=Schedule(self.program, schedule.planned, start), inputs={})

    def _restored(self, inputs: Sequence[Any], values: list[Any], run: Run, key: tuple[int, ...]) -> bool:
        """Put back what the constant segments computed before from the same inputs; whether there is nothing else to
        compute of them."""
        if not self._constant:
            return True
        kept = run.kept.get(key)
        if kept is None or not kept.holds([inputs[i] for i in self._watched]):
            return False
        for place, value in kept.values.items():
            values[place] = value
        return True

    def _keep(self, inputs: Sequence[Any], values: Sequence[Any], run: Run, key: tuple[int, ...]) -> None:
        places = (self._place[n] for s in self.program.segments[: self._constant] for n in s.outputs)
        later = {p: values[p] for p in places if values[p] is not None}
        run.kept[key] = RunConstants.of([inputs[i] for i in self._watched], later)

    def _record(self, run: Run, key: tuple[int, ...], schedule: Schedule, row: Row) -> None:
        """What this step does, for the user to read."""
        self.control.record(run).note(key, *schedule.told(row))

    def _graph(self, call: SegmentCall, now: _Followed, place: str = "") -> Graph:
        """The variant of a call, compiled if it was not. ``place``: which of how many that is."""
        ready = now.ready.get(call.variant)
        if ready is None:
            if not place:
                planned = _planned(now.schedule)
                place = f"{sum(v in now.ready for v in planned) + 1} of {len(planned)}"
            segment, forms = call.segment, call.forms
            names = [now.schedule.owners[i].name for i in segment.sites]
            does = ", ".join(f"{name} {form.action}" for name, form in zip(names, forms, strict=True))
            what = f"compiling variant {place}: {does or 'what stands between the blocks'}"
            if isinstance(segment, Chain):
                does = ", ".join(dict.fromkeys(str(form.action) for form in forms))
                what = f"compiling variant {place}: {len(segment.parts)} segments as one, {does}"
            parts = segment.parts if isinstance(segment, Chain) else (segment,)
            for part in parts:
                if isinstance(part, StandIn):
                    what = f"compiling what stands in for skipped blocks: {part.does}"
            with nullcontext() if segment.timed else working(what):
                ready = self.variants.compiled(segment, forms, now.schedule.plan)
            now.ready[call.variant] = ready
        return ready

    def _bound(self, calls: Calls, now: _Followed, run: Run, key: tuple[int, ...]) -> "_BoundCalls":
        """The variants of a step with this run's buffers."""
        known = run.bound.setdefault(key, {})
        if id(calls) not in known:
            bound = [self._bind(call, now, run, key) for call in now.schedule.joined(calls)]
            probe = now.schedule.probe
            read = [self._bind(probe, now, run, key)] if self._timed and probe is not None else []
            read += bound[self._front :]
            timed = frozenset(p for b in read for p in b.values if p in self._timed)
            reads, makes = self._around(bound[self._front :])
            inputs = {*self._always, *(place for place in reads if place < self._inputs)}
            now.inputs[id(calls)] = tuple(sorted(inputs))
            known[id(calls)] = _BoundCalls(bound, timed, reads, makes)
        return known[id(calls)]

    def _around(self, calls: Sequence[_BoundCall]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The places that calls read and do not make, and those that they make and the graph hands out."""
        made: set[int] = set()
        reads: dict[int, None] = {}
        for call in calls:
            reads |= dict.fromkeys(place for place in call.values if place not in made)
            made.update(call.results)
        results = (self._place[n] for n in self.program.module.graph.output_node().all_input_nodes)
        constants = {self._place[n] for n, _ in self._constants}
        return tuple(p for p in reads if p not in constants), tuple(p for p in results if p in made)

    def _bind(self, call: SegmentCall, now: _Followed, run: Run, key: tuple[int, ...]) -> _BoundCall:
        """One of them."""
        known = run.bound.setdefault(key, {})
        if call in known:
            return known[call]
        segment, schedule = call.segment, now.schedule
        compiled, used, slots = self._graph(call, now)
        buffers: list[torch.Tensor | None] = []
        numbers: list[tuple[int, Site, Number, int]] = []
        moves: list[tuple[int, tuple[Number, int]]] = []
        apart: list[tuple[int, Stream, Number, int]] = []
        held: list[tuple[Hashable, Site | Stream, Number, int]] = []
        for position, slot in enumerate(slots, len(used)):
            of = schedule.owners[segment.sites[slot.position]]
            buffers.append(self._buffer(slot, of, now, run, key))
            if isinstance(slot.kind, Number) and slot.kind.is_held and self.graphs is not None:
                name = slot.kind, slot.index, of.index
                buffers[-1] = run.fixed[key].numbers.at(name)
                held.append((name, of, slot.kind, slot.index))
            elif isinstance(slot.kind, Number) and isinstance(of, Site):
                numbers.append((position, of, slot.kind, slot.index))
            elif isinstance(slot.kind, Number) and isinstance(of, Stream):
                if self.variants.told_apart(slot, of, schedule.keeps[of.index]) is not None:
                    apart.append((position, of, slot.kind, slot.index))
                else:
                    moves.append((position, (slot.kind, slot.index)))
        places = tuple(self._place[segment.inputs[i]] for i in used)
        results = tuple(self._place[n] for n in segment.outputs)
        at = segment.at if isinstance(segment, Chain) else (call.at,) if call is not schedule.probe else ()
        free = tuple(place for i in at for place in now.free[i])
        known[call] = _BoundCall(
            compiled, places, tuple(buffers), tuple(numbers), tuple(moves), tuple(apart), tuple(held), results, free
        )
        return known[call]

    def _buffer(
        self, slot: Slot, of: Site | Stream, now: _Followed, run: Run, key: tuple[int, ...]
    ) -> torch.Tensor | None:
        """A run's buffer; None where a number goes."""
        if isinstance(slot.kind, Number):
            return None
        keep, selector = now.schedule.keeps[of.index], now.schedule.plan.selector
        whose = (*owner(slot.kind, of, selector), slot.index)
        if whose not in now.like:
            now.like[whose] = like_buffer(slot.kind, slot.index, of, keep, self.program, selector)
        make = allocate if self.graphs is None else run.fixed[key].allocate
        made: torch.Tensor = make(run.buffers, (*key, *whose), now.like[whose])
        return made

    def _last_uses(self, schedule: Schedule) -> list[tuple[int, ...]]:
        """After each segment, which values nothing later needs; after one that skips others, also those of theirs."""
        last: dict[int, int] = {}
        for i, segment in enumerate(schedule.segments):
            for node in (*segment.inputs, *segment.outputs):
                last[self._place[node]] = i
        kept = {self._place[n] for n in self.program.module.graph.output_node().all_input_nodes}
        free: list[tuple[int, ...]] = [()] * len(schedule.segments)
        for place, i in last.items():
            if place not in kept and place >= self._inputs:
                free[i] += (place,)
        if schedule.skips:
            free[schedule.skips.start - 1] += tuple(place for i in schedule.skips for place in free[i])
        return free


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of one graph, while it runs. ``moves``: the numbers of what leaves skipped blocks; ``values``: by their
    places; ``fixed``: where numbers lie, if in memory; ``apart``: tells those that each sample has its own of."""

    schedule: Schedule
    index: int
    moves: Numbers
    values: list[Any]
    fixed: Fixed | None = None
    apart: NumberOf | None = None

    def run(self, calls: Sequence[_BoundCall]) -> Sequence[Any]:
        """Run segments; what the last of them made."""
        self.fill(calls)
        return self.make(calls)

    def fill(self, calls: Sequence[_BoundCall]) -> None:
        """Write the numbers of segments that lie in memory."""
        if self.fixed is not None:
            self.fixed.numbers.write(self.packed(calls, self.fixed))

    def packed(self, calls: Sequence[_BoundCall], fixed: Fixed) -> torch.Tensor:
        """Those numbers."""
        number, moves = self.schedule.number, self.moves
        held = {held[0]: held for call in calls for held in call.held}
        told = {
            name: number(self.index, of, kind, i) if isinstance(of, Site) else moves[kind, i]
            for name, of, kind, i in held.values()
        }
        return fixed.numbers.pack(told)

    def make(self, calls: Sequence[_BoundCall]) -> Sequence[Any]:
        """Run segments whose numbers in memory are there."""
        values, number = self.values, self.schedule.number
        made: Sequence[Any] = ()
        for bound in calls:
            arguments = [values[place] for place in bound.values]
            arguments += bound.buffers
            for position, site, kind, index in bound.numbers:
                arguments[position] = number(self.index, site, kind, index)
            for position, name in bound.moves:
                arguments[position] = self.moves[name]
            for position, stream, kind, index in bound.apart:
                assert self.apart is not None
                arguments[position] = self.apart(stream, kind, index)
            made = bound.call(*arguments)
            for place, value in zip(bound.results, made, strict=False):
                values[place] = value
            for place in bound.free:
                values[place] = None
        return made


def _planned(schedule: Schedule) -> dict[_Variant, SegmentCall]:
    """All variants of a plan, and the first call of each."""
    steps = {
        id(calls): schedule.joined(calls) for both in zip(schedule.uncut, schedule.calls, strict=True) for calls in both
    }
    probe = [schedule.probe] if schedule.probe is not None else []
    planned: dict[_Variant, SegmentCall] = {}
    for call in (*(call for calls in steps.values() for call in calls), *probe):
        if not call.segment.timed:  # nothing to compile
            planned.setdefault(call.variant, call)
    return planned


def _unkept(value: Any, kept: frozenset[int]) -> Any:
    """A result that nobody else holds."""
    held = bool(kept) and isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in kept
    return value.clone() if held else value


def _as_traced(node: fx.Node, value: Any) -> Any:
    """A result in the strides that it has where everything is computed: a kept value may lie otherwise in memory, and
    code behind the graph was traced for one layout."""
    like = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(like, torch.Tensor) or value.layout != torch.strided:
        return value
    pairs = zip(value.stride(), like.stride(), value.shape, strict=True)
    if all(ours == theirs or size == 1 for ours, theirs, size in pairs):
        return value
    return torch.empty_strided(value.shape, like.stride(), dtype=value.dtype, device=value.device).copy_(value)
