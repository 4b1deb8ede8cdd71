"""StepControl: which step of which run a model call is.

A *run* is one sampling in one *context*: one for each guidance pass (``cache_context``, or found out), in one thread or
task. A call continues the run of its context or starts a new one at step 0: after ``reset``, after the plan's last
step, after an exception, and whenever what the host sees of the call (``sight``) says that another sampling began. Step
0 computes everything, so nothing of an older run is ever read. A run's buffers are freed when its last step is done.

Runs of one sampling that reach different graphs (texts of two lengths in turn, strides, grad modes) are runs of their
own, side by side. Where the caller tells the step, as pipelines do, it is one run that goes on in another graph.
"""

import asyncio
import logging
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from toca_compile.ir.history import Past
from toca_compile.ir.plan import kind_of
from toca_compile.ir.signature import UNKNOWN, Signature
from toca_compile.ir.state import State
from toca_compile.ir.types import StepKind
from toca_compile.progress import stages
from toca_compile.runtime.clock import Clock, device_of
from toca_compile.runtime.sight import NOTHING, Sight, Told, Verdict, Watch, is_plain, on_host
from toca_compile.runtime.times import Times

log = logging.getLogger(__name__)

_KEPT = 4096  # records kept: an endless run has no last step
_RESTARTS = 3  # samplings in a row that end after their first step: then something is wrong, and said


@dataclass
class StepRecord:
    """What one model call did. ``k``: how many tokens each site computed, by site name; ``compiled``: whether the
    compiler worked in it, so that its time says nothing of the step."""

    index: int
    kind: StepKind
    context: str
    k: dict[str, int] = field(default_factory=dict)
    compiled: bool = field(default=False, compare=False)
    _clocks: list[Clock] = field(default_factory=list, repr=False, compare=False)
    _done: dict[Any, frozenset[StepKind]] = field(default_factory=dict, repr=False, compare=False)

    def note(self, graph: Any, kinds: frozenset[StepKind], k: Mapping[str, int]) -> None:
        """One graph of the model did this in the step; the step's kind is that of all its graphs together."""
        self._done[graph] = kinds
        self.kind = kind_of(frozenset().union(*self._done.values()))
        self.k.update(k)

    @property
    def seconds(self) -> float:
        """How long it took, in seconds. On an accelerator this waits until the step is done."""
        return sum(clock.seconds for clock in self._clocks)

    @property
    def graphs(self) -> tuple[tuple[int, ...], ...]:
        """The graphs that ran: number, first parameter, how often before in this call."""
        return tuple(self._done)

    def skipped(self, graph: Any) -> bool:
        """Whether the graph skipped blocks in the step."""
        return StepKind.SKIP in self._done.get(graph, ())


@dataclass(frozen=True)
class RunConstants:
    """Values that were computed from some inputs, and how those were."""

    inputs: tuple[Any, ...]
    values: dict[int, torch.Tensor]

    @classmethod
    def of(cls, inputs: Sequence[Any], values: dict[int, torch.Tensor]) -> "RunConstants":
        """Remember what ``values`` came from."""
        return cls(tuple(_state(x) for x in inputs), values)

    def holds(self, inputs: Sequence[Any]) -> bool:
        """Whether these are the same inputs, unchanged: by object, version and address, and where they lie on the host
        by value. Changes of a tensor made in inference mode cannot be seen: those never hold."""
        return all(_unchanged(old, new) for old, new in zip(self.inputs, inputs, strict=True))


