"""``program``: a model whose steps are one graph, with the caches and the plan inside (``compiler/emit_step.py``)."""

from typing import Any

import torch
from torch import Tensor, fx

from toca_compile.compiler.emit_step import StepProgram
from toca_compile.compiler.print_step import print_step
from toca_compile.compiler.step_program import programmed
from toca_compile.diffusers import is_pipeline
from toca_compile.errors import ExportError
from toca_compile.exported.whole import WholeModel
from toca_compile.exported.write import Traced, traces
from toca_compile.ir.plan import Policy


def program(model: Any, policy: Policy | str | None, example_inputs: Any, **options: Any) -> "ProgramModel":
    """A model with its caches as one graph: glue, blocks, caches, the plan, and the branch over the kinds of steps,
    which the graph takes by itself; that of a policy with a threshold too.

    Args:
        model, policy, example_inputs, options: as of ``export``.

    Returns:
        A callable with the arguments of the model, of the shapes of ``example_inputs``. It runs op by op until
        ``compile()``.

    Raises:
        ExportError: the model or the policy cannot be held by one graph; the message says why.
        TocaError: as of ``optimize`` and of a first call.
    """
    if options.get("dynamic") is not None:
        raise ExportError("one graph of all steps is for fixed sizes: leave dynamic out, or write a file (export)")
    if options.get("timesteps") is not None:
        raise ExportError("one graph of all steps computes what follows from the time: leave timesteps out")
    if is_pipeline(model):
        raise ExportError("program takes a model: pass the pipeline's transformer, and what it is called with")
    return ProgramModel(traces(model, policy, example_inputs, in_memory=True, **options)[""])


class ProgramModel(WholeModel):
    """A model whose steps are one graph; each call is the next step of its run.

    Attributes:
        graph: of a step. It is called with the values ``x0``, ``x1``, … (weights and arguments) and, for each number of
            tokens K, an empty tensor ``[0, K + 2]``; its buffers are the caches, ``plan`` ``[steps, numbers]`` and
            ``step`` ``[1]``. Runs put buffers of their own in the place of its caches.
    """

    def __init__(self, traced: Traced) -> None:
        runnable = programmed(traced.laid, lambda variant, examples: variant.module)
        super().__init__(traced.about, traced.table, traced.tensors, runnable, traced.laid.inputs)
        self._runnable = runnable

    @property
    def graph(self) -> fx.GraphModule:
        """The program of a step."""
        return self._step_program.module

    def rows(self, step: int) -> list[Tensor]:
        """What the graph is given behind the values in a step of the plan."""
        return self._step_program.rows(step)

    @property
    def _step_program(self) -> StepProgram:
        return self._runnable.program

    def __str__(self) -> str:
        return print_step(self._step_program)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the graph as one, by ``torch.compile(graph, fullgraph=True, …)``, at the next call. No step compiles
        it anew.

        Args:
            args, options: as of ``torch.compile``, such as ``backend``.
        """
        self._runnable.call = torch.compile(self.graph, *args, **{"fullgraph": True, "dynamic": False, **options})
