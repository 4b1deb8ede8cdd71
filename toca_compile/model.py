"""The optimised model: the user's model with caching, in place or as a wrapper."""

import contextlib
import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from toca_compile.backend import OptimizedModule
from toca_compile.calls import Calls, leaves
from toca_compile.errors import TocaError
from toca_compile.ir.plan import Policy
from toca_compile.runtime.sight import Told
from toca_compile.runtime.step_control import StepRecord
from toca_compile.session import Session

# What a pipeline puts around each call of one of its models, in this thread or task.
AROUND_CALL: ContextVar[Mapping[int, Callable[[], contextlib.AbstractContextManager[None]]]] = ContextVar(
    "toca_around_call", default={}  # noqa: B039  (never changed, only replaced)
)  # fmt: skip


class Controls:
    """What is seen and said of the caching of one model: an optimised model is one, ``controls`` gives one for any."""

    @property
    def _session(self) -> Session:
        raise NotImplementedError

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
    def policy(self, policy: Policy) -> None:
        with self._session.control.lock:
            self._session.set_policy(policy)

    @property
    def cache_bytes(self) -> int:
        """Bytes held by all caches now; those of a run are freed when its last step is done."""
        return self._session.control.cache_bytes

    def fresh_tokens(self) -> dict[str, torch.Tensor]:
        """Which tokens each site computed in the last call: bool ``[batch, tokens]`` by site name."""
        return {name: mask for e in self._session.executors for name, mask in e.fresh_tokens().items()}


class SessionControls(Controls):
    """Those of a session."""

    def __init__(self, session: Session) -> None:
        self._of = session

    @property
    def _session(self) -> Session:
        return self._of