def _state(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_inference():
        return None
    content = _content(value)
    return Identity(value), value._version, _address(value), None if content is None else content.clone()


def _unchanged(old: Any, new: Any) -> bool:
    if not isinstance(new, torch.Tensor):
        return type(old) is type(new) and bool(old == new)
    if old is None or not old[0].is_this(new) or old[1:3] != (new._version, _address(new)):
        return False
    return old[3] is None or torch.equal(old[3], _content(new))  # type: ignore[arg-type]


class Identity:
    """Which tensor it was, without keeping it. A parameter is told by its number in the process and its memory: torch
    swaps none that something refers to weakly (``set_swap_module_params_on_conversion``)."""

    def __init__(self, value: torch.Tensor) -> None:
        own = isinstance(value, torch.nn.Parameter) and is_plain(value) and not value.is_meta
        self._memory = StorageWeakRef(value.untyped_storage()) if own else None
        self._object = id(value) if own else weakref.ref(value)

    def is_this(self, value: torch.Tensor) -> bool:
        """Whether this is the same object; of a parameter, given that it lies where that lay."""
        if self._memory is not None:
            return self._object == id(value) and not self._memory.expired()
        return self._object() is value  # type: ignore[operator]


def _address(value: torch.Tensor) -> int:
    return value.data_ptr() if is_plain(value) and not value.is_meta else 0


def _content(value: torch.Tensor) -> torch.Tensor | None:
    """What shows a write through ``.data`` or numpy, which leaves no trace but the values: inputs themselves; of
    weights, which are large, sums of every 16th row. None where the values are not the host's."""
    if not on_host(value):
        return None
    if isinstance(value, torch.nn.Parameter) and value.dim() > 1 and not value.is_complex():
        return value.detach()[::16].sum(-1, dtype=torch.float64)
    return value.detach()


@dataclass
class Run:
    """One sampling in one context, as far as it reaches one graph first."""

    context: str
    steps: int | None = None  # of the plan; None: endless
    step: int = 0
    record: StepRecord | None = None  # of the current step
    last: dict[tuple[Any, ...], int] = field(default_factory=dict)  # graph → the last step in which it ran
    schedules: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # and by which laid-out plan
    buffers: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    kept: dict[tuple[Any, ...], RunConstants] = field(default_factory=dict)  # what does not change during the run
    computed: dict[tuple[Any, ...], Past] = field(default_factory=dict)  # steps that did not skip their range
    drift: dict[tuple[Any, ...], float] = field(default_factory=dict)  # what a gate has added up since such a step
    bound: dict[tuple[Any, ...], dict[Any, Any]] = field(default_factory=dict)  # the executors' own
    fixed: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # the same: memory of CUDA graphs
    tables: dict[tuple[Any, ...], list[Any]] = field(default_factory=dict)  # and what follows from the time
    spent: bool = False  # its buffers were freed

    @property
    def is_over(self) -> bool:
        """Whether its last step was done."""
        return self.steps is not None and self.step >= self.steps

    def forget(self, key: tuple[Any, ...] = ()) -> None:
        """Free what a graph keeps in this run (of all graphs), but for the marks of fresh tokens."""
        for name in [n for n in self.buffers if n[: len(key)] == key and State.STAMP not in n]:
            del self.buffers[name]
        self.spent |= self.steps is not None and self.step >= self.steps - 1
        for kept in (self.kept, self.computed, self.drift, self.bound, self.fixed, self.tables):
            for name in [n for n in kept if n[: len(key)] == key]:
                del kept[name]


class _Stream:
    """The calls of one context in one thread."""

    def __init__(self, name: str, watch: Watch) -> None:
        self.name, self.watch = name, watch
        self.runs: dict[tuple[Any, ...], Run] = {}  # by pass and first graph
        self.before: set[tuple[Any, ...]] = set()  # those that took part in the step before this
        self.now: set[tuple[Any, ...]] = set()
        self.restarts = 0


class Unexpected(Exception):
    """A call that was made without Dynamo's guards, as a step that computes nothing anew, is none."""


class _Call(threading.local):
    """The model call that a thread is in. ``unguarded``: made without Dynamo's guards; ``known``: inputs on an
    accelerator whose numbers the host knows, by ``id``."""

    bounded = False
    unguarded = False
    inputs: Mapping[Any, Any] | None = None
    known: Mapping[int, Any] = NOTHING
    run: Run | None = None
    stream: _Stream | None = None
    clock: Clock | None = None
    stages = 0  # that the compiler had gone through when the call began, or the last graph was done
    seen: dict[tuple[Any, ...], int]

    def __init__(self) -> None:
        self.seen = {}


class _Owner:
    """Stands for a thread."""


class _Here(threading.local):
    def __init__(self) -> None:
        self.owner = _Owner()


@dataclass(frozen=True)
class _Entered:
    control: "weakref.ref[StepControl]"
    name: str
    told: Told | None


_HERE = _Here()
# Contexts belong to a thread or task: what one enters, others do not see. A function that is sent to another thread
# with its context (``asyncio.to_thread``) stays in the sampling that it came from.
_ENTERED: ContextVar[tuple[_Entered, ...]] = ContextVar("toca_contexts", default=())
_OWNER: ContextVar[Any] = ContextVar("toca_owner", default=None)


def _owner() -> Any:
    owner = _OWNER.get()
    if owner is not None:
        return owner
    if "asyncio" in sys.modules:
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None
        if task is not None:
            return task
    return _HERE.owner


def _bytes(tables: Mapping[Any, Sequence[Any]]) -> int:
    return sum(table.bytes for of_graph in tables.values() for table in of_graph)


def _called(context: str, lane: tuple[int, int]) -> str:
    """The name of a lane's records: the context's for its first picture and pass."""
    picture, number = lane
    parts = [f"picture {picture + 1}"] * bool(picture) + [f"pass {number + 1}"] * bool(number)
    if parts and context == "default":
        return " ".join(parts)
    return " ".join([context, *parts])


class StepControl:
    """Counts model calls and keeps the runs apart. Nothing here reads a value from an accelerator.

    Args:
        warn: says something to the user once.
    """

    def __init__(self, warn: Callable[[str], None] = log.warning) -> None:
        self._warn = warn
        self._streams: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], _Stream]] = weakref.WeakKeyDictionary()
        self._records: deque[tuple[weakref.ref[Any], StepRecord]] = deque(maxlen=_KEPT)
        self._directions: dict[Any, float] = {}
        self._call = _Call()
        self._peak = 0
        self._conditioned = 0
        self.calls = 0  # that are over
        self._void: weakref.WeakSet[Any] = weakref.WeakSet()  # threads whose records are of a sampling that is over
        self._announced: weakref.WeakKeyDictionary[Any, Signature] = weakref.WeakKeyDictionary()
        self.lock = threading.RLock()  # a model runs one call at a time
        self.tables: dict[tuple[int, ...], list[Any]] = {}  # the executors' own, by graph: what follows from the time
        self.fixed: dict[tuple[int, ...], list[Any]] = {}  # the same: memory of CUDA graphs

    # -- what users do ----------------------------------------------------------------------------------------------

    def reset(self, context: str | None = None, *, mine: bool = False) -> None:
        """Forget the runs (of one context and its passes, or of all; or ``mine``: of this thread or task alone): the
        next call is step 0, and its caches are freed."""
        self._note_peak()
        if context is None:
            for owner in [_owner()] if mine else list(self._announced):
                self._announced.pop(owner, None)
        for streams in [self._streams.get(_owner(), {})] if mine else list(self._streams.values()):
            for key in [k for k, s in streams.items() if context is None or s.name == context]:
                del streams[key]
        self._call.run, self._call.stream, self._call.seen = None, None, {}
        if context is None:
            self._void.update([_owner()] if mine else [owner for owner in (o() for o, _ in self._records) if owner])
        if context is None and not mine:
            self._directions.clear()
            self.tables.clear()
            self.fixed.clear()

    def announce(self, facts: Signature) -> None:
        """Samplings of this thread or task will be as these facts say, until ``reset``."""
        self._announced[_owner()] = facts

    @property
    def announced(self) -> Signature:
        """What the caller has announced, timesteps above all."""
        return self._announced.get(_owner(), UNKNOWN)

    @property
    def known(self) -> Mapping[int, Any]:
        """In the call that this thread is in, inputs on an accelerator whose numbers the host knows, by ``id``."""
        return self._call.known

    @property
    def times(self) -> Times:
        """What the host knows of the time in that call."""
        return Times(self.announced.times or (), self.known)

    def undo(self, context: str) -> None:
        """As if there had been no call in this context."""
        self.reset(context)
        for entry in [entry for entry in self._records if entry[1].context == context]:
            self._records.remove(entry)

    def forget_graphs(self, numbers: set[int]) -> None:
        """Forget the runs that began with one of these graphs."""
        self.tables = {key: tables for key, tables in self.tables.items() if key[0] not in numbers}
        self.fixed = {key: fixed for key, fixed in self.fixed.items() if key[0] not in numbers}
        for streams in list(self._streams.values()):
            for stream in streams.values():
                for which in [w for w in stream.runs if w[1] in numbers]:
                    del stream.runs[which]

    def enter(self, context: str, told: Told | None = None) -> tuple[Token[Any], Token[Any]]:
        """Calls from now on belong to ``context``, in this thread or task."""
        self._call.run = None
        return (
            _ENTERED.set((*_ENTERED.get(), _Entered(weakref.ref(self), context, told))), _OWNER.set(_owner())
        )  # fmt: skip

    def leave(self, tokens: tuple[Token[Any], Token[Any]]) -> None:
        """Back to the context before."""
        _ENTERED.reset(tokens[0])
        _OWNER.reset(tokens[1])
        self._call.run = None

    @property
    def context(self) -> str | None:
        """The context that the caller has named."""
        return next((e.name for e in reversed(_ENTERED.get()) if e.control() is self), None)

    @property
    def call_inputs(self) -> Mapping[Any, Any]:
        """What the model was called with, in the call that this thread is in; nothing where nobody says."""
        return self._call.inputs or {}

    @property
    def running(self) -> Run | None:
        """The run of the call that this thread is in."""
        return self._call.run

    @property
    def records(self) -> list[StepRecord]:
        """The steps of the last sampling, in call order; they outlive its caches."""
        return [record for _, record in self._records]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all buffers alive."""
        alive = [b for run in self.runs for b in run.buffers.values()]
        alive += [v for run in self.runs for kept in run.kept.values() for v in kept.values.values()]
        alive += [b for held in self.fixed.values() for fixed in held for b in fixed.tensors]
        return sum(b.numel() * b.element_size() for b in {id(b): b for b in alive}.values())

    @property
    def conditioning_bytes(self) -> int:
        """Bytes of what is kept by time (``conditioning.py``): from one sampling to the next, or at most in one."""
        self._note_peak()
        return max(_bytes(self.tables), self._conditioned)

    @property
    def peak_bytes(self) -> int:
        """The most that was alive in the last sampling. Buffers are made as steps need them and freed at a run's end,
        so that this is known by looking before each end."""
        self._note_peak()
        return self._peak

    def _note_peak(self) -> None:
        self._peak = max(self._peak, self.cache_bytes)
        self._conditioned = max(self._conditioned, sum(_bytes(run.tables) for run in self.runs))

    @property
    def runs(self) -> list[Run]:
        """The runs that are not over."""
        streams = [s for streams in list(self._streams.values()) for s in streams.values()]
        return [run for stream in streams for run in stream.runs.values() if not run.spent]

    @property
    def time_is_visible(self) -> bool:
        """Whether an abandoned sampling can be told from its continuation, as far as is known."""
        streams = [s for streams in list(self._streams.values()) for s in streams.values()]
        return all(s.watch.time_is_visible for s in streams)

    # -- what the model object does -----------------------------------------------------------------------------------

    def begin_call(self, inputs: Mapping[Any, Any], known: Mapping[int, Any] = NOTHING) -> None:
        """A model call begins. Without this (a bare torch.compile), a call begins when a graph comes round again.
        ``known``: those of the inputs that lie on an accelerator and whose numbers the host knows, by ``id``."""
        call = self._call
        call.bounded, call.inputs, call.run, call.stream, call.seen = True, inputs, None, None, {}
        call.known = known
        call.clock, call.stages = Clock(device_of(inputs.values())), stages()

    def coming(self) -> Run | None:
        """The run that the next call of this thread or task goes on with, if it is a step of the same sampling: None
        where there is none, or several take turns."""
        stream = self._streams.get(_owner(), {}).get((self.context or "default",))
        runs = list(stream.runs.values()) if stream is not None else []
        return runs[0] if len(runs) == 1 and runs[0].step and not runs[0].is_over else None

    @contextmanager
    def unguarded(self) -> Iterator[None]:
        """Graphs that run inside raise ``Unexpected`` where they would compute all of a step."""
        self._call.unguarded = True
        try:
            yield
        except Unexpected:
            self._call.seen = {}  # the call is judged; its graphs are about to run
            raise
        finally:
            self._call.unguarded = False

    def expected(self, cached: bool) -> None:
        """Whether a graph about to run takes what it computes from caches.

        Raises:
            Unexpected: it does not, and nobody looked at the model's guards.
        """
        if self._call.unguarded and not cached:
            raise Unexpected

    def end_call(self, error: bool, outputs: Sequence[tuple[int, ...]] = ()) -> bool:
        """The call ended; says whether any compiled graph ran in it. After an exception the run is void."""
        call = self._call
        reached = bool(call.seen)
        self.calls += 1
        self._time(call.run)
        if error:
            self.void()
        elif call.run is not None and call.stream is not None:
            call.stream.watch.outputs = list(outputs)
            call.run.step += 1
            if call.run.is_over:
                self._note_peak()
                call.run.forget()
        call.bounded, call.inputs, call.run, call.stream, call.seen = False, None, None, None, {}
        call.known = NOTHING
        return reached

    def void(self) -> None:
        """What the caller's context holds is worth nothing: a call failed."""
        streams = self._streams.get(_owner(), {})
        name = self.context or "default"
        for key in [k for k, s in streams.items() if s.name == name]:
            del streams[key]
        self._call.run = None

    # -- what a compiled graph does -----------------------------------------------------------------------------------

    def enter_graph(
        self, graph: int, instance: int, steps: int | None, inputs: Mapping[Any, Any], clock: Sequence[Any]
    ) -> tuple[Run, tuple[int, ...]]:
        """A graph of the model is about to run.

        Args:
            graph: number of the graph.
            instance: tells apart several uses of one graph in one call (its first parameter).
            steps: number of rows of the plan; None for an endless one.
            inputs: those of the graph that are no parameters.
            clock: those that carry the denoising time.

        Returns:
            The run, and the key of this graph's buffers in it.
        """
        call = self._call
        place = (graph, instance)
        known = place in call.seen
        if not call.bounded and call.run is not None:
            other = not known and call.run.step > 0 and (*place, 0) not in call.run.last
            if known or other:  # the next call of this model, or the first of another
                if known:
                    call.run.step += 1
                    self.calls += 1
                call.run, call.seen = None, {}
        count = call.seen.get(place, 0)
        call.seen[place] = count + 1
        if not call.bounded:
            call.clock = Clock(device_of(inputs.values()))
        if call.run is None:
            seen = call.inputs if call.bounded and call.inputs is not None else inputs
            if call.known:
                as_host = self.times.as_host
                seen, clock = {k: as_host(v) for k, v in seen.items()}, [as_host(v) for v in clock]
            call.run = self._run(place if not call.bounded else (graph,), steps, seen, clock)
        return call.run, (*place, count)

    def reached(self, graph: int) -> bool:
        """A graph of the model runs in the call whose steps somebody else counts; whether it is the first."""
        first = not self._call.seen
        self._call.seen[(graph,)] = 1
        return first

    def leave_graph(self, run: Run, key: tuple[int, ...], outputs: Sequence[tuple[int, ...]]) -> None:
        """A graph has run. Where nobody says when a call ends, each graph frees its own at the last step."""
        call = self._call
        if not call.bounded and call.stream is not None:
            self._time(run)
            call.stream.watch.outputs = list(outputs)
            if run.steps is not None and run.step >= run.steps - 1:
                self._note_peak()
                run.forget(key)

    def _time(self, run: Run | None) -> None:
        """A call is over, or where nobody says so a graph: how long it took, and whether the compiler was at work."""
        call = self._call
        if call.clock is not None and run is not None and run.record is not None:
            call.clock.stop()
            run.record._clocks.append(call.clock)
            run.record.compiled |= call.stages != stages()
        call.clock, call.stages = None, stages()

    def record(self, run: Run) -> StepRecord:
        """The record of the current step, made by the first graph of a call."""
        if run.record is None or run.record.index != run.step:
            run.record = StepRecord(run.step, StepKind.FULL, run.context)
            self._records.append((weakref.ref(_owner()), run.record))
        return run.record

    def _run(self, place: tuple[int, ...], steps: int | None, inputs: Mapping[Any, Any], clock: Sequence[Any]) -> Run:
        owner = _owner()
        name = self.context or "default"
        streams = self._streams.setdefault(owner, {})
        key = (name, *place[1:])
        if key not in streams:
            streams[key] = _Stream(name, Watch(self._directions))
        stream = self._call.stream = streams[key]
        told = next((e.told for e in reversed(_ENTERED.get()) if e.control() is self and e.told), None)
        watch = stream.watch
        before = watch.group[-1].tensors if watch.group else NOTHING
        had, sight = watch.steps, Sight.of(place[0], clock, inputs, told, before)
        verdict = watch.judge(sight)
        first = stream.runs.get((sight.lane, place[0]))
        # Where a graph is new (the model was changed after a sampling), what went on is over when all runs are.
        going = [first] if first is not None else list(stream.runs.values())
        if verdict is Verdict.NEXT and going and all(run.is_over for run in going):
            had = 0  # as it should be
            watch.restart()
            verdict = watch.judge(sight)
        if verdict is Verdict.NEW:
            self._restarted(stream, had)
            stream.runs.clear()
            self._begin_records(owner, name)
        if verdict is not Verdict.PASS:
            stream.before, stream.now = stream.now if verdict is Verdict.NEXT else set(), set()
            self._drop_lanes(owner, stream)
        which = (sight.lane, place[0])
        run = stream.runs.get(which)
        if run is not None and not run.is_over and not watch.time_is_visible and which not in stream.before:
            # Another graph ran in between, and whether in the same sampling nobody can tell.
            self._warn(
                f"context {name!r}: calls of different signatures take turns (lengths of text, strides, grad modes, "
                "…) while the timestep is not visible to the host, so no cache is reused across them: pad to one "
                "signature, or tell cache_context(name, step_index=…)"
            )
            run = None
        if run is None and verdict is Verdict.NEXT and told is not None and told.step_index is not None:
            run = self._handed_over(stream, which, steps)
        if run is None or run.is_over:
            context = _called(name, sight.lane)
            run = stream.runs[which] = Run(context, steps)
        elif not watch.time_is_visible and run.step == 1:
            self._warn(
                "the timestep is no host value here, so an abandoned sampling cannot be told from its continuation, "
                "and what follows from the time is computed in each step: loop over what begin(timesteps) returns; or "
                "call reset() when you abandon one, or tell cache_context(name, step_index=…)"
            )
        stream.now.add(which)
        return run

    def _handed_over(self, stream: _Stream, which: Any, steps: int | None) -> Run | None:
        """The run that took the step before in another graph, if this one goes on with it: autocast turns the latents
        into another dtype after the first step, or guidance ends and with it half of the batch."""
        lane, _ = which
        for before in stream.before:
            run = stream.runs.get(before)
            if before[0] == lane and run is not None and run.steps == steps and not run.is_over:
                stream.runs[which] = stream.runs.pop(before)
                return run
        return None

    def _drop_lanes(self, owner: Any, stream: _Stream) -> None:
        """Of pictures sampled in turns, forget those that took no part in the step before: abandoned for another."""
        alive = {lane for (lane, _), _ in stream.before}
        for which in [w for w in stream.runs if alive and w[0][0] not in alive]:
            gone = stream.runs.pop(which).context
            kept = [(o, r) for o, r in self._records if o() is not owner or r.context != gone]
            self._records = deque(kept, maxlen=_KEPT)

    def _restarted(self, stream: _Stream, steps: int) -> None:
        """Log that a sampling began before the last was done, and warn where that happens at every step."""
        if not steps:
            return
        log.info("context %r: %s after %d steps; a new run begins", stream.name, stream.watch.why, steps)
        stream.restarts = stream.restarts + 1 if steps == 1 else 0
        if stream.restarts == _RESTARTS:
            self._warn(
                f"context {stream.name!r}: every call counts as the first of a new sampling, so nothing is reused: "
                f"{stream.watch.why}. If they are steps of one, tell cache_context(name, step_index=…); if "
                "of several in turns, give each a cache_context(name) of its own"
            )

    def _begin_records(self, owner: Any, context: str) -> None:
        """A sampling begins: what is recorded is this one, not an earlier one of the same thread."""
        self._peak = self._conditioned = 0
        over = owner in self._void or any(o() is owner and r.context == context for o, r in self._records)
        kept = [(o, r) for o, r in self._records if o() is not None and not (over and o() is owner)]
        self._records = deque(kept, maxlen=_KEPT)
        self._void.discard(owner)
