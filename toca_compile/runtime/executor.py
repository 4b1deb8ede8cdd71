"""Executor: runs one captured graph, segment by segment, each in the variant that the plan names for the step.

All decisions are made when the plan is laid out; a call only looks them up. A call of a block costs one dictionary
look-up and one list of arguments on top of the compiled variant.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from toca_compile.ir.plan import SELECTING, CacheSpec, Plan, Selector, SiteStep
from toca_compile.ir.program import Mode, Program, Segment, Slot
from toca_compile.ir.types import Action, Site
from toca_compile.runtime.schedule import Cell, Schedule
from toca_compile.runtime.skipping import Skipping
from toca_compile.runtime.step_control import Kept, Run, StepControl

log = logging.getLogger(__name__)

Compiled = tuple[Callable[..., Sequence[Any]], tuple[int, ...], tuple[Slot, ...]]
_Variant = tuple[int, tuple[Mode, ...], tuple[CacheSpec, ...]]  # template, and what its sites do and keep

FOLLOWED = 8  # plans that stay laid out: pipelines of several lengths may take turns


@dataclass(frozen=True)
class _Bound:
    """A variant with its arguments in one run: where values lie, the buffers, and where numbers go among those."""

    call: Callable[..., Sequence[Any]]
    values: tuple[int, ...]
    buffers: tuple[torch.Tensor | None, ...]
    numbers: tuple[tuple[int, Slot], ...]


@dataclass(frozen=True)
class _Followed:
    """A plan as one graph follows it; ``free``: after each segment, which values nothing later needs."""

    schedule: Schedule
    skipping: Skipping | None
    free: list[list[int]]
    ready: dict[_Variant, Compiled]


class Executor:
    """A captured graph with a plan. Called with the graph's inputs; returns its outputs.

    Args:
        program: the graph after all passes.
        plan: what each site does at each step.
        control: says which step a call is.
        compiled: makes (or finds) the callable of a segment's variant.
        skipping: makes what stands in for the range of blocks that a plan skips.
        number: of this graph in its model.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        control: StepControl,
        compiled: Callable[[Segment, tuple[Mode, ...], tuple[CacheSpec, ...], Plan], Compiled],
        skipping: Callable[[Plan, dict[fx.Node, int]], Skipping | None],
        number: int,
    ) -> None:
        self.program, self.control, self._compiled, self._make_skipping = program, control, compiled, skipping
        self.number = number
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
        self._shared: dict[Selector, dict[_Variant, Compiled]] = {}
        self._last: tuple[weakref.ref[Run], tuple[int, ...], int, Schedule] | None = None
        self._followed: list[_Followed] = []
        self.set_plan(plan)

    def set_plan(self, plan: Plan) -> None:
        """Follow another plan in runs that begin; one that was followed before is laid out already."""
        known = next((f for f in self._followed if f.schedule.plan is plan), None)
        if known is None:
            skipping = self._make_skipping(plan, self._place)
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
    def ready(self) -> dict[_Variant, Compiled]:
        """The variants compiled so far for plans that rank tokens alike."""
        return self._now.ready

    def __call__(self, *inputs: Any) -> Any:
        instance = id(self.parameter(inputs))
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
        return inputs[self._state] if self._state is not None else None

    def fresh_tokens(self) -> dict[str, torch.Tensor]:
        """For each site, which tokens the last step computed: bool ``[batch, tokens]`` by site name."""
        run = self._last[0]() if self._last is not None else None
        if run is None or self._last is None:
            return {}
        _, key, index, schedule = self._last
        fresh = {}
        skipped = run.record is not None and run.record.skipped(key)
        for site, todo in zip(
            self.program.sites, (schedule.rows if skipped else schedule.unskipped)[index], strict=True
        ):
            shape = example_buffer(Slot("stamp", 0), site, self.program, schedule.plan).shape
            stamp = run.buffers.get((*key, "stamp", site.index, 0))
            if todo.action in SELECTING and stamp is not None:
                fresh[site.name] = stamp == index
            else:
                fresh[site.name] = torch.full(shape, todo.action is Action.COMPUTE)
        return fresh

    def planned_bytes(self) -> int:
        """Bytes that a run under the plan keeps from step to step."""
        buffers = [example_buffer(slot, site, self.program, self.plan) for slot, site in self._now.schedule.kept()]
        skipping = self._now.skipping
        kept = self._constant_bytes() + (skipping.planned_bytes if skipping is not None else 0)
        return sum(b.numel() * b.element_size() for b in buffers) + kept

    def _constant_bytes(self) -> int:
        front, rest = self.program.segments[: self._constant], self.program.segments[self._constant :]
        read = {n for s in rest for n in s.inputs}
        values = [n.meta["val"] for s in front for n in s.outputs if n in read]
        return sum(v.numel() * v.element_size() for v in values)

    def _execute(self, inputs: Sequence[Any], run: Run, key: tuple[int, ...]) -> Any:
        schedule, skipping, free = self._now.schedule, self._now.skipping, self._now.free
        index = min(run.step, len(schedule.rows) - 1)
        if index and (run.last.get(key) != run.step - 1 or run.schedules.get(key) is not schedule):
            # This graph did not run in the step before (another model shares the run, or a branch of the model was
            # skipped), or by another plan, so its caches are not what the plan thinks: compute everything.
            log.warning("a graph of the model missed step %d; it computes all of step %d", run.step - 1, run.step)
            index = 0
            run.forget(key)
        run.last[key], run.schedules[key] = run.step, schedule
        self._last = (weakref.ref(run), key, index, schedule)
        self._record(run, key, schedule.rows[index])
        values: list[Any] = [*inputs, *([None] * (len(self._place) - len(inputs)))]
        for node, constant in self._constants:
            values[self._place[node]] = constant
        ready = run.bound.setdefault(key, {})
        done = self._restore(inputs, values, run, key) if self._constant else 0
        stop = -1
        for i, cell in enumerate(schedule.cells[index][done:], done):
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
            bound = ready.get((i, cell.variant))
            if bound is None:
                bound = ready[i, cell.variant] = self._bind(i, cell, run, key)
            arguments = [values[place] for place in bound.values]
            arguments += bound.buffers
            for position, slot in bound.numbers:
                arguments[position] = cell.numbers[slot]
            for place, value in zip(self._segment_outputs[i], bound.call(*arguments), strict=True):
                values[place] = value
            if skipping is not None and i == skipping.range.last - 1:
                skipping.keep(values, run, key)
            for place in free[i]:
                values[place] = None
            if i == self._constant - 1:
                self._keep(inputs, values, run, key)
        return fx.node.map_arg(self._output, lambda n: _as_traced(n, values[self._place[n]]))

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
        run.kept[key] = Kept.of([inputs[i] for i in self._watched], later)

    def _record(self, run: Run, key: tuple[int, ...], row: Sequence[SiteStep]) -> None:
        """What this step does, for the user to read."""
        k = {site.name: todo.tokens for site, todo in zip(self.program.sites, row, strict=True)}
        self.control.record(run).note(key, frozenset(todo.action for todo in row), k)

    def _bind(self, i: int, cell: Cell, run: Run, key: tuple[int, ...]) -> _Bound:
        """The variant of a segment, compiled if it was not, with this run's buffers."""
        segment = self.program.segments[i]
        variant = (segment.template, cell.modes, cell.memories)
        ready = self.ready.get(variant)
        if ready is None:
            ready = self.ready[variant] = self._compiled(segment, cell.modes, cell.memories, self.plan)
        call, used, slots = ready
        return _Bound(
            call,
            tuple(self._segment_inputs[i][j] for j in used),
            tuple(None if slot in cell.numbers else self._buffer(run.buffers, key, segment, slot) for slot in slots),
            tuple((len(used) + n, slot) for n, slot in enumerate(slots) if slot in cell.numbers),
        )

    def _buffer(
        self, buffers: dict[tuple[Any, ...], torch.Tensor], key: tuple[int, ...], segment: Segment, slot: Slot
    ) -> torch.Tensor:
        site = self.program.sites[segment.sites[slot.position]]
        name = (*key, *buffer_name(slot, site, self.plan.selector.score))
        if name not in buffers:
            like = example_buffer(slot, site, self.program, self.plan)
            with torch.inference_mode(False):
                buffers[name] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        return buffers[name]

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


