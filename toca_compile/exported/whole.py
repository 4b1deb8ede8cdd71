"""A model whose steps are one call: ``program`` makes one of a model, ``load`` of a file that holds such a step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from toca_compile.exported.loaded import KEY, LoadedModel, laid_as
from toca_compile.exported.table import About
from toca_compile.ir.history import Past
from toca_compile.ir.table import Table, at
from toca_compile.ir.types import StepKind
from toca_compile.runtime.step_state import StepState, begun, computed


class Steps(Protocol):
    """Whole steps as one callable."""

    def begin(self, caches: Sequence[Tensor], step: int, past: Past) -> StepState:
        """The buffers of a run that is about to do a step."""
        ...

    def __call__(self, state: StepState, inputs: Sequence[Any], index: int) -> Sequence[Any]:
        """The results of a step. ``index``: of the step among the plan's."""
        ...

    def computed(self, state: StepState, past: Past) -> bool:
        """Whether the last step computed what it could skip."""
        ...


class WholeModel(LoadedModel):
    """A model with its caches, called as the exported one was: each call is the next step of its run.

    Args:
        about, table, tensors: as of ``LoadedModel``.
        steps: what is called.
        inputs: how many values it is given of what stands at the first places.
    """

    def __init__(self, about: About, table: Table, tensors: Mapping[str, Tensor], steps: Steps, inputs: int) -> None:
        super().__init__(about, table, tensors, {})
        self._whole, self._inputs = steps, inputs

    def _step(self, given: Mapping[int, Tensor]) -> list[Any]:
        table, control = self._table, self._control
        values = [given.get(place, value) for place, value in enumerate(self._values[: self._inputs])]
        steps = None if table.endless else len(table.steps)
        run, _ = control.enter_graph(0, 0, steps, given, [values[i] for i in table.clock])
        index = min(run.step, len(table.steps) - 1)
        step, past = table.steps[index], run.computed.get(KEY, Past())
        run.last[KEY] = run.step
        bound = run.bound.setdefault(KEY, {})
        if self not in bound:
            caches = [self._buffer(i, run) for i in range(len(table.buffers))]
            bound[self] = self._whole.begin(caches, run.step, past)
        made = iter(self._whole(bound[self], values, index))
        if step.computed is None or self._whole.computed(bound[self], past):
            self._computed(run, past)
            step = step.computed or step
        row = table.rows[step.row]
        control.record(run).note(KEY, frozenset(StepKind(kind) for kind in row.kinds), self._tokens(row))
        return [None if r is None else laid_as(next(made), [at(s, 0) for s in r[1]]) for r in table.results]


class CompiledSteps:
    """The one entry of a file.

    Args:
        table: the file's.
        run: the entry.
        tensors: the file's, by name: the constants are among them.
        device: on which the plan lies.
    """

    def __init__(
        self,
        table: Table,
        run: Callable[[list[Tensor]], Sequence[Tensor]],
        tensors: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        assert table.whole is not None
        self._run, self._whole, self._device = run, table.whole, device
        self._test = table.test
        held = {f"x{place}": tensors[name] for place, name in table.weights.items() if f"x{place}" in self._whole.state}
        self._fixed = {"plan": torch.tensor(self._whole.plan, device=device), **held}
        told = sorted({size for sizes in self._whole.sizes for size in sizes})
        self._rows = {size: torch.empty((0, size), dtype=torch.int8, device=device) for size in told}

    def begin(self, caches: Sequence[Tensor], step: int, past: Past) -> StepState:
        return begun(caches, step, past, self._test, self._device)

    def __call__(self, state: StepState, inputs: Sequence[Any], index: int) -> Sequence[Any]:
        rows = [self._rows[size] for size in self._whole.sizes[index]]
        buffers = state | self._fixed
        return self._run([*inputs, *rows, *(buffers[name] for name in self._whole.state)])

    def computed(self, state: StepState, past: Past) -> bool:
        return computed(state, past)
