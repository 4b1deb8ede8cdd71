"""CUDA graphs: the calls of a step, recorded once for each distinct row of the plan, and replayed.

A replay repeats kernels; it runs no Python. So whatever changes from step to step lies at an address that stays: the
inputs are copied there, the numbers of a step are written there, and buffers are not freed with the run but given to
the next one (``Fixed``). The number of tokens alone is part of a graph: it is a shape (``compiler/buckets.py``).
"""

import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from toca_compile.runtime.cache_state import Buffers
from toca_compile.runtime.sight import is_plain
from toca_compile.runtime.step_control import Run

T = TypeVar("T")

MODES = ("default", "reduce-overhead")
_BLOCK = 512  # numbers that lie together
_WASTED = 8  # recordings in a row that were replayed once at most: then they cost more than they save


class Capture(Protocol):
    """How calls are recorded. What ``capture`` is given must not run; what it returns runs it, any number of times,
    and yields what it made, which lies where it lay before."""

    device: torch.device

    def turn(self) -> AbstractContextManager[None]:
        """Around all work of a step: it is done behind that of the step before, on whichever stream that was."""
        ...

    def warm_up(self, call: Callable[[], T]) -> T:
        """Run what is recorded next, so that what is set up at a first call is not recorded."""
        ...

    def capture(self, call: Callable[[], Sequence[torch.Tensor]]) -> Callable[[], Sequence[torch.Tensor]]:
        """Record a call."""
        ...