def example_buffer(slot: Slot, site: Site, program: Program, plan: Plan) -> torch.Tensor:
    """A fake tensor of the shape, dtype and device of a slot's buffer."""
    output: torch.Tensor = site.output.meta["val"]
    score, kept = plan.selector.score, plan.memory.dtype
    if slot.kind in ("cache", "diff"):
        return output.new_empty(output.shape, dtype=kept)
    if slot.kind in ("held", "keys"):
        proof = site.row_proof if slot.kind == "held" else site.query_proof
        assert proof is not None
        value: torch.Tensor = (proof.stale_inputs if slot.kind == "held" else proof.dense_inputs)[slot.index].meta[
            "val"
        ]
        return value.new_empty(value.shape, dtype=kept)
    assert program.types is not None
    batch = program.types.factors.size(site.batch)
    if slot.kind == "stamp":
        return output.new_empty([batch, site.axis.size], dtype=torch.int32)
    if score == "error":
        return output.new_empty([batch, site.axis.size], dtype=torch.float32)
    attention = program.sites[buffer_name(slot, site, score)[1]].attention[-1]
    over = attention.axis if score == "entropy" else attention.key_axis
    return output.new_empty([batch, program.types.factors.size(over)], dtype=torch.float32)


def buffer_name(slot: Slot, site: Site, score: str) -> tuple[str, int, int]:
    """What a slot's buffer is, whose, and which of several. "scores of" a site are those of its scorer."""
    scorer = site.scorer(score) if slot.kind == "scores of" else None
    if scorer is not None:
        return "score", scorer.site, 0
    return slot.kind, site.index, slot.index


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
