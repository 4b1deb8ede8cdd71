"""``program``: a model whose steps are one graph, with the caches and the plan inside (``compiler/emit_step.py``)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from toca_compile.compiler.emit_step import StepProgram
from toca_compile.compiler.print_step import print_step
from toca_compile.compiler.step_program import programmed
from toca_compile.diffusers import is_pipeline
from toca_compile.errors import ExportError
from toca_compile.exported.loaded import KEY, LoadedModel, laid_as
from toca_compile.exported.write import Traced, traces
from toca_compile.ir.history import Past
from toca_compile.ir.plan import Policy
from toca_compile.ir.table import at
from toca_compile.ir.types import StepKind
from toca_compile.runtime.cache_state import allocate


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
    if is_pipeline(model):
        raise ExportError("program takes a model: pass the pipeline's transformer, and what it is called with")
    return ProgramModel(traces(model, policy, example_inputs, in_memory=True, **options)[""])


class ProgramModel(LoadedModel):
    """A model whose steps are one graph; each call is the next step of its run.

    Attributes:
        graph: of a step. It is called with the values ``x0``, ``x1``, … (weights and arguments) and, for each number of
            tokens K, an empty tensor ``[0, K + 2]``; its buffers are the caches, ``plan`` ``[steps, numbers]`` and
            ``step`` ``[1]``. Runs put buffers of their own in the place of its caches.
    """

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced.about, traced.table, traced.tensors, {})
        self._whole = programmed(traced.laid, lambda variant, examples: variant.module)

    @property
    def graph(self) -> fx.GraphModule:
        """The program of a step."""
        return self._step_program.module

    def rows(self, step: int) -> list[Tensor]:
        """What the graph is given behind the values in a step of the plan."""
        return self._step_program.rows(step)

    @property
    def _step_program(self) -> StepProgram:
        return self._whole.program

    def __str__(self) -> str:
        return print_step(self._step_program)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the graph as one, by ``torch.compile(graph, fullgraph=True, …)``, at the next call. No step compiles
        it anew.

        Args:
            args, options: as of ``torch.compile``, such as ``backend``.
        """
        self._whole.call = torch.compile(self.graph, *args, **{"fullgraph": True, "dynamic": False, **options})

    def _step(self, given: Mapping[int, Tensor]) -> list[Any]:
        table, control = self._table, self._control
        values = [given.get(place, value) for place, value in enumerate(self._values)]
        steps = None if table.endless else len(table.steps)
        run, _ = control.enter_graph(0, 0, steps, given, [values[i] for i in table.clock])
        index = min(run.step, len(table.steps) - 1)
        step, past = table.steps[index], run.computed.get(KEY, Past())
        run.last[KEY] = run.step
        bound = run.bound.setdefault(KEY, {})
        if self not in bound:
            buffers = self._step_program.caches.items()
            caches = [allocate(run.buffers, (*KEY, *whose), self.graph.get_buffer(name)) for name, whose in buffers]
            bound[self] = self._whole.begin(caches, run.step, past)
        made = iter(self._whole(bound[self], values[: self._step_program.laid.inputs], index))
        if step.computed is None or self._whole.computed(bound[self], past):
            self._computed(run, past)
            step = step.computed or step
        row = table.rows[step.row]
        control.record(run).note(KEY, frozenset(StepKind(kind) for kind in row.kinds), self._tokens(row))
        return [None if r is None else laid_as(next(made), [at(s, 0) for s in r[1]]) for r in table.results]
