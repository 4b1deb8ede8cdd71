"""Executor: runs one captured graph, segment by segment, each in the variant that the plan names for the step.

All decisions are made when the plan is laid out; a call only looks them up. A call of a block costs one dictionary
look-up and one list of arguments on top of the compiled variant.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import fx

from toca_compile.ir.plan import Memory, Plan, Selector, SiteStep, scored_sites
from toca_compile.ir.program import Mode, Segment, Slot, Unit
from toca_compile.ir.types import Action, Site
from toca_compile.runtime.step_control import Kept, Run, StepControl

log = logging.getLogger(__name__)

Compiled = tuple[Callable[..., Sequence[Any]], tuple[int, ...], tuple[Slot, ...]]


@dataclass(frozen=True)
class _Cell:
    """One segment in one step: the modes of its sites and their host numbers."""

    modes: tuple[Mode, ...]
    variant: int  # numbers the modes, cheaper to look up
    numbers: dict[Slot, int]


@dataclass(frozen=True)
class _Bound:
    """A variant with its arguments in one run: where values lie, the buffers, and where numbers go among those."""

    call: Callable[..., Sequence[Any]]
    values: tuple[int, ...]
    buffers: tuple[torch.Tensor | None, ...]
    numbers: tuple[tuple[int, Slot], ...]


class Executor:
    """A captured graph with a plan. Called with the graph's inputs; returns its outputs.

    Args:
        unit: the graph after all passes.
        plan: what each site does at each step.
        control: says which step a call is.
        compiled: makes (or finds) the callable of a segment's variant.
        number: of this graph in its model.
    """

    def __init__(
        self,
        unit: Unit,
        plan: Plan,
        control: StepControl,
        compiled: Callable[[Segment, tuple[Mode, ...], Plan], Compiled],
        number: int,
    ) -> None:
        self.unit, self.control, self._compiled = unit, control, compiled
        self._number = number
        self._state = next((i for i, fixed in enumerate(unit.static_inputs) if fixed), None)
        graph = unit.module.graph
        self._place: dict[fx.Node, int] = {n: i for i, n in enumerate(n for n in graph.nodes if n.op == "placeholder")}
        self._inputs = len(self._place)
        self._clock = [self._place[n] for n in unit.clock]
        # Segments that are constant during a run stand first; these are the inputs on which they depend.
        self._constant = sum(s.constant for s in unit.segments)
        varying = set(unit.varying)
        read = {n for s in unit.segments[: self._constant] for n in s.inputs if n in varying}
        self._watched = sorted(self._place[n] for n in read)
        self._constants = [(n, _attribute(unit.module, str(n.target))) for n in graph.nodes if n.op == "get_attr"]
        for segment in unit.segments:
            for node in segment.outputs:
                self._place.setdefault(node, len(self._place))
        for node, _ in self._constants:
            self._place[node] = len(self._place)
        self._output = graph.output_node().args[0]
        self._segment_inputs = [[self._place[n] for n in s.inputs] for s in unit.segments]
        self._segment_outputs = [[self._place[n] for n in s.outputs] for s in unit.segments]
        self._free = self._last_uses()
        self._shared: dict[tuple[Selector, Memory], dict[tuple[int, tuple[Mode, ...]], Compiled]] = {}
        self._last: tuple[weakref.ref[Run], tuple[int, ...], int] | None = None
        self.set_plan(plan)

    def set_plan(self, plan: Plan) -> None:
        """Follow another plan from the next run on."""
        self.plan = plan
        self._numbered: dict[tuple[Mode, ...], int] = {}
        self._records = [
            {site.name: todo.tokens for site, todo in zip(self.unit.sites, step.sites, strict=True)}
            for step in plan.steps
        ]
        self._scored = scored_sites(plan, self.unit.sites)
        self._cells = [self._cell_row(i, since) for i, since in enumerate(self._since())]
        # Variants know selector and memory, not the plan: plans that share those share them.
        self.ready = self._shared.setdefault((plan.selector, plan.memory), {})

    def __call__(self, *inputs: Any) -> Any:
        instance = id(inputs[self._state]) if self._state is not None else 0
        steps = None if self.plan.endless else len(self.plan.steps)
        clock = [inputs[i] for i in self._clock]
        run, key = self.control.enter_graph(self._number, instance, steps, clock)
        try:
            return self._execute(inputs, run, key)
        except BaseException:
            self.control.reset(run.context)
            raise

    def fresh_tokens(self) -> dict[str, torch.Tensor]:
        """For each site, which tokens the last step computed: bool ``[batch, tokens]`` by site name."""
        run = self._last[0]() if self._last is not None else None
        if run is None or self._last is None:
            return {}
        _, key, index = self._last
        fresh = {}
        for site, todo in zip(self.unit.sites, self.plan.steps[index].sites, strict=True):
            shape = example_buffer(Slot("stamp", 0), site, self.unit, self.plan).shape
            stamp = run.buffers.get((*key, "stamp", site.index, 0))
            if todo.action is Action.PARTIAL and stamp is not None:
                fresh[site.name] = stamp == index
            else:
                fresh[site.name] = torch.full(shape, todo.action is Action.COMPUTE)
        return fresh

    def planned_bytes(self) -> int:
        """Bytes that a run under the plan keeps from step to step."""
        if not self.plan.caches:
            return self._constant_bytes()
        slots = []
        scored = set().union(*self._scored) if self._scored else set()
        for site in self.unit.sites:
            partial = self.plan.partial(site.index)
            held = range(len(site.carry.held)) if partial and site.carry is not None else ()
            forecast = any(step.sites[site.index].order for step in self.plan.steps)
            slots += [(Slot("diff", 0, i + 1), site) for i in range(self.plan.memory.order if forecast else 0)]
            kinds = ["cache", *(["stamp"] if partial else []), *(["score"] if site.index in scored else [])]
            slots += [(Slot(kind, 0), site) for kind in kinds] + [(Slot("held", 0, i), site) for i in held]
        buffers = [example_buffer(slot, site, self.unit, self.plan) for slot, site in slots]
        return sum(b.numel() * b.element_size() for b in buffers) + self._constant_bytes()

    def _constant_bytes(self) -> int:
        front, rest = self.unit.segments[: self._constant], self.unit.segments[self._constant :]
        read = {n for s in rest for n in s.inputs}
        values = [n.meta["val"] for s in front for n in s.outputs if n in read]
        return sum(v.numel() * v.element_size() for v in values)

    def _execute(self, inputs: Sequence[Any], run: Run, key: tuple[int, ...]) -> Any:
        index = min(run.step, len(self.plan.steps) - 1)
        if index and run.last.get(key) != run.step - 1:
            # This graph did not run in the step before (another model shares the run, or a branch of the model was
            # skipped), so its caches are not what the plan thinks: compute everything.
            log.warning("a graph of the model missed step %d; it computes all of step %d", run.step - 1, run.step)
            index = 0
        run.last[key] = run.step
        self._last = (weakref.ref(run), key, index)
        self.control.record(run, self.plan.steps[index].kind).k.update(self._records[index])
        if run.step == 0:
            for name, buffer in run.buffers.items():
                if name[: len(key)] == key and name[len(key)] in ("stamp", "diff"):
                    buffer.zero_()
        values: list[Any] = [*inputs, *([None] * (len(self._place) - len(inputs)))]
        for node, constant in self._constants:
            values[self._place[node]] = constant
        ready = run.bound.setdefault(key, {})
        done = self._restore(inputs, values, run, key) if self._constant else 0
        for i, cell in enumerate(self._cells[index][done:], done):
            bound = ready.get((i, cell.variant))
            if bound is None:
                bound = ready[i, cell.variant] = self._bind(i, cell, run, key)
            arguments = [values[place] for place in bound.values]
            arguments += bound.buffers
            for position, slot in bound.numbers:
                arguments[position] = cell.numbers[slot]
            for place, value in zip(self._segment_outputs[i], bound.call(*arguments), strict=True):
                values[place] = value
            for place in self._free[i]:
                values[place] = None
            if i == self._constant - 1:
                self._keep(inputs, values, run, key)
        return fx.node.map_arg(self._output, lambda n: values[self._place[n]])

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

    def _bind(self, i: int, cell: _Cell, run: Run, key: tuple[int, ...]) -> _Bound:
        """The variant of a segment, compiled if it was not, with this run's buffers."""
        segment = self.unit.segments[i]
        ready = self.ready.get((segment.template, cell.modes))
        if ready is None:
            ready = self._compiled(segment, cell.modes, self.plan)
            self.ready[segment.template, cell.modes] = ready
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
        site = self.unit.sites[segment.sites[slot.position]]
        name = (*key, *buffer_name(slot, site, self.plan.selector.score))
        if name not in buffers:
            like = example_buffer(slot, site, self.unit, self.plan)
            with torch.inference_mode(False):
                buffers[name] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        return buffers[name]

    def _cell_row(self, index: int, since: Sequence[Sequence[int]]) -> list[_Cell]:
        row, scored = self.plan.steps[index], self._scored[index]
        cells = []
        for segment in self.unit.segments:
            modes: list[Mode] = []
            numbers: dict[Slot, int] = {}
            for position, number in enumerate(segment.sites):
                site = self.unit.sites[number]
                todo, history, memory = row.sites[number], since[number], self.plan.memory
                modes.append(self._mode(site, todo, number in scored))
                numbers |= {
                    Slot("k", position): row.sites[number].tokens,
                    Slot("step", position): index,
                    Slot("since", position): history[-1] if history else 0,
                    Slot("site", position): number,
                }
                for order in range(1, memory.order + 1):
                    used = todo.action is Action.FORECAST and order <= todo.order
                    power = memory.power(history, index, order) if used else 0
                    numbers[Slot("power", position, order)] = power
                    numbers[Slot("spacing", position, order)] = memory.spacing([*history, index], order)
            variant = self._numbered.setdefault(tuple(modes), len(self._numbered))
            cells.append(_Cell(tuple(modes), variant, numbers))
        return cells

    def _mode(self, site: Site, todo: SiteStep, scored: bool) -> Mode:
        simple = {Action.PARTIAL: Mode.PARTIAL, Action.REUSE: Mode.REUSE, Action.FORECAST: Mode.FORECAST}
        if todo.action in simple:
            return simple[todo.action]
        if not self.plan.caches:
            return Mode.PLAIN
        holds = site.carry is not None and site.carry.held and self.plan.partial(site.index)
        kept = {Mode.SCORE: scored, Mode.HOLD: holds, Mode.DIFF: todo.order > 0}
        return reduce(or_, (mode for mode, wanted in kept.items() if wanted), Mode.STORE)

    def _since(self) -> Iterator[list[list[int]]]:
        """For each step, the last steps before it that computed all of each site."""
        kept = self.plan.memory.order + 1
        last: list[list[int]] = [[] for _ in self.unit.sites]
        for i, step in enumerate(self.plan.steps):
            yield [list(steps) for steps in last]
            for steps, todo in zip(last, step.sites, strict=True):
                if todo.action is Action.COMPUTE:
                    steps[:] = [*steps, i][-kept:]

    def _last_uses(self) -> list[list[int]]:
        """After each segment, which values no later one needs."""
        last: dict[int, int] = {}
        for i, (ins, outs) in enumerate(zip(self._segment_inputs, self._segment_outputs, strict=True)):
            for place in (*ins, *outs):
                last[place] = i
        kept = {self._place[n] for n in self.unit.module.graph.output_node().all_input_nodes}
        free: list[list[int]] = [[] for _ in self.unit.segments]
        for place, i in last.items():
            if place not in kept and place >= self._inputs:
                free[i].append(place)
        return free


