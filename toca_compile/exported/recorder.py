"""The executor of a model that is exported: it notes what its graph was called with."""

from typing import Any

from toca_compile.compiler.lay_out import LaidOut, lay_out
from toca_compile.errors import ExportError, PolicyError
from toca_compile.runtime.executor import Executor


class Recorder(Executor):
    """An executor that remembers its last call.

    Attributes:
        inputs: the plain tensors that its graph was given.
        results: what it returned.
    """

    inputs: tuple[Any, ...] = ()
    results: tuple[Any, ...] = ()

    def __call__(self, *inputs: Any) -> Any:
        results = super().__call__(*inputs)
        self.inputs = tuple(inputs) if self._flat is None else self._flat(inputs)
        self.results = tuple(results)
        return results

    def laid_out(self, *, in_memory: bool) -> LaidOut:
        """What each step of the plan calls, and what is called. The table's ``weights``, ``inputs`` and ``kinds`` are
        left to who knows the model's call.

        Raises:
            ExportError: the plan cannot be told beforehand.
        """
        try:
            return lay_out(self, self.schedule, in_memory=in_memory)
        except PolicyError as error:
            raise ExportError(str(error)) from error

    @property
    def owned(self) -> tuple[int, ...]:
        """The places of the inputs that are the model's own."""
        return tuple(i for i in range(self._inputs) if i not in self._varying)
