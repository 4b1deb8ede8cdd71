"""AsOne: a model's whole step as the one entry of a file, and the check of what the compiler made of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from toca_compile.compiler.emit_step import by_inputs, step_program
from toca_compile.errors import ExportError
from toca_compile.ir.history import Past
from toca_compile.ir.table import OneEntry, Table
from toca_compile.runtime.step_state import StepState, begun

if TYPE_CHECKING:
    from toca_compile.exported.write import Traced

_ERRORS = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative, of a compiled step; wrong strides make it about 1
_COARSE = 5e-2  # of the narrower dtypes


@dataclass(frozen=True)
class One:
    """Whole steps as a graph of tensors alone.

    Attributes:
        module: given the graph's inputs, tensors whose sizes tell numbers of tokens, and the buffers, which it changes.
        inputs: the values that the model was traced with.
        state: the buffers as a run begins, in order.
        table: of the file.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    state: StepState
    table: Table

    @property
    def whole(self) -> OneEntry:
        """How it is called."""
        assert self.table.whole is not None
        return self.table.whole

    @property
    def like(self) -> list[Tensor | int]:
        """A tensor like each input; of those that tell a number of tokens, their second dimension."""
        return [*self.inputs, *(max(column) for column in zip(*self.whole.sizes, strict=True)), *self.state.values()]


def as_one(traced: "Traced") -> One:
    """The step of a model that was laid out in memory.

    Raises:
        VerifyError: as of ``step_program``.
    """
    program = step_program(traced.laid)
    module, state = by_inputs(program)
    whole = OneEntry("step", traced.laid.inputs, program.plan, program.sizes, tuple(state))
    return One(module, traced.recorder.inputs, state, replace(traced.table, whole=whole))


def check(one: One, run: Callable[[list[Tensor]], Sequence[Tensor]]) -> None:
    """That the compiled step does what the graph does: one of each kind, from caches of any numbers. Branches within
    branches are seldom compiled, and what is wrong in one shows in no other way.

    Raises:
        ExportError: it does not.
    """
    firsts = {kinds[0]: step for step, kinds in reversed(list(enumerate(one.whole.plan)))}
    for step in sorted(firsts.values()):
        before = _before(one, step)
        rows = [
            torch.empty((0, size), dtype=torch.int8, device=before["step"].device) for size in one.whole.sizes[step]
        ]
        wanted, found = ({name: value.clone() for name, value in before.items()} for _ in range(2))
        with torch.no_grad():
            results = one.module(*one.inputs, *rows, *wanted.values()), run([*one.inputs, *rows, *found.values()])
        pairs = [*zip(*results, strict=True), *zip(wanted.values(), found.values(), strict=True)]
        if not all(_alike(a, b) for a, b in pairs):
            raise ExportError(
                f"the compiler made something else of step {step} than the graph says, so nothing was written: "
                "export it with form='segments'"
            )


def _before(one: One, step: int) -> StepState:
    """The buffers before a step, if every step before computed all."""
    test = one.table.test
    past = Past()
    if test is not None:
        for earlier in range(step):
            past = test.skip.after(past, earlier)
    generator = torch.Generator().manual_seed(step)
    state = {}
    for name, value in one.state.items():
        if name.startswith("cache") and value.is_floating_point() and value.element_size() > 1:
            value = torch.randn(value.shape, generator=generator).to(value)
        state[name] = value.clone()
    told = begun([], step, past, test, one.state["step"].device)
    return state | {name: value for name, value in told.items() if name in state}


def _alike(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    error = (a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-6)
    return bool(error <= _ERRORS.get(a.dtype, _COARSE))
