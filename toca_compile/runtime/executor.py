"""Executor: runs one captured graph, segment by segment, each in the variant that the plan names for the step.

All decisions are made when the plan is laid out; a call only looks them up. A call of a block costs one dictionary
look-up and one list of arguments on top of the compiled variant.
"""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from toca_compile.ir.actions import Action
from toca_compile.ir.plan import Plan, Selector
from toca_compile.ir.program import Form, Program, Segment, Variant
from toca_compile.ir.state import Number, Slot, State
from toca_compile.ir.types import Site
from toca_compile.progress import working
from toca_compile.runtime.cache_state import Buffers, allocate, bytes_of, like_buffer, owner
from toca_compile.runtime.carry_over import carry_over
from toca_compile.runtime.schedule import Schedule, SegmentCall
from toca_compile.runtime.skipping import Graph, Skipping
from toca_compile.runtime.step_control import Run, RunConstants, StepControl

log = logging.getLogger(__name__)

_Variant = tuple[int, tuple[Form, ...]]  # template, and what its sites do

FOLLOWED = 8  # plans that stay laid out: pipelines of several lengths may take turns


class Variants(Protocol):
    """Where an executor's graphs come from (``compiler/variants.py``). ``checked``: seconds for each variant that was
    held against its plain meaning."""

    checked: dict[_Variant, float]

    def build(self, segment: Segment, forms: tuple[Form, ...], plan: Plan) -> Variant:
        """A segment's variant, verified."""
        ...

    def compiled(self, segment: Segment, forms: tuple[Form, ...], plan: Plan) -> Graph:
        """A segment's variant, built, verified and lowered."""
        ...

    def skipping(self, plan: Plan, place: Mapping[fx.Node, int]) -> Skipping | None:
        """What stands in for the blocks that a plan skips."""
        ...