class CudaGraphs:
    """CUDA's own, in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._side, self._done = torch.cuda.Stream(device), torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done.record()

    def warm_up(self, call: Callable[[], T]) -> T:
        # On the stream of the recordings, so that the workspaces of cuBLAS, one a stream, are not made in the pool.
        here = torch.cuda.current_stream()
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            made = call()
        here.wait_stream(self._side)
        return made

    def capture(self, call: Callable[[], Sequence[torch.Tensor]]) -> Callable[[], Sequence[torch.Tensor]]:
        graph = torch.cuda.CUDAGraph()
        # The default would forbid other threads to allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            made = call()

        def replay() -> Sequence[torch.Tensor]:
            graph.replay()
            return made

        return replay


CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaGraphs}
"""By the type of device."""


class Numbers:
    """The host numbers of a step, as tensors without dimensions."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[torch.Tensor] = []
        self._rows: dict[Hashable, int] = {}

    def at(self, name: Hashable) -> torch.Tensor:
        """Where a number lies: int64."""
        row = self._rows.setdefault(name, len(self._rows))
        if row == _BLOCK * len(self._blocks):
            with torch.inference_mode(False):
                # Two a row: Inductor copies what is not aligned to 16 bytes.
                self._blocks.append(torch.zeros(_BLOCK, 2, dtype=torch.int64, device=self._device))
        return self._blocks[row // _BLOCK][row % _BLOCK, 0]

    def pack(self, told: Mapping[Hashable, int]) -> torch.Tensor:
        """Some of them, as they are written."""
        values = [0] * (2 * _BLOCK * len(self._blocks) if told else 0)
        for name, number in told.items():
            values[2 * self._rows[name]] = number
        return torch.tensor(values, dtype=torch.int64).view(-1, _BLOCK, 2)

    def write(self, packed: torch.Tensor) -> None:
        """Write those; the others are then anything."""
        for block, part in zip(self._blocks, packed, strict=False):
            block.copy_(part, non_blocking=True)  # the host does not wait: what is not pinned is staged first


@dataclass(eq=False)
class _Recording:
    """A graph, the places of the values that it takes by copy, those of the weights that it reads, and their
    addresses."""

    replay: Callable[[], Sequence[torch.Tensor]]
    copied: list[int]
    weights: list[int]
    addresses: list[int]
    replays: int = 0


Told = tuple[tuple[int, ...], torch.Tensor]


class Fixed:
    """Memory whose addresses stay, of one run of one graph of the model at a time, and what was recorded over it."""

    def __init__(self, device: torch.device) -> None:
        self.numbers = Numbers(device)
        # By schedule, which the executor forgets some day, and row; None for one that has run and is not recorded yet.
        self.rows: weakref.WeakKeyDictionary[Any, dict[Hashable, _Recording | None]] = weakref.WeakKeyDictionary()
        # In the same way, by step and what it calls: how many tokens, and the other numbers.
        self.steps: weakref.WeakKeyDictionary[Any, dict[Hashable, Told]] = weakref.WeakKeyDictionary()
        self._buffers: Buffers = {}
        self._inputs: dict[int, torch.Tensor] = {}
        self._flat: dict[int, torch.Tensor] = {}  # the same, as they are copied
        self._sources: dict[int, weakref.ref[torch.Tensor]] = {}  # of values of ours that lie in the inputs now
        self._run: weakref.ref[Run] | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What it holds of caches and inputs."""
        return [*self._buffers.values(), *self._inputs.values()]

    @property
    def graphs(self) -> int:
        """How many were recorded."""
        return sum(recording is not None for rows in self.rows.values() for recording in rows.values())

    def is_free(self, key: tuple[int, ...]) -> bool:
        """Whether no run has it."""
        run = self._run() if self._run is not None else None
        return run is None or run.fixed.get(key) is not self

    def take(self, run: Run, key: tuple[int, ...]) -> None:
        """It is that run's; buffers that another graph handed over are copied."""
        self._run, run.fixed[key] = weakref.ref(run), self
        for name, buffer in run.buffers.items():
            if name[: len(key)] == key:
                run.buffers[name] = self._place(name, buffer).copy_(buffer)

    def allocate(self, buffers: Buffers, name: tuple[Any, ...], like: torch.Tensor) -> torch.Tensor:
        """A run's buffer, zeroed when it is first asked for."""
        if name not in buffers:
            buffers[name] = self._place(name, like).zero_()
        return buffers[name]

    def input(self, place: int, like: torch.Tensor) -> torch.Tensor:
        """Where a value is copied to. One of another layout voids what was recorded."""
        known = self._inputs.get(place)
        if known is None or _layout(known) != _layout(like):
            with torch.inference_mode(False):
                self._inputs[place] = _copy(like)
                self._flat[place] = _bytes(self._inputs[place])
            self._sources.pop(place, None)
            if known is not None:
                self.rows.clear()
        return self._inputs[place]

    def fits(self, places: Sequence[int], values: Sequence[Any]) -> bool:
        """Whether values can be copied to where those of earlier steps were."""
        return all(_layout(self._inputs[p]) == _layout(values[p]) for p in places)

    def copy_in(self, places: Sequence[int], values: Sequence[Any], ours: int) -> None:
        """Copy values to where graphs read them. Those from place ``ours`` on are the executor's, which nobody writes
        to: they are copied once."""
        stale = [p for p in places if p < ours or self._sources.get(p, _nothing)() is not values[p]]
        self._sources |= {p: weakref.ref(values[p]) for p in stale if p >= ours}
        stale = [p for p in stale if values[p].numel()]
        if stale:
            torch._foreach_copy_([self._flat[p] for p in stale], [_bytes(values[p]) for p in stale])

    def _place(self, name: tuple[Any, ...], like: torch.Tensor) -> torch.Tensor:
        known = (*name, tuple(like.shape), like.dtype, like.device)
        if known not in self._buffers:
            with torch.inference_mode(False):
                self._buffers[known] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        return self._buffers[known]


@dataclass(frozen=True)
class Work:
    """What is recorded.

    Args:
        reads: the places of the values that it reads, but for constants.
        makes: those of the values that are asked for behind it.
        call: changes a list of values.
    """

    reads: Sequence[int]
    makes: Sequence[int]
    call: Callable[[list[Any]], object]


class Graphs:
    """The graphs of one executor.

    Args:
        capture: how they are recorded.
        names: of the executor's inputs.
        weights: which of them are parameters and buffers, read where they lie.
        warn: says something to the user once.

    Attributes:
        refused: nothing is recorded or replayed (any more).
    """

    def __init__(
        self, capture: Capture, names: Sequence[str], weights: Sequence[bool], warn: Callable[[str], None]
    ) -> None:
        self.capture, self.warn, self.refused = capture, warn, False
        self._names, self._weights, self._wasted = names, weights, 0

    def refuse(self, why: str) -> None:
        """From now on there are none."""
        self.refused = True
        self.warn(without(why))

    def fixed(self, run: Run, key: tuple[int, ...], known: list[Any]) -> Fixed:
        """The memory of a graph in a run: one of those that no run has any more, or a new one."""
        if key not in run.fixed:
            free = next((fixed for fixed in known if fixed.is_free(key)), None)
            if free is None:
                free = Fixed(self.capture.device)
                known.append(free)
            free.take(run, key)
        found: Fixed = run.fixed[key]
        return found

    def run(self, fixed: Fixed, schedule: Any, row: tuple[Hashable, ...], values: list[Any], work: Work) -> None:
        """Make some values of a step from others: by a call, or by a replay of what it did before.

        Args:
            schedule: the plan; rows are its own.
            row: what the step does.
            values: of the step, by place.
        """
        if self.refused:
            fixed.rows.clear()
            work.call(values)
            return
        rows = fixed.rows.setdefault(schedule, {})
        row = (*row, *(values[p] for p in work.reads if not isinstance(values[p], torch.Tensor)))
        if row not in rows:
            rows[row] = None
            self.capture.warm_up(lambda: work.call(values))
            for place in work.makes:
                values[place] = _copy(values[place])  # it was made on another stream
            return
        recording = rows[row]
        if recording is None or not self._holds(recording, fixed, values):
            if recording is not None:
                self._count(recording)
            recording = self._record(fixed, values, work)
            if recording is None:
                work.call(values)
                return
            fixed.rows.setdefault(schedule, {})[row] = recording
        fixed.copy_in(recording.copied, values, len(self._weights))
        recording.replays += 1
        for place, made in zip(work.makes, recording.replay(), strict=True):
            values[place] = _copy(made)

    def _record(self, fixed: Fixed, values: Sequence[Any], work: Work) -> _Recording | None:
        own, copied = list(values), []
        weights = [place for place in work.reads if self._is_weight(place)]
        for place in work.reads:
            if self.refused or not isinstance(values[place], torch.Tensor):
                continue
            why = self._why_not(place, values[place])
            if why is not None:
                self.refuse(why)
            elif not self._is_weight(place):
                own[place] = fixed.input(place, values[place])
                copied.append(place)
        if self.refused:
            return None

        def recorded() -> list[torch.Tensor]:
            made = list(own)
            work.call(made)
            return [made[place] for place in work.makes]

        try:
            replay = self.capture.capture(recorded)
            return _Recording(replay, copied, weights, [values[place].data_ptr() for place in weights])
        except Exception as error:  # whatever cannot be recorded; nothing of it was done
            said = next(iter(str(error).splitlines()), "")
            self.refuse(f"a step cannot be recorded ({type(error).__name__}: {said})")
            return None

    def _holds(self, recording: _Recording, fixed: Fixed, values: Sequence[Any]) -> bool:
        """Whether a graph does what the call would: weights lie where they lay, and inputs as they did."""
        if recording.addresses != [values[place].data_ptr() for place in recording.weights]:
            return False
        return fixed.fits([place for place in recording.copied if place < len(self._weights)], values)

    def _is_weight(self, place: int) -> bool:
        return place < len(self._weights) and self._weights[place]

    def _why_not(self, place: int, value: torch.Tensor) -> str | None:
        name = self._names[place] if place < len(self._names) else "a value of the model"
        if not is_plain(value):
            return f"{name} is no plain tensor ({type(value).__name__}, {value.layout})"
        if value.device != self.capture.device:
            here = self.capture.device
            return f"{name} lies on {value.device}, so that a graph would keep its numbers: pass it on {here}"
        return None

    def _count(self, recording: _Recording) -> None:
        """What was recorded is void."""
        self._wasted = self._wasted + 1 if recording.replays < 2 else 0
        if self._wasted > _WASTED:
            self.refuse("the weights lie somewhere else at each call, as where they are offloaded")


def capture_for(devices: Collection[torch.device]) -> Capture | str:
    """How graphs of a model on these devices are recorded, or why they are not."""
    if len(devices) > 1:
        return f"the model lies on several devices ({', '.join(sorted(map(str, devices)))})"
    device = next(iter(devices), torch.device("cpu"))
    make = CAPTURES.get(device.type)
    return make(device) if make is not None else f"the model lies on {device.type}, which has none"


def without(why: str) -> str:
    """That a mode that asks for graphs has none."""
    return f"mode='reduce-overhead' runs without CUDA graphs: {why}"


def _nothing() -> None:
    return None


def _layout(value: torch.Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype


def _bytes(value: torch.Tensor) -> torch.Tensor:
    """All that lies between a tensor's first number and its last, whatever its strides."""
    if value.dim() and value.is_contiguous():
        return value.detach().view(torch.uint8)
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.detach().as_strided((span,), (1,), value.storage_offset()).view(torch.uint8)


def _copy(value: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same numbers and strides."""
    if not value.numel():
        return value.clone()
    if value.is_contiguous():
        return value.detach().clone()
    return _bytes(value).clone().view(value.dtype).as_strided(value.shape, value.stride())