class Handle(Controls):
    """An optimised model, as calls and pipelines see it."""

    _toca: Calls

    @property
    def _session(self) -> Session:
        return self._toca.session

    @property
    def _model(self) -> nn.Module:
        """The model that is traced."""
        raise NotImplementedError

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
                return self._toca.run(self._step, self._model, args, kwargs)
            with around():
                return self._toca.run(self._step, self._model, args, kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        return self._toca.dispatch(self._model, args, kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> int:
        """Trace the model for inputs like these and compile every variant that the policy's plan needs, instead of each
        at the step that first needs it. No run begins or ends by it. What is compiled is logged at level INFO.

        Args:
            args, kwargs: example inputs, as the model is called with them.

        Returns:
            How many variants were compiled beside those of a first step.

        Raises:
            TocaError: there are no inputs, or as a call would raise.
        """
        if not leaves(args, kwargs):
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


class OptimizedModel(Handle, OptimizedModule):  # type: ignore[misc]  # (compile has a meaning of its own)
    """A model with caching: called, configured, moved, copied, pickled and saved as the model itself, which stays as it
    was.

    Attributes and methods are the model's own; ``state_dict`` has its keys. Calls of one object are made one at a time;
    each thread or task has samplings of its own, and each context in it.
    """

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        object.__setattr__(self, "_toca", calls)
        OptimizedModule.__init__(self, model, calls.context)

    def _initialize(self) -> None:
        self.forward = super()._step

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        return OptimizedModule.__call__(self, *args, **kwargs)  # with the hooks of the wrapper

    @property
    def _model(self) -> nn.Module:
        return self._orig_mod

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state, under the model's own names."""
        return self._orig_mod.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model. Caches of the old weights are forgotten."""
        self._session.control.reset()
        return self._orig_mod.load_state_dict(*args, **kwargs)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """diffusers calls this when a pipeline is done: of the thread that it ran in, nothing is kept."""
        self._session.control.reset(mine=True)

    def __copy__(self) -> "OptimizedModel":
        return OptimizedModel(self._orig_mod, copy.copy(self._toca))

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptimizedModel":
        twin = OptimizedModel(copy.deepcopy(self._orig_mod, memo), copy.copy(self._toca))
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OptimizedModel, (self._orig_mod, self._toca)


class _InPlace(Handle):
    """What a model that is optimised in place has in its ``__dict__``; its class looks for it (``_prepare``)."""

    def __init__(self, calls: Calls, own: Sequence[str], model: nn.Module | None = None) -> None:
        self._toca, self._own = calls, own  # _own: names that stay the model's
        self._owner = None if model is None else weakref.ref(model)

    def of(self, model: nn.Module) -> "_InPlace":
        """The one of this model, which may be a copy of the one that this was made for."""
        owner = self._owner() if self._owner is not None else None
        if owner is not model:
            mine = vars(model)["_toca"] = self if owner is None else copy.copy(self)
            mine._owner = weakref.ref(model)
            return mine
        return self

    @property
    def _model(self) -> nn.Module:
        owner = self._owner() if self._owner is not None else None
        assert owner is not None
        return owner

    def __copy__(self) -> "_InPlace":
        return _InPlace(copy.copy(self._toca), self._own)

    def __reduce__(self) -> Any:
        return _revived, (self._toca, self._own, type(self._model))


def _revived(calls: Calls, own: Sequence[str], cls: type) -> _InPlace:
    _prepare(cls, own)
    return _InPlace(calls, own)


def handle_of(model: Any) -> Handle | None:
    """What an optimised model is called and controlled by; None where it is not optimised."""
    if isinstance(model, OptimizedModel):
        return model
    found = vars(model).get("_toca") if isinstance(model, nn.Module) else None
    return found.of(model) if isinstance(found, _InPlace) else None


def wrap(model: nn.Module, session: Session) -> OptimizedModel:
    """A wrapper around a model that calls it with caching."""
    return OptimizedModel(unwrapped(model), Calls(session))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of our wrappers and those of ``torch.compile``."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


def convert(model: nn.Module, session: Session) -> Handle:
    """Let calls of a model be cached from now on. The model stays the object that it is, of the class that it is.

    Raises:
        TocaError: Python does not let anything be put on its class.
    """
    model = unwrapped(model)
    before = handle_of(model)
    calls = Calls(session) if before is None else Calls(session, before._toca.homes, before._toca.replaced)
    revert(model)
    own = tuple(name for name in _YIELDING if hasattr(model, name))
    _prepare(type(model), own)
    handle = vars(model)["_toca"] = _InPlace(calls, own, model)
    return handle


def revert(model: Any) -> Any:
    """What a model was before it was optimised: the same object, or the one in the wrapper."""
    if isinstance(model, OptimizedModel):
        return model._model
    if handle_of(model) is not None:
        vars(model).pop("_toca")._toca.close()
    return model


# -- what is put on classes -------------------------------------------------------------------------------------------

# What was there before, if anything, by class and name.
_PUT: dict[tuple[type, str], Any] = {}


def put(cls: type, name: str, make: Callable[[Any], Any]) -> None:
    """Put onto a class what ``make`` makes of what it has under that name (None: nothing), for as long as something is
    optimised. It must do as that did for objects that are not."""
    if (cls, name) in _PUT:
        return
    try:
        made, before = make(inspect.getattr_static(cls, name, None)), vars(cls).get(name)
        setattr(cls, name, made)
    except TypeError as error:
        raise TocaError(
            f"objects of {cls.__name__} cannot be optimised in place ({error}): optimize(model, policy) makes a wrapper"
        ) from error
    _PUT[cls, name] = before


def tidy() -> None:
    """Leave classes as they were, if nothing is optimised any more."""
    while _PUT and not Calls.alive:
        (cls, name), before = _PUT.popitem()
        if before is None:
            delattr(cls, name)
        else:
            setattr(cls, name, before)


_OFFERED = ("cache_context", "compile", "cache_bytes", "fresh_tokens", "reset", "steps", "policy")
_YIELDING = _OFFERED[2:]  # to attributes of the model's own


def _prepare(cls: type, own: Sequence[str]) -> None:
    """Let objects of a class be optimised in place. Nothing is traced through what is put here, and subclasses do not
    take part in it."""

    def called(before: Any) -> Any:
        @functools.wraps(before)
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            if type(self) is cls and "_toca" in self.__dict__:
                return self.__dict__["_toca"].of(self)(*args, **kwargs)
            return before(self, *args, **kwargs)

        __call__._toca_before = before  # type: ignore[attr-defined]
        return __call__

    def forgetting(before: Any, **only: Any) -> Any:
        @functools.wraps(before)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if type(self) is cls and "_toca" in self.__dict__:
                self.__dict__["_toca"].of(self)._session.control.reset(**only)
            return before(self, *args, **kwargs)

        return method

    put(cls, "__call__", called)
    put(cls, "load_state_dict", forgetting)
    if hasattr(cls, "_reset_stateful_cache"):  # diffusers calls it when a pipeline is done
        put(cls, "_reset_stateful_cache", functools.partial(forgetting, mine=True))
    for name in _OFFERED:
        if name not in own:
            kind = _Assignable if name == "policy" else _Offered
            put(cls, name, functools.partial(kind, cls, name))


class _Offered:
    """An attribute of the handle, as one of the model."""

    def __init__(self, cls: type, name: str, before: Any) -> None:
        self.cls, self.name, self.before = cls, name, before

    def __get__(self, model: Any, owner: Any) -> Any:
        if type(model) is self.cls and "_toca" in vars(model):
            return getattr(vars(model)["_toca"].of(model), self.name)
        if self.before is None:
            raise AttributeError(f"{owner.__name__!r} has no attribute {self.name!r}")
        return self.before.__get__(model, owner) if hasattr(self.before, "__get__") else self.before


class _Assignable(_Offered):
    def __get__(self, model: Any, owner: Any) -> Any:
        own = {} if model is None else vars(model)
        return own[self.name] if self.name in own else super().__get__(model, owner)

    def __set__(self, model: Any, value: Any) -> None:
        if type(model) is self.cls and "_toca" in vars(model):
            setattr(vars(model)["_toca"].of(model), self.name, value)
        else:
            vars(model)[self.name] = value
