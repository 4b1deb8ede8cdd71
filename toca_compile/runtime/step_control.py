"""StepControl: which step of which run a model call is.

A *run* is one sampling in one context (``cache_context``: one for each guidance pass). A call continues the run of its
context, or starts a new one at step 0: after ``reset``, after the plan's last step, after an exception, when the call
reaches another graph than the run began with (another batch size, resolution, dtype or device traces another graph),
and when the denoising clock jumps back. Step 0 computes everything, so nothing of an older run is ever read.
"""

import logging
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from toca_compile.ir.types import StepKind

log = logging.getLogger(__name__)

_KEPT = 4096  # records kept: an endless run has no last step


@dataclass
class StepRecord:
    """What one model call did. ``k``: how many tokens each site computed, by site name."""

    index: int
    kind: StepKind
    context: str
    k: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """Values that were computed from some inputs, and how those were: which objects, changed how often."""

    inputs: tuple[Any, ...]
    values: dict[int, torch.Tensor]

    @classmethod
    def of(cls, inputs: Sequence[Any], values: dict[int, torch.Tensor]) -> "Kept":
        """Remember what ``values`` came from."""
        return cls(tuple(_state(x) for x in inputs), values)

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether these are the same inputs, unchanged. Changes of a tensor made in inference mode cannot be seen."""
        return all(_unchanged(old, new) for old, new in zip(self.inputs, inputs, strict=True))


def _state(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return None if value.is_inference() else (weakref.ref(value), value._version)


def _unchanged(old: Any, new: Any) -> bool:
    if not isinstance(new, torch.Tensor):
        return type(old) is type(new) and bool(old == new)
    return old is not None and old[0]() is new and old[1] == new._version


@dataclass
class Run:
    """One sampling in one context."""

    context: str
    begun_with: int | None = None  # the graph its first call reached
    step: int = 0
    start: tuple[float, ...] | None = None  # the clock at the first call
    clock: tuple[float, ...] | None = None  # and at the last
    record: StepRecord | None = None  # of the current step
    last: dict[tuple[Any, ...], int] = field(default_factory=dict)  # graph → the last step in which it ran
    buffers: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    kept: dict[tuple[Any, ...], Kept] = field(default_factory=dict)  # what does not change during the run
    computed: dict[tuple[Any, ...], list[int]] = field(default_factory=dict)  # steps that did not skip, the last ones
    bound: dict[tuple[Any, ...], dict[tuple[int, int], Any]] = field(default_factory=dict)  # the executors' own


class StepControl:
    """Counts model calls and keeps the runs apart. Nothing here reads a value from an accelerator."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, int], Run] = {}
        self._contexts: list[str] = []
        self._order: deque[StepRecord] = deque(maxlen=_KEPT)
        self._current: Run | None = None
        self._bounded = False
        self._seen: dict[tuple[Any, ...], int] = {}

    # -- what users do ----------------------------------------------------------------------------------------------

    def reset(self, context: str | None = None) -> None:
        """Forget the runs (of one context, or of all): the next call is step 0, and its caches are freed."""
        for key in list(self._runs):
            if context is None or key[0] == context:
                del self._runs[key]
        self._current = None
        self._seen = {}

    def enter(self, context: str) -> None:
        """Calls from now on belong to ``context``."""
        self._contexts.append(context)
        self._current = None

    @property
    def in_context(self) -> bool:
        """Whether the caller has named a context."""
        return bool(self._contexts)

    def leave(self) -> None:
        """Back to the context before."""
        self._contexts.pop()
        self._current = None

    @property
    def records(self) -> list[StepRecord]:
        """The steps of each context's last run, in call order; they outlive the run's caches."""
        return list(self._order)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all buffers alive."""
        alive = [b for run in self._runs.values() for b in run.buffers.values()]
        alive += [v for run in self._runs.values() for kept in run.kept.values() for v in kept.values.values()]
        return sum(b.numel() * b.element_size() for b in alive)

    # -- what the model object does -----------------------------------------------------------------------------------

    def begin_call(self) -> None:
        """A model call begins. Without this (a bare torch.compile), a call begins when a graph comes round again."""
        self._bounded, self._current, self._seen = True, None, {}

    def end_call(self, error: bool) -> bool:
        """The call ended; says whether any compiled graph ran in it. After an exception the run is void."""
        reached = bool(self._seen)
        if error:
            self.reset(self._contexts[-1] if self._contexts else "default")
        elif self._current is not None:
            self._current.step += 1
        self._bounded, self._current, self._seen = False, None, {}
        return reached

    # -- what a compiled graph does -----------------------------------------------------------------------------------

    def enter_graph(
        self, graph: int, instance: int, steps: int | None, clock: Sequence[Any]
    ) -> tuple[Run, tuple[int, ...]]:
        """A graph of the model is about to run.

        Args:
            graph: number of the graph.
            instance: tells apart several uses of one graph in one call (its first parameter).
            steps: number of rows of the plan; None for an endless one.
            clock: the inputs that carry the denoising time.

        Returns:
            The run, and the key of this graph's buffers in it.
        """
        place = (graph, instance)
        known = place in self._seen
        if not self._bounded and self._current is not None:
            other = not known and self._current.step > 0 and (*place, 0) not in self._current.last
            if known or other:  # the next call of this model, or the first of another
                if known:
                    self._current.step += 1
                self._current, self._seen = None, {}
        count = self._seen.get(place, 0)
        self._seen[place] = count + 1
        if self._current is None:
            self._current = self._run(graph, 0 if self._bounded else instance, steps, clock)
        return self._current, (*place, count)

    def record(self, run: Run, kind: StepKind) -> StepRecord:
        """The record of the current step, made by the first graph of a call."""
        if run.record is None or run.record.index != run.step:
            run.record = StepRecord(run.step, kind, run.context)
            self._order.append(run.record)
        return run.record

    def _run(self, graph: int, model: int, steps: int | None, clock: Sequence[Any]) -> Run:
        name = (self._contexts[-1] if self._contexts else "default", model)
        run = self._runs.get(name)
        now = _read(clock)
        if run is None or self._is_over(run, graph, steps, now):
            keep = run.buffers if run is not None and run.begun_with == graph else {}
            run = self._runs[name] = Run(name[0], graph, buffers=keep)
            self._order = deque((r for r in self._order if r.context != name[0]), maxlen=_KEPT)
        if now is not None:
            run.start = run.start or now
            run.clock = now
        return run

    def _is_over(self, run: Run, graph: int, steps: int | None, now: tuple[float, ...] | None) -> bool:
        if steps is not None and run.step >= steps:
            return True
        if run.begun_with != graph:
            log.info("context %r: another graph was reached at step %d; a new run begins", run.context, run.step)
            return True
        if now is not None and run.start is not None and run.clock is not None and _returned(run.start, run.clock, now):
            log.info("context %r: the timestep jumped back at step %d; a new run begins", run.context, run.step)
            return True
        return False


def _returned(start: Sequence[float], last: Sequence[float], now: Sequence[float]) -> bool:
    """Whether a clock that went from ``start`` to ``last`` now goes back by more than half of that. Samplers that add
    noise go back a little at every step; a new sampling goes back to its start."""
    return any((b - now_) * (b - a) > 0.5 * (b - a) ** 2 for a, b, now_ in zip(start, last, now, strict=False))


def _read(clock: Sequence[Any]) -> tuple[float, ...] | None:
    """The clock's values where they are host values already; None where reading them would make the host wait."""
    values: list[float] = []
    for value in clock:
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu" or value.numel() > 4096 or type(value) not in (torch.Tensor,):
                return None
            if value.dtype in (torch.bfloat16, torch.float16):
                value = value.float()
            values.extend(float(x) for x in value.detach().numpy().reshape(-1)[:1])
        elif isinstance(value, (int, float)):
            values.append(float(value))
    return tuple(values) or None
