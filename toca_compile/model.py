"""The optimised model: the user's model with caching around it."""

import contextlib
import copy
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from toca_compile.backend import (
    BackendCompilerFailed,
    OptimizedModule,
    dynamo_context,
    dynamo_limits,
    remove_from_cache,
)
from toca_compile.errors import (
    GRAD_ENABLED,
    NO_SITE,
    InferenceModeError,
    LoweringError,
    NoSiteError,
    PolicyError,
    TocaError,
)
from toca_compile.ir.plan import Policy
from toca_compile.lowerings.inductor import machine_trouble
from toca_compile.progress import working
from toca_compile.runtime.executor import Executor
from toca_compile.runtime.sight import Told
from toca_compile.runtime.step_control import StepRecord
from toca_compile.session import Session, patch_of

_RECOMPILE_LIMIT = 256  # Dynamo's default, 8, would turn the ninth policy of a graph into silent eager execution.
_DISTINCT = 4  # values in as many calls: no two pictures, whose sizes take turns
_SIGNATURES = 32  # traced at a time; the one that was not called for longest is forgotten

# What a pipeline puts around each call of one of its models, in this thread or task.
AROUND_CALL: ContextVar[Mapping[int, Callable[[], contextlib.AbstractContextManager[None]]]] = ContextVar(
    "toca_around_call", default={}  # noqa: B039  (never changed, only replaced)
)  # fmt: skip


@dataclass
class _Entry:
    """One signature of calls: what Dynamo made of it, and why graphs of it run uncached."""

    call: Callable[..., Any]
    code: types.CodeType
    executors: list[Executor] = field(default_factory=list)
    uncached: dict[str, TocaError] = field(default_factory=dict)
    graphs: int = 0  # that Dynamo made of it


def _entry(self: Any, args: Any, kwargs: Any) -> Any:  # named as in a method: module paths begin with it
    return self(*args, **kwargs)