class Flat(Protocol):
    """What takes wrappers among a graph's inputs apart (``compiler/wrappers.py``)."""

    def __call__(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The plain tensors of a call."""
        ...

    def parameter(self, values: Sequence[Any]) -> Any:
        """The first of the model's parameters, as the model has it."""
        ...


@dataclass(frozen=True)
class _BoundCall:
    """A variant with its arguments in one run: where values lie, the buffers, and where which numbers go among them."""

    call: Callable[..., Sequence[Any]]
    values: tuple[int, ...]
    buffers: tuple[torch.Tensor | None, ...]
    numbers: tuple[tuple[int, Site, Number, int], ...]


@dataclass(frozen=True)
class _Followed:
    """A plan as one graph follows it; ``free``: after each segment, which values nothing later needs."""

    schedule: Schedule
    skipping: Skipping | None
    free: list[list[int]]
    ready: dict[_Variant, Graph]


class Executor:
    """A captured graph with a plan. Called with the graph's inputs; returns its outputs.

    Args:
        program: the graph after all passes.
        plan: what each site does at each step.
        control: says which step a call is.
        variants: where the graphs come from.
        number: of this graph in its model.
        flat: takes wrappers (quantised weights) among the inputs apart into the tensors that the program has for them.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        control: StepControl,
        variants: Variants,
        number: int,
        flat: Flat | None = None,
    ) -> None:
        self.program, self.control, self.variants = program, control, variants
        self.number = number
        self._flat = flat
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
        self._constants = [(n, _attribute(program.module, str(n.target))) for n in graph.nodes if n.op == "get_attr"]
        for segment in program.segments:
            for node in segment.outputs:
                self._place.setdefault(node, len(self._place))
        for node, _ in self._constants:
            self._place[node] = len(self._place)
        self._output = graph.output_node().args[0]
        self._segment_inputs = [[self._place[n] for n in s.inputs] for s in program.segments]
        self._segment_outputs = [[self._place[n] for n in s.outputs] for s in program.segments]
        self._shared: dict[Selector, dict[_Variant, Graph]] = {}
        self._last: tuple[weakref.ref[Run], tuple[int, ...], int, Schedule] | None = None
        self._followed: list[_Followed] = []
        self.set_plan(plan)

    def set_plan(self, plan: Plan) -> None:
        """Follow another plan in runs that begin; one that was followed before is laid out already."""
        known = next((f for f in self._followed if f.schedule.plan is plan), None)
        if known is None:
            skipping = self.variants.skipping(plan, self._place)
            # Variants know selector and memories, not the plan: plans that share those share them.
            ready = self._shared.setdefault(plan.selector, {})
            known = _Followed(Schedule(self.program, plan), skipping, self._last_uses(skipping), ready)
            self._followed = [*self._followed[1 - FOLLOWED :], known]
        self._now = known

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
        instance = id(self.parameter(inputs))
        inputs = inputs if self._flat is None else self._flat(inputs)
        with self.control.lock:
            seen = {i: inputs[i] for i in self._varying}
            clock = [inputs[i] for i in self._clock]
            run, key = self.control.enter_graph(self.number, instance, self.schedule.steps, seen, clock)
            try:
                results = self._execute(inputs, run, key)
            except BaseException:
                self.control.void()
                raise
            self.control.leave_graph(run, key, [tuple(r.shape) for r in results if isinstance(r, torch.Tensor)])
        return results

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
        pending = {variant: segment for variant, segment in self._planned().items() if variant not in self.ready}
        skipping = self._now.skipping
        ranges = [] if skipping is None else [name for name in skipping.names if not skipping.graphs.ready(name)]
        count = len(pending) + len(ranges)
        for i, ((_, forms), segment) in enumerate(pending.items(), 1):
            self._graph(segment, forms, f"{i} of {count}")
        for i, name in enumerate(ranges, len(pending) + 1):
            assert skipping is not None
            with working(f"compiling variant {i} of {count}: skipped blocks, {name}"):
                skipping.graphs.compiled(name)
        return count

    def _planned(self) -> dict[_Variant, Segment]:
        """All variants of the plan, and the first segment that runs each."""
        planned: dict[_Variant, Segment] = {}
        for calls in {id(calls): calls for calls in self.schedule.calls}.values():
            for segment, call in zip(self.program.segments, calls, strict=True):
                planned.setdefault((segment.template, call.forms), segment)
        return planned

    def planned_bytes(self) -> int:
        """Bytes that a run under the plan keeps from step to step."""
        schedule, selector = self.schedule, self.plan.selector
        buffers = [
            like_buffer(kind, index, site, schedule.keeps[site.index], self.program, selector)
            for kind, index, site in schedule.kept()
        ]
        skipping = self._now.skipping
        range_bytes = skipping.planned_bytes if skipping is not None else 0
        return bytes_of(buffers) + self._constant_bytes() + range_bytes

    def _constant_bytes(self) -> int:
        front, rest = self.program.segments[: self._constant], self.program.segments[self._constant :]
        read = {n for s in rest for n in s.inputs}
        return bytes_of(n.meta["val"] for s in front for n in s.outputs if n in read)

    def _execute(self, inputs: Sequence[Any], run: Run, key: tuple[int, ...]) -> Any:
        schedule, skipping, free = self._now.schedule, self._now.skipping, self._now.free
        if run.step and len(schedule.rows) > 1:
            schedule = self._going_on(run, key)
        index = min(run.step, len(schedule.rows) - 1)
        run.last[key], run.schedules[key] = run.step, schedule
        self._last = (weakref.ref(run), key, index, schedule)
        self._record(run, key, schedule.rows[index])
        values: list[Any] = [*inputs, *([None] * (len(self._place) - len(inputs)))]
        for node, constant in self._constants:
            values[self._place[node]] = constant
        ready = run.bound.setdefault(key, {})
        done = self._restore(inputs, values, run, key) if self._constant else 0
        stop = -1
        for i, call in enumerate(schedule.calls[index][done:], done):
            if skipping is not None and i == skipping.range.first:
                stop = skipping.range.last
                if skipping.decide(schedule.rows[index] is not schedule.unskipped[index], values, run, key):
                    skipping.skip(values, run, key)
                else:
                    self._record(run, key, schedule.unskipped[index])
                    stop = -1
            if i < stop:
                for place in free[i]:
                    values[place] = None
                continue
            bound = ready.get((i, call.variant))
            if bound is None:
                bound = ready[i, call.variant] = self._bind(i, call, run, key)
            arguments = [values[place] for place in bound.values]
            arguments += bound.buffers
            for position, site, kind, number in bound.numbers:
                arguments[position] = schedule.number(index, site, kind, number)
            for place, value in zip(self._segment_outputs[i], bound.call(*arguments), strict=True):
                values[place] = value
            if skipping is not None and i == skipping.range.last - 1:
                skipping.keep(values, run, key)
            for place in free[i]:
                values[place] = None
            if i == self._constant - 1:
                self._keep(inputs, values, run, key)
        return fx.node.map_arg(self._output, lambda n: _as_traced(n, values[self._place[n]]))

    def _going_on(self, run: Run, key: tuple[int, ...]) -> Schedule:
        """The schedule of a step that is not the run's first: it goes with what the graph has of the step before, or
        with what another graph hands over, or computes everything."""
        schedule, before = self._now.schedule, run.schedules.get(key)
        if before is not None and run.last[key] == run.step - 1 and before.plan is schedule.plan:
            return before
        carried = carry_over(run, key, schedule)
        if carried is not None:
            return carried
        if before is not None:
            # It did not run in the step before (another model shares the run, or a branch of the model was skipped),
            # or by another plan, so its caches are not what the plan thinks.
            log.warning("a graph of the model missed step %d; it computes all of step %d", run.step - 1, run.step)
        else:
            log.info("another graph of the model goes on with the run: it computes all of step %d", run.step)
        run.forget(key)
        return Schedule(
            self.program, schedule.plan, run.step if self.plan.endless else min(run.step, len(schedule.rows) - 1)
        )

    def _restore(self, inputs: Sequence[Any], values: list[Any], run: Run, key: tuple[int, ...]) -> int:
        """Put back what the constant segments computed before from the same inputs; how many segments that spares."""
        kept = run.kept.get(key)
        if kept is None or not kept.holds([inputs[i] for i in self._watched]):
            return 0
        for place, value in kept.values.items():
            values[place] = value
        return self._constant

    def _keep(self, inputs: Sequence[Any], values: Sequence[Any], run: Run, key: tuple[int, ...]) -> None:
        places = {p for outputs in self._segment_outputs[: self._constant] for p in outputs}
        later = {p: values[p] for p in places if values[p] is not None}
        run.kept[key] = RunConstants.of([inputs[i] for i in self._watched], later)

    def _record(self, run: Run, key: tuple[int, ...], row: Sequence[Action]) -> None:
        """What this step does, for the user to read."""
        k = {site.name: action.computed(site) for site, action in zip(self.program.sites, row, strict=True)}
        self.control.record(run).note(key, frozenset(action.kind for action in row), k)

    def _graph(self, segment: Segment, forms: tuple[Form, ...], place: str = "") -> Graph:
        """The variant of a segment, compiled if it was not. ``place``: which of how many that is."""
        ready = self.ready.get((segment.template, forms))
        if ready is None:
            if not place:
                planned = self._planned()
                place = f"{sum(v in self.ready for v in planned) + 1} of {len(planned)}"
            names = [self.program.sites[i].name for i in segment.sites]
            does = ", ".join(f"{name} {form.action}" for name, form in zip(names, forms, strict=True))
            with working(f"compiling variant {place}: {does or 'what stands between the blocks'}"):
                ready = self.variants.compiled(segment, forms, self.plan)
            self.ready[segment.template, forms] = ready
        return ready

    def _bind(self, i: int, call: SegmentCall, run: Run, key: tuple[int, ...]) -> _BoundCall:
        """The variant of a segment with this run's buffers."""
        segment = self.program.segments[i]
        sites = [self.program.sites[number] for number in segment.sites]
        compiled, used, slots = self._graph(segment, call.forms)
        buffers: list[torch.Tensor | None] = []
        numbers = []
        for position, slot in enumerate(slots, len(used)):
            site = sites[slot.position]
            if isinstance(slot.kind, Number):
                numbers.append((position, site, slot.kind, slot.index))
            buffers.append(self._buffer(run.buffers, key, site, slot))
        places = tuple(self._segment_inputs[i][j] for j in used)
        return _BoundCall(compiled, places, tuple(buffers), tuple(numbers))

    def _buffer(self, buffers: Buffers, key: tuple[int, ...], site: Site, slot: Slot) -> torch.Tensor | None:
        """A run's buffer; None where a number goes."""
        if isinstance(slot.kind, Number):
            return None
        kind, keep, selector = slot.kind, self.schedule.keeps[site.index], self.plan.selector
        name = (*key, *owner(kind, site, selector), slot.index)
        return allocate(buffers, name, lambda: like_buffer(kind, slot.index, site, keep, self.program, selector))

    def _last_uses(self, skipping: Skipping | None) -> list[list[int]]:
        """After each segment, which values nothing later needs."""
        last: dict[int, int] = {}
        for i, (ins, outs) in enumerate(zip(self._segment_inputs, self._segment_outputs, strict=True)):
            for place in (*ins, *outs):
                last[place] = i
        for place, i in (skipping.uses(self._place) if skipping is not None else {}).items():
            last[place] = max(last.get(place, 0), i)
        kept = {self._place[n] for n in self.program.module.graph.output_node().all_input_nodes}
        free: list[list[int]] = [[] for _ in self.program.segments]
        for place, i in last.items():
            if place not in kept and place >= self._inputs:
                free[i].append(place)
        return free


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


def _attribute(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
