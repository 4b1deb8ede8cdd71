"""What users see and say of the runs of a model."""

import contextlib
from collections.abc import Iterator
from typing import Any

from toca_compile.runtime.sight import Told
from toca_compile.runtime.step_control import StepControl, StepRecord


class RunControls:
    """Runs: begun anew, kept apart by name, and what their steps did."""

    @property
    def _control(self) -> StepControl:
        raise NotImplementedError

    def reset(self, context: str | None = None) -> None:
        """Forget every run, or those of one context: its next call is step 0 of a new one, and the caches are freed."""
        with self._control.lock:
            self._control.reset(context)

    @contextlib.contextmanager
    def cache_context(
        self,
        name: str,
        *,
        step_index: int | None = None,
        num_inference_steps: int | None = None,
        timestep: Any = None,
        sigma: Any = None,
        **_: Any,
    ) -> Iterator[None]:
        """Calls inside belong to the run ``name``: one for each guidance pass, as in diffusers.

        Contexts belong to the thread or task that enters them: two threads may each have one of a name.

        Args:
            name: of the run.
            step_index: which step of the sampling this is, from 0: it decides whether the run goes on. The same number
                again is another pass of the step; any other than the next begins a new run.
            num_inference_steps: a change of it begins a new run.
            timestep, sigma: the denoising time, where the model's own is no host value.
        """
        control = self._control
        told = Told.of(step_index, num_inference_steps, timestep, sigma)
        tokens = control.enter(name, told)
        try:
            yield
        finally:
            control.leave(tokens)

    @property
    def steps(self) -> list[StepRecord]:
        """What each model call of the last sampling did, in order of time; in every thread."""
        return self._control.records

    @property
    def cache_bytes(self) -> int:
        """Bytes held by all caches now; those of a run are freed when its last step is done."""
        return self._control.cache_bytes
