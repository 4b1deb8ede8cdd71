"""Skipping: runs the graphs that stand in for a range of blocks, and decides at run time where the plan says so.

Whether a step skips may be known only while it runs, so the numbers of the range's history are worked out there, too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from toca_compile.ir.history import Past
from toca_compile.ir.plan import Skip
from toca_compile.ir.program import BlockRange
from toca_compile.ir.state import Number, Slot, State
from toca_compile.runtime.cache_state import allocate, bytes_of
from toca_compile.runtime.step_control import Run

Graph = tuple[Callable[..., Sequence[Any]], tuple[int, ...], tuple[Slot, ...]]


class RangeGraphs(Protocol):
    """Where the graphs of a range come from, which are compiled when they are first asked for."""

    def values(self, name: str) -> tuple[fx.Node, ...]:
        """The values that a graph chooses its arguments from."""
        ...

    def ready(self, name: str) -> bool:
        """Whether it is compiled."""
        ...

    def compiled(self, name: str) -> Graph:
        """``"keep"``, ``"skip"``, ``"probe"`` or ``"keep change"``."""
        ...

    def buffer(self, kind: State, position: int, index: int) -> torch.Tensor:
        """A fake tensor like a buffer."""
        ...


class Skipping:
    """The range of one executor.

    Args:
        found: the range.
        skip: what is kept of it, and the run-time test.
        place: where a value lies among the executor's.
        graphs: what stands in for it.
    """

    def __init__(self, found: BlockRange, skip: Skip, place: Mapping[fx.Node, int], graphs: RangeGraphs) -> None:
        self.range, self.skip_by, self.graphs = found, skip, graphs
        self._place = place
        self._places: dict[str, list[int]] = {}
        self._outputs = [place[n] for n in found.outputs]

    @property
    def names(self) -> tuple[str, ...]:
        """The graphs that a run needs."""
        return ("keep", "skip", "probe", "keep change") if self.range.probe is not None else ("keep", "skip")

    def uses(self, place: Mapping[fx.Node, int]) -> dict[int, int]:
        """The last segment up to which each value is needed here."""
        last = {place[n]: self.range.last - 1 for n in (*self.range.inputs, *self.range.outputs)}
        return {place[n]: self.range.first for n in self.range.probe or ()} | last

    def decide(self, planned: bool, values: Sequence[Any], run: Run, key: tuple[int, ...]) -> bool:
        """Whether this step skips the range. The one read of a device value, and only where there is a threshold."""
        past = run.computed.setdefault(key, Past())
        skips = planned and past.times > 0
        if self.skip_by.limit is not None and skips:
            skips = run.step - past.since <= self.skip_by.limit
        if self.skip_by.threshold is not None:
            if skips:
                (change,) = self._call("probe", values, run, key)
                skips = not bool(change > self.skip_by.threshold)
            if not skips:
                self._call("keep change", values, run, key)
        return skips

    def skip(self, values: list[Any], run: Run, key: tuple[int, ...]) -> None:
        """Put the range's outputs among the values."""
        for place, value in zip(self._outputs, self._call("skip", values, run, key), strict=True):
            values[place] = value

    def keep(self, values: Sequence[Any], run: Run, key: tuple[int, ...]) -> None:
        """The step computed the range: keep its outputs."""
        self._call("keep", values, run, key)
        past, depth = run.computed[key], self.skip_by.memory.depth
        run.computed[key] = Past((*past.full, run.step)[-(depth + 1) :], past.times + 1, min(past.times, depth))

    @property
    def planned_bytes(self) -> int:
        """Bytes of all buffers."""
        outputs = range(len(self.range.outputs))
        like = [self.graphs.buffer(State.OUTPUT, i, 0) for i in outputs]
        kept = [b for i in outputs for b in (like[i], *self.skip_by.memory.buffers(like[i]))]
        kept += [self.graphs.buffer(State.CHANGE, 0, 0)] if self.range.probe is not None else []
        return bytes_of(kept)

    def _call(self, name: str, values: Sequence[Any], run: Run, key: tuple[int, ...]) -> Sequence[Any]:
        call, used, slots = self.graphs.compiled(name)
        if name not in self._places:
            self._places[name] = [self._place[n] for n in self.graphs.values(name)]
        places = self._places[name]
        past = run.computed[key]
        numbers = self.skip_by.memory.numbers(past, run.step, past.made)
        given = [values[places[i]] for i in used]
        return call(*given, *(self._slot(slot, run, key, numbers) for slot in slots))

    def _slot(self, slot: Slot, run: Run, key: tuple[int, ...], numbers: Mapping[tuple[Number, int], int]) -> Any:
        if isinstance(slot.kind, Number):
            return numbers[slot.kind, slot.index]
        kind, index = slot.kind, slot.index
        name = (*key, kind, "range", slot.position, index)
        return allocate(run.buffers, name, lambda: self.graphs.buffer(kind, slot.position, index))