class OptimizedModel(OptimizedModule):
    """A model with caching: called, configured, moved, copied, pickled and saved as the model itself, which stays as it
    was.

    Attributes and methods are the model's own; ``state_dict`` has its keys. Calls of one object are made one at a time;
    each thread or task has samplings of its own, and each context in it.
    """

    _session: Session

    def __init__(self, model: nn.Module, session: Session) -> None:
        object.__setattr__(self, "_session", session)
        object.__setattr__(self, "_entries", OrderedDict())
        object.__setattr__(self, "_hook_lists", (-1, []))
        # One for all calls, which are made one at a time: each new one would stay in the thread's context.
        object.__setattr__(self, "_limits", dynamo_limits(_LIMITS))
        session.bounded, session.patch = True, patch_of(model)
        super().__init__(model, dynamo_context(session))

    def _initialize(self) -> None:
        self.forward = self._dispatch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as step number so-and-so of the current run.

        Raises:
            InferenceModeError: the model is in training mode, or gradients are enabled.
            NoSiteError: nothing in the model can be cached (with ``strict``).
            PolicyError: the policy asks for what the model cannot do (with ``strict``).
        """
        session = self._session
        with session.control.lock:
            around = AROUND_CALL.get().get(id(self))
            if around is None:
                session.follow(session.policy)
                return self._call(args, kwargs)
            with around():
                return self._call(args, kwargs)

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        session = self._session
        if session.strict:
            self._check_mode()
        self._watch_numbers(args, kwargs)
        control = session.control
        control.begin_call(_leaves(args, kwargs))
        failed, shapes = True, []
        try:
            with _UNFUSED, self._limits:
                out = super().__call__(*args, **kwargs)
            failed, shapes = False, [tuple(v.shape) for v in _leaves((out,), {}).values() if _is_tensor(v)]
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, TocaError):
                raise error.inner_exception from None
            raise machine_trouble(error) or error from error
        except LoweringError as error:
            if session.strict:
                raise
            session.warn_once(f"{error} The model runs uncached.")
            return self._orig_mod(*args, **kwargs)
        finally:
            reached = control.end_call(failed, shapes)
        if not reached:
            self._uncached()
        return out

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """The call by its signature. Each has a code object of its own, and with it graphs and guards of its own, so
        that neither another model of the class nor shapes seen once count towards Dynamo's limits, or stay."""
        entries: OrderedDict[Any, _Entry] = self._entries
        key = (*_signature(args, kwargs), self._hooks())
        entry = entries.get(key)
        if entry is None:
            entry = entries[key] = self._new_entry()
            if len(entries) > _SIGNATURES:
                self._forget(entries.popitem(last=False)[1])
        entries.move_to_end(key)
        session = self._session
        before, session.uncached = session.seen, entry.uncached
        known = len(session.executors)
        new = not entry.executors and not entry.uncached
        told = working(f"tracing {type(self._orig_mod).__name__}") if new else contextlib.nullcontext()
        try:
            with told:
                return entry.call(self._orig_mod, args, kwargs)
        finally:
            if session.seen != before:
                entry.executors += session.executors[known:]
                entry.graphs += session.seen - before
            session.graphs = entry.graphs

    def _forget(self, entry: _Entry) -> None:
        remove_from_cache(entry.code)
        if not self._session.breaks:
            # Graphs behind a break belong to code of the model, not to the entry's: they go on being reached.
            self._session.forget(entry.executors)

    def _hooks(self) -> tuple[int, ...]:
        """The hooks of all submodules: they are traced with them, and Dynamo does not look for new ones."""
        seen, listed = self._hook_lists
        if seen != self._session.seen:
            listed = [h for m in self._orig_mod.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
            object.__setattr__(self, "_hook_lists", (self._session.seen, listed))
        return tuple(key for hooks in listed if hooks for key in hooks)

    def _new_entry(self) -> _Entry:
        code = _entry.__code__.replace()
        if _has_hooks(self._orig_mod):
            # Hooks of the whole model (offloading, timers) run as they are, outside of what is traced.
            inner = self.dynamo_ctx(self._orig_mod.__call__)
            return _Entry(lambda _, args, kwargs: inner(*args, **kwargs), code)
        return _Entry(self.dynamo_ctx(types.FunctionType(code, {"__builtins__": __builtins__})), code)

    def compile(self, *args: Any, **kwargs: Any) -> int:  # type: ignore[override]
        """Trace the model for inputs like these and compile every variant that the policy's plan needs, instead of each
        at the step that first needs it. No run begins or ends by it. What is compiled is logged at level INFO.

        Args:
            args, kwargs: example inputs, as the model is called with them.

        Returns:
            How many variants were compiled beside those of a first step.

        Raises:
            TocaError: there are no inputs, or as a call would raise.
        """
        if not _leaves(args, kwargs):
            raise TocaError(
                "the model is compiled already, with caching: compile(*example_inputs) takes what the model is called "
                "with, and makes all variants of the plan before the first step"
            )
        session, own = self._session, "(compile)"
        with session.control.lock, torch.no_grad():
            try:
                with self.cache_context(own, step_index=0):
                    self(*args, **kwargs)
            finally:
                session.control.undo(own)
            return sum(executor.compile_plan() for executor in session.executors)

    def reset(self, context: str | None = None) -> None:
        """Forget every run, or those of one context: its next call is step 0 of a new one, and the caches are freed."""
        with self._session.control.lock:
            self._session.control.reset(context)

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
        control = self._session.control
        told = Told.of(step_index, num_inference_steps, timestep, sigma)
        tokens = control.enter(name, told)
        try:
            yield
        finally:
            control.leave(tokens)

    @property
    def steps(self) -> list[StepRecord]:
        """What each model call of the last sampling did, in order of time; in every thread."""
        return self._session.control.records

    @property
    def policy(self) -> Policy:
        """The policy. Assigning another takes effect with the next run, without tracing again."""
        return self._session.policy

    @policy.setter
    def policy(self, policy: Policy | str) -> None:
        with self._session.control.lock:
            self._session.set_policy(policy)
            for key, entry in list(self._entries.items()):
                if any(isinstance(error, PolicyError) for error in entry.uncached.values()):
                    self._forget(self._entries.pop(key))  # this policy may be the one that it can follow

    @property
    def cache_bytes(self) -> int:
        """Bytes held by all caches now; those of a run are freed when its last step is done."""
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

    def __copy__(self) -> "OptimizedModel":
        return OptimizedModel(self._orig_mod, self._session.fresh())

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptimizedModel":
        twin = OptimizedModel(copy.deepcopy(self._orig_mod, memo), self._session.fresh())
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Graphs and caches are made anew where it is read.
        return OptimizedModel, (self._orig_mod, self._session.fresh())

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """diffusers calls this when a pipeline is done: of the thread that it ran in, nothing is kept."""
        self._session.control.reset(mine=True)

    def _check_mode(self) -> None:
        if self._orig_mod.training:
            raise InferenceModeError("the model is in training mode: call model.eval() before sampling")
        if torch.is_grad_enabled():
            raise InferenceModeError(GRAD_ENABLED)

    def _watch_numbers(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A Python number that is another one at each call of a run is traced anew for each value: say so."""
        session = self._session
        for name, value in (*enumerate(args), *kwargs.items()):
            if type(value) in (int, float):
                last = session.numbers.setdefault(name, deque(maxlen=_DISTINCT))
                last.append(value)
                if len(set(last)) == _DISTINCT:
                    session.warn_once(
                        f"argument {name!r} is a Python number, and another one at each call, so torch.compile traces "
                        "the model again for each value and no cache is ever reused: pass it as a tensor"
                    )

    def _uncached(self) -> None:
        """No graph with sites ran in a call: say why, and once."""
        session = self._session
        name = type(self._orig_mod).__name__
        why = next(iter(session.uncached.values()), None)
        if isinstance(why, NoSiteError):
            error: TocaError = NoSiteError(
                f"no site was found in {name} for inputs like these: it {NO_SITE} (strict=False runs it uncached) "
                f"{session.split(session.graphs)}".rstrip()
            )
        elif why is not None and session.strict:
            raise why
        elif why is not None:
            return  # as was said when it was traced
        else:
            error = TocaError(
                f"{name} ran uncached, because torch.compile handed over no graph. It may be switched off (look for "
                "TORCHDYNAMO_DISABLE, torch.compiler.disable, an active TorchDispatchMode), or have given up after "
                f"{_RECOMPILE_LIMIT} graphs of one signature (strict=False allows it)"
            )
        if session.strict:
            raise error
        session.warn_once(str(error))


def _signature(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells traced calls apart: kinds of inputs, and modes."""
    kinds = tuple((k, _kind(v)) for k, v in _leaves(args, kwargs).items())
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), *(
        torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cpu", "cuda")
    )  # fmt: skip
    return len(args), tuple(kwargs), kinds, modes


def _kind(value: Any) -> Any:
    if _is_tensor(value):
        return (
            type(value), value.shape, value.stride() if value.layout == torch.strided else None, value.dtype,
            value.device, value.is_inference(),
        )  # fmt: skip
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value)


def _has_hooks(model: nn.Module) -> bool:
    return bool(model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model))


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    """Inputs by where they stand, nested ones taken apart."""
    found: dict[Any, Any] = {}

    def visit(key: Any, value: Any) -> None:
        if isinstance(value, Mapping):
            for k, v in value.items():
                visit((key, k), v)
        elif isinstance(value, (tuple, list)):
            for i, v in enumerate(value):
                visit((key, i), v)
        else:
            found[key] = value

    for key, value in (*enumerate(args), *kwargs.items()):
        visit(key, value)
    return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class _Unfused:
    """While any optimised model runs, in any thread, torch's transformer layers are traced as attention and MLP instead
    of as one fused inference op. That is a setting of the process: the first to come sets it, the last to leave puts
    it back."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.mha.set_fastpath_enabled(self._before)


_UNFUSED = _Unfused()
_LIMITS = {"recompile_limit": _RECOMPILE_LIMIT, "accumulated_recompile_limit": 4 * _RECOMPILE_LIMIT}
