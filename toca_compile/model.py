"""The optimised model: the user's model with caching around it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed

from toca_compile.backend import Session
from toca_compile.errors import GRAD_ENABLED, NO_SITE, InferenceModeError, NoSiteError, TocaError
from toca_compile.ir.plan import Policy
from toca_compile.runtime.step_control import StepRecord

_RECOMPILE_LIMIT = 256  # Dynamo's default, 8, would turn the ninth shape or policy into silent eager execution.


class OptimizedModel(OptimizedModule):
    """A model with caching: called, configured, moved and saved as the model itself, which stays as it was.

    Attributes and methods are the model's own; ``state_dict`` has its keys. One object serves one sampling at a time
    in each context.
    """

    _session: Session
    _around_call: Callable[[], contextlib.AbstractContextManager[None]]

    def __init__(self, model: nn.Module, session: Session) -> None:
        object.__setattr__(self, "_session", session)
        # A pipeline that samples with the model says here which pass of which step a call is.
        object.__setattr__(self, "_around_call", contextlib.nullcontext)
        session.bounded = True
        # The cache key of a graph is its shape: a new resolution or batch is a new graph, never a generic slow one.
        super().__init__(model, torch._dynamo.optimize(session, dynamic=False))  # type: ignore[arg-type]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as step number so-and-so of the current run.

        Raises:
            InferenceModeError: the model is in training mode, or gradients are enabled.
            NoSiteError: nothing in the model can be cached (with ``strict``).
            PolicyError: the policy asks for what the model cannot do (with ``strict``).
        """
        if self._around_call is contextlib.nullcontext:
            self._session.follow(self._session.policy)
        with self._around_call():
            return self._call(args, kwargs)

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        session = self._session
        if session.strict:
            self._check_mode()
        self._watch_numbers(args, kwargs)
        control = session.control
        control.begin_call()
        failed = True
        try:
            with _traceable():
                out = super().__call__(*args, **kwargs)
            failed = False
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, TocaError):
                raise error.inner_exception from None
            raise
        finally:
            reached = control.end_call(failed)
        if not reached:
            self._uncached()
        return out

    def reset(self) -> None:
        """Forget every run: the next call is step 0 of a new one, and the caches are freed."""
        self._session.control.reset()

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Calls inside belong to the run ``name``: one for each guidance pass, as in diffusers."""
        self._session.control.enter(name)
        try:
            yield
        finally:
            self._session.control.leave()

    @property
    def steps(self) -> list[StepRecord]:
        """What each model call of the current runs did, in order."""
        return self._session.control.records

    @property
    def policy(self) -> Policy:
        """The policy. Assigning another takes effect with the next run, without tracing again."""
        return self._session.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._session.set_policy(policy)

    @property
    def cache_bytes(self) -> int:
        """Bytes held by all caches now."""
        return self._session.control.cache_bytes

    def fresh_tokens(self) -> dict[str, torch.Tensor]:
        """Which tokens each site computed in the last call: bool ``[batch, tokens]`` by site name."""
        return {name: mask for e in self._session.executors for name, mask in e.fresh_tokens().items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state, under the model's own names."""
        return self._orig_mod.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model. Caches of the old weights are forgotten."""
        self.reset()
        return self._orig_mod.load_state_dict(*args, **kwargs)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """diffusers calls this when a pipeline is done."""
        self.reset()

    def _check_mode(self) -> None:
        if self._orig_mod.training:
            raise InferenceModeError("the model is in training mode: call model.eval() before sampling")
        if torch.is_grad_enabled():
            raise InferenceModeError(GRAD_ENABLED)

    def _watch_numbers(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A Python number that changes from call to call is traced anew for each value: say so."""
        session = self._session
        now = {k: v for k, v in (*enumerate(args), *kwargs.items()) if type(v) in (int, float)}
        changed = [k for k, v in now.items() if session.numbers.get(k, v) != v]
        session.numbers = now
        for name in changed:
            session.changes[name] = session.changes.get(name, 0) + 1
            if session.changes[name] == 2:
                session.warn_once(
                    f"argument {name!r} is a Python number that changes from call to call, so torch.compile traces the "
                    "model again for each value and no cache is ever reused: pass it as a tensor"
                )

    def _uncached(self) -> None:
        """No graph with sites ran in a call: say why, and once."""
        session = self._session
        if session.refused:
            return
        name = type(self._orig_mod).__name__
        if session.seen and not session.executors:
            error: TocaError = NoSiteError(f"no site was found in {name}: it {NO_SITE} (strict=False runs it uncached)")
        else:
            error = TocaError(
                f"{name} ran uncached, because torch.compile is switched off here: look for TORCHDYNAMO_DISABLE, "
                "torch.compiler.disable or an active TorchDispatchMode (strict=False allows it)"
            )
        if session.strict:
            raise error
        session.warn_once(str(error))


@contextlib.contextmanager
def _traceable() -> Iterator[None]:
    """Dynamo may trace as many shapes as there are, and torch's transformer layers are traced as attention and MLP
    instead of as one fused inference op."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch._dynamo.config.patch(
            recompile_limit=_RECOMPILE_LIMIT, accumulated_recompile_limit=4 * _RECOMPILE_LIMIT
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
