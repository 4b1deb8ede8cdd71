"""Turns: the graphs of a model whose steps the engine counts. A turn is one call of the model, for a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from toca_compile.errors import LoweringError, TocaError, UnsupportedGraphError
from toca_compile.ir.factors import Factor
from toca_compile.ir.graph import value_of
from toca_compile.ir.history import Numbers
from toca_compile.ir.plan import Policy
from toca_compile.ir.program import GraphPlan, Stream, Use
from toca_compile.ir.state import Number, State
from toca_compile.lowerings import is_whole
from toca_compile.passes.proof.samples import samples_in
from toca_compile.runtime.cache_state import owner
from toca_compile.runtime.executor import Executor, NumberOf
from toca_compile.runtime.schedule import Row, Schedule
from toca_compile.runtime.step_control import Run, StepControl
from toca_compile.serving.pool import Place
from toca_compile.session import Session

Inputs = tuple[Any, ...]


@dataclass
class Turn:
    """One call. ``step``: computes it; None: the call is made to trace the model, and computes nothing."""

    step: "Callable[[Turned, Inputs], Any] | None" = None
    graphs: "list[tuple[Turned, Inputs]]" = field(default_factory=list)


class Turns(StepControl):
    """Knows no runs: each call belongs to the turn that was set before it."""

    turn: Turn | None = None


class Turned(Executor):
    """An executor that computes whichever step the engine says."""

    control: Turns
    factor: Factor | None = None
    _told = False

    def tell_apart(self, factor: Factor | None) -> None:
        """Let each sample have numbers of its own of what leaves skipped blocks. ``factor``: numbers the samples. Lanes
        whose requests have other numbers of samples may share the graph, and the first of them says."""
        if not self._told:
            self._told, self.factor = True, factor
            self.variants.by_sample = self._by_sample if factor is not None else None

    def numbers(self, told: Sequence[Numbers], rows: int) -> NumberOf:
        """The numbers ``told`` of each request, of so many samples, as the graph takes them."""
        made: dict[int, Sequence[torch.Tensor]] = {}
        names = {name: row for row, name in enumerate(told[0])}

        def number(stream: Stream, kind: Number, index: int) -> torch.Tensor:
            if stream.index not in made:
                place, shape = self._place_of(stream), self._by_sample(stream)
                assert place is not None
                assert shape is not None
                table = torch.empty((len(names), *shape), dtype=torch.int64)
                apart = replace(place, dim=place.dim + 1).by_request(table, len(told), rows)
                values = torch.tensor([[own[name] for name in names] for own in told])
                apart.copy_(values.view(len(told), 1, -1, *[1] * (apart.dim() - 3)))
                made[stream.index] = table.to(value_of(stream.output).device, non_blocking=True).unbind()
            return made[stream.index][names[kind, index]]

        return number

    def _by_sample(self, stream: Stream) -> tuple[int, ...] | None:
        """The shape of a number for each sample of what leaves skipped blocks, if samples lie in it."""
        place, shape = self._place_of(stream), value_of(stream.output).shape
        return tuple(size if i == place.dim else 1 for i, size in enumerate(shape)) if place is not None else None

    def _place_of(self, stream: Stream) -> Place | None:
        types = self.program.types
        assert types is not None
        found = samples_in(types.type_of(stream.output), self.factor, types) if self.factor is not None else None
        return Place(*found) if found is not None else None

    def __call__(self, *inputs: Any) -> Any:
        plain = inputs if self._flat is None else self._flat(inputs)
        turn = self.control.turn
        if turn is None:
            raise TocaError(
                "the model of an engine is called by the engine alone: submit a request, or optimise another copy of it"
            )
        if not self.control.reached(self.number):
            raise UnsupportedGraphError(
                "torch.compile made several graphs of the model, and an engine needs one: mend the break that "
                "explain(model) names, or sample without an engine"
            )
        if self.program.written:
            raise UnsupportedGraphError(
                "the model changes one of its inputs in place, which requests may share: clone it in forward"
            )
        turn.graphs.append((self, plain))
        return self._nothing() if turn.step is None else turn.step(self, plain)

    @property
    def key(self) -> tuple[int, int, int]:
        """Of the graph's buffers in a run."""
        return self.number, 0, 0

    def laid_out(self, planned: GraphPlan) -> "LaidOut":
        """A plan as the graph follows it."""
        self.set_plan(planned)
        return LaidOut(self, self._now)

    def placeholders_of(self, inputs: Inputs, values: Sequence[Any]) -> list[fx.Node]:
        """The graph's inputs that are these values."""
        ids = {id(v) for v in values}
        return [n for n, x in zip(self.program.placeholders, inputs, strict=True) if id(x) in ids]

    def _nothing(self) -> Any:
        def zeros(node: fx.Node) -> Any:
            like = node.meta["val"]
            if not isinstance(like, torch.Tensor):
                return like
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).zero_()

        return fx.node.map_arg(self._output, zeros)

    def _record(self, run: Run, key: tuple[int, ...], schedule: Schedule, row: Row) -> None:
        pass  # a step is of many requests