def example_buffer(slot: Slot, site: Site, unit: Unit, plan: Plan) -> torch.Tensor:
    """A fake tensor of the shape, dtype and device of a slot's buffer."""
    output: torch.Tensor = site.output.meta["val"]
    score, kept = plan.selector.score, plan.memory.dtype
    if slot.kind in ("cache", "diff"):
        return output.new_empty(output.shape, dtype=kept)
    if slot.kind == "held":
        assert site.carry is not None
        value: torch.Tensor = site.carry.held[slot.index].meta["val"]
        return value.new_empty(value.shape, dtype=kept)
    assert unit.types is not None
    batch = unit.types.factors.size(site.batch)
    if slot.kind == "stamp":
        return output.new_empty([batch, site.axis.size], dtype=torch.int32)
    attention = unit.sites[buffer_name(slot, site, score)[1]].attention[-1]
    over = attention.axis if score == "entropy" else attention.key_axis
    return output.new_empty([batch, unit.types.factors.size(over)], dtype=torch.float32)


def buffer_name(slot: Slot, site: Site, score: str) -> tuple[str, int, int]:
    """What a slot's buffer is, whose, and which of several. "scores of" a site are those of its scorer."""
    scorer = site.scorer(score) if slot.kind == "scores of" else None
    if scorer is not None:
        return "score", scorer.site, 0
    return slot.kind, site.index, slot.index


def _attribute(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
