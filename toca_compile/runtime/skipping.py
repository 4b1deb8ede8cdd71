"""Skipping: runs the graphs that stand in for a range of blocks, and decides at run time where the plan says so."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from toca_compile.ir.graph import value_of
from toca_compile.ir.plan import Skip
from toca_compile.ir.program import BlockRange, Slot
from toca_compile.runtime.step_control import Run

Graph = tuple[Callable[..., Sequence[Any]], tuple[int, ...], tuple[Slot, ...]]


class Skipping:
    """The range of one executor.

    Args:
        found: the range.
        skip: what is kept of it, and the run-time test.
        place: where a value lies among the executor's.
        compiled: makes the callable of a graph: ``"keep"``, ``"skip"``, ``"probe"`` or ``"keep probe"``.
    """

    def __init__(
        self, found: BlockRange, skip: Skip, place: Mapping[fx.Node, int], compiled: Callable[[str], Graph]
    ) -> None:
        self.range, self.skip_by, self._compiled = found, skip, compiled
        ends = found.probe or ()
        self._values = {
            "keep": [place[n] for n in dict.fromkeys((*found.inputs, *found.outputs))],
            "skip": [place[n] for n in found.inputs],
            "probe": [place[n] for n in ends],
            "keep probe": [place[n] for n in ends],
        }
        self._outputs = [place[n] for n in found.outputs]
        self._graphs: dict[str, Graph] = {}

    def uses(self, place: Mapping[fx.Node, int]) -> dict[int, int]:
        """The last segment up to which each value is needed here."""
        last = {place[n]: self.range.last - 1 for n in (*self.range.inputs, *self.range.outputs)}
        return {place[n]: self.range.first for n in self.range.probe or ()} | last

    def decide(self, planned: bool, values: Sequence[Any], run: Run, key: tuple[int, ...]) -> bool:
        """Whether this step skips the range. The one read of a device value, and only where there is a threshold."""
        computed = run.computed.setdefault(key, [])
        skips = planned and bool(computed)
        if self.skip_by.limit is not None and skips:
            skips = run.step - computed[-1] <= self.skip_by.limit
        if self.skip_by.threshold is not None:
            if skips:
                (change,) = self._call("probe", values, run, key)
                skips = not bool(change > self.skip_by.threshold)
            if not skips:
                self._call("keep probe", values, run, key)
        return skips

    def skip(self, values: list[Any], run: Run, key: tuple[int, ...]) -> None:
        """Put the range's outputs among the values."""
        for place, value in zip(self._outputs, self._call("skip", values, run, key), strict=True):
            values[place] = value

    def keep(self, values: Sequence[Any], run: Run, key: tuple[int, ...]) -> None:
        """The step computed the range: keep its outputs."""
        computed = run.computed.setdefault(key, [])
        computed[:] = [*computed, run.step][-(self.skip_by.memory.order + 1) :]
        self._call("keep", values, run, key)

    @property
    def planned_bytes(self) -> int:
        """Bytes of all buffers."""
        count = self.skip_by.memory.order + 1
        slots = [Slot("cache", i) for i in range(len(self.range.outputs)) for _ in range(count)]
        slots += [Slot("change", 0)] if self.range.probe is not None else []
        return sum(b.numel() * b.element_size() for b in (range_buffer(s, self.range, self.skip_by) for s in slots))

    def _call(self, name: str, values: Sequence[Any], run: Run, key: tuple[int, ...]) -> Sequence[Any]:
        if name not in self._graphs:
            self._graphs[name] = self._compiled(name)
        call, used, slots = self._graphs[name]
        given = [values[self._values[name][i]] for i in used]
        return call(*given, *(self._slot(slot, run, key) for slot in slots))

    def _slot(self, slot: Slot, run: Run, key: tuple[int, ...]) -> Any:
        memory, computed = self.skip_by.memory, run.computed[key]
        if slot.kind == "spacing":
            return memory.spacing(computed, slot.index)
        if slot.kind == "power":
            return memory.power(computed, run.step, slot.index) if slot.index < len(computed) else 0
        name = (*key, slot.kind, "range", slot.position, slot.index)
        if name not in run.buffers:
            like = range_buffer(slot, self.range, self.skip_by)
            with torch.inference_mode(False):
                run.buffers[name] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        return run.buffers[name]


def range_buffer(slot: Slot, found: BlockRange, skip: Skip) -> torch.Tensor:
    """A fake tensor of the shape, dtype and device of a buffer of the range."""
    node = found.probe[0] if slot.kind == "change" and found.probe is not None else found.outputs[slot.position]
    value: torch.Tensor = value_of(node)
    return value.new_empty(value.shape, dtype=None if slot.kind == "change" else skip.memory.dtype)