class LaidOut:
    """A plan, laid out for a graph, with the buffers in which a batch's rows are computed.

    Attributes:
        schedule: what its steps do.
    """

    def __init__(self, executor: Turned, followed: Any) -> None:
        self._executor, self._followed, self._run = executor, followed, Run("batch")
        self.schedule: Schedule = followed.schedule
        self._touched: dict[int, list[tuple[Any, torch.Tensor, Use]]] = {}

    def use(self, name: Any, buffer: torch.Tensor) -> None:
        """Let steps read and write this buffer."""
        self._run.buffers[(*self._executor.key, *name)] = buffer

    def touched(self, step: int) -> list[tuple[Any, torch.Tensor, Use]]:
        """The buffers that a step reads or writes, with their names."""
        calls = self.schedule.calls[min(step, len(self.schedule.calls) - 1)]
        if id(calls) not in self._touched:
            executor, run = self._executor, self._run
            executor._bound(calls, self._followed, run, executor.key)  # compiles what is not compiled yet
            selector, used = self.schedule.plan.selector, dict[Any, Use]()
            for call in self.schedule.joined(calls):
                for slot, use in executor.variants.uses[call.variant].items():
                    of = self.schedule.owners[call.segment.sites[slot.position]]
                    name = (*executor.key, *owner(State(slot.kind), of, selector), slot.index)
                    # What one call writes as a whole the next may read.
                    used[name] = use | used.get(name, use)
            # Of what other plans keep besides, by which tokens are selected, this one has nothing.
            named = [(name, run.buffers[name], use) for name, use in used.items() if name in run.buffers]
            self._touched[id(calls)] = [(name[len(executor.key) :], buffer, use) for name, buffer, use in named]
        return self._touched[id(calls)]

    def step(self, number: int, inputs: Inputs, apart: NumberOf | None) -> Any:
        """Compute a step on what lies in the buffers."""
        executor, run, key = self._executor, self._run, self._executor.key
        executor._now, executor._apart = self._followed, apart
        run.step, run.last[key], run.schedules[key] = number, number - 1, self.schedule
        if self.schedule.range is not None:
            run.computed[key] = self.schedule.past(number, self.schedule.range.owners[0])
        return executor._execute(inputs, run, key)


class BatchSession(Session):
    """A session whose graphs an engine turns."""

    runs: ClassVar[type[Executor]] = Turned

    def __init__(self, policy: Policy | str, **options: Any) -> None:
        # What is kept by run and by time is kept for one request's inputs, and a batch has those of several.
        super().__init__(policy, **options, hoist=False)
        if is_whole(self._lower):
            raise LoweringError(
                f"lowering={self.lowering!r} makes one graph of a step, with the caches of one run, and a batch has "
                "those of many: take another lowering"
            )
        self.control: Turns = Turns(self.warn_once)

    @property
    def compiled(self) -> int:
        """How many variants there are, of all graphs."""
        return sum(len(ready) for e in self.executors for ready in e._shared.values())

    def planned(self, policy: Policy, executor: Turned) -> GraphPlan:
        """What a policy plans for a graph.

        Raises:
            PolicyError: the graph cannot follow it.
        """
        return self._plan(policy, executor.number, executor.program)
