"""StepProgram: whole steps of a graph as one graph, with the caches and the plan inside (``emit_step.py``), in place of
a call for each segment. A lowering that is registered as ``whole`` is given that."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from toca_compile.compiler.emit_step import StepProgram, step_program
from toca_compile.compiler.lay_out import LaidOut, lay_out
from toca_compile.compiler.print_step import print_step
from toca_compile.compiler.trace import show
from toca_compile.ir.graph import value_of
from toca_compile.ir.history import Past
from toca_compile.ir.program import Variant
from toca_compile.lowerings import Lowering
from toca_compile.runtime.executor import Executor
from toca_compile.runtime.schedule import Schedule
from toca_compile.runtime.step_state import StepState, begun, computed


class Whole:
    """The programs of one graph, by the plan that they follow.

    Args:
        lower: makes a callable of a program.
    """

    def __init__(self, lower: Lowering) -> None:
        self._lower = lower
        self._known: WeakKeyDictionary[Schedule, Runnable] = WeakKeyDictionary()

    def __call__(self, executor: Executor, schedule: Schedule) -> "Runnable":
        """The program of a plan.

        Raises:
            PolicyError: the plan is none that a graph can hold.
            VerifyError, LoweringError: as of a variant.
        """
        if schedule not in self._known:
            examples = [value_of(n) for n in executor.program.placeholders]
            self._known[schedule] = programmed(lay_out(executor, schedule, in_memory=True), self._lower, examples)
        return self._known[schedule]


def programmed(laid: LaidOut, lower: Lowering, examples: Sequence[Any] = ()) -> "Runnable":
    """The program of a plan that was laid out in memory, lowered. ``examples``: like the graph's inputs.

    Raises:
        VerifyError, LoweringError: as of a variant.
    """
    made = step_program(laid)
    show("program", lambda: f"{len(made.kinds)} kinds of steps", lambda: print_step(made))
    return Runnable(made, lower(Variant(made.module, (), ()), examples))


class Runnable:
    """A program and what it was lowered to. A run has buffers of its own, which are the module's while it runs.

    Attributes:
        call: what the program was lowered to.
        kept: which buffer of which owner each of the program's caches is.
    """

    def __init__(self, program: StepProgram, call: Callable[..., Sequence[Any]]) -> None:
        self.program, self.call = program, call
        self.kept = tuple(program.caches.values())

    def __str__(self) -> str:
        return print_step(self.program)

    def begin(self, caches: Sequence[Tensor], step: int, past: Past) -> StepState:
        """The buffers of a run that is about to do a step."""
        return begun(caches, step, past, self.program.laid.table.test, self.program.laid.device)

    def __call__(self, state: StepState, inputs: Sequence[Any], index: int) -> Sequence[Any]:
        """The results of a step. ``index``: of the step among the plan's."""
        module = self.program.module
        before = {name: module._buffers[name] for name in state}
        module._buffers.update(state)
        try:
            return self.call(*inputs, *self.program.rows(index))
        finally:
            module._buffers.update(before)

    def computed(self, state: StepState, past: Past) -> bool:
        """Whether the last step computed what it could skip."""
        return computed(state, past)
