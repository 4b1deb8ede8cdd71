"""The optimised model: the user's model with caching, in place or as a wrapper."""

import contextlib
import copy
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, cast

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

    def __init__(self, session: Session) -> None:
        self._controlled = session

    @property
    def _session(self) -> Session:
        return self._controlled

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


class OptimizedModel(Controls, nn.Module):
    """A model with caching: called, configured, moved, copied, pickled and saved as the model itself.

    It is either the user's own object (in a pipeline, and after ``enable_cache``), which for as long as it is optimised
    has a class made of this one and its own; or a wrapper around the user's object, which stays as it was.

    Attributes and methods are the model's own; of those named here, ``steps``, ``policy``, ``reset``, ``cache_bytes``
    and ``fresh_tokens`` give way to attributes that the model had before (``controls(model)`` has them always).
    ``state_dict`` has the model's keys. Calls of one object are made one at a time; each thread or task has samplings
    of its own, and each context in it.
    """

    _toca: Calls

    @property
    def _session(self) -> Session:
        return self._toca.session

    @property
    def _model(self) -> nn.Module:
        """The model that is traced."""
        return self

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

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model. Caches of the old weights are forgotten."""
        self._session.control.reset()
        return super().load_state_dict(*args, **kwargs)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """diffusers calls this when a pipeline is done: of the thread that it ran in, nothing is kept."""
        self._session.control.reset(mine=True)
        own: Any = getattr(super(), "_reset_stateful_cache", None)
        if own is not None:
            own(recurse)


class _Wrapper(OptimizedModel, OptimizedModule):
    """A model with caching beside the model itself, which is not changed."""

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
        self._session.control.reset(mine=True)

    def __copy__(self) -> "OptimizedModel":
        return _Wrapper(self._orig_mod, copy.copy(self._toca))

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptimizedModel":
        twin = _Wrapper(copy.deepcopy(self._orig_mod, memo), copy.copy(self._toca))
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Wrapper, (self._orig_mod, self._toca)


def wrap(model: nn.Module, session: Session) -> OptimizedModel:
    """A wrapper around a model that calls it with caching."""
    return _Wrapper(unwrapped(model), Calls(session))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of our wrappers and those of ``torch.compile``."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


_YIELDING = ("steps", "policy", "reset", "cache_bytes", "fresh_tokens")  # to attributes of the model's own


class _Own:
    """An attribute that a model has itself, where ``OptimizedModel`` would stand before it."""

    def __init__(self, before: type, name: str) -> None:
        self.before, self.name = before, name

    def __get__(self, model: Any, cls: type) -> Any:
        # No __set__: what the model keeps in its __dict__ comes first. AttributeError: its __getattr__ is asked.
        found = inspect.getattr_static(self.before, self.name, None)
        if found is None:
            raise AttributeError(self.name)
        return found.__get__(model, self.before) if hasattr(found, "__get__") else found


class _InPlace(OptimizedModel):
    """A user's own object with caching. Its class is made of this one and its class before, and has its name: models
    are saved and found by it."""

    _toca_before: ClassVar[Any]
    _toca_own: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **_: Any) -> None:
        """Classes that keep a list of their subclasses are not told of those made here."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """``type(model)(…)`` is a model without caching, as ``type(model).from_config(…)``."""
        return cls._toca_before(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        args = tuple(self._toca_before if arg is type(self) else arg for arg in args)
        if rest and isinstance(rest[0], dict):
            rest[0] = {**rest[0], "_toca": copy.copy(self._toca)}
        return _made_again, (self._toca_before, self._toca_own, make, args), *rest


class _Equal(type):
    """The metaclass of what is made of a class: equal to it where it is looked up, as by ``from_pipe`` of diffusers."""

    _toca_before: type

    def __eq__(cls, other: object) -> bool:
        return cls._toca_before is getattr(other, "_toca_before", other)

    def __hash__(cls) -> int:
        return hash(cls._toca_before)


_MADE: dict[tuple[type, tuple[str, ...]], type] = {}


def _made_class(before: Any, own: tuple[str, ...]) -> type:
    if (before, own) not in _MADE:
        body = {name: getattr(before, name) for name in ("__module__", "__qualname__", "__doc__")}
        body |= {"_toca_before": before, "_toca_own": own} | {name: _Own(before, name) for name in own}
        meta = types.new_class("Equal", (_Equal, type(before)))
        bases = (_InPlace, before)
        _MADE[before, own] = types.new_class(before.__name__, bases, {"metaclass": meta}, lambda b: b.update(body))
    return _MADE[before, own]


def _made_again(before: type, own: tuple[str, ...], make: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    model = make(*args)
    model.__class__ = _made_class(before, own)
    return model


def convert(model: nn.Module, session: Session) -> OptimizedModel:
    """The same object, with caching from now on.

    Raises:
        TocaError: Python does not let this object have another class.
    """
    model = unwrapped(model)
    before = vars(model).get("_toca")
    calls = Calls(session) if before is None else Calls(session, before.homes, before.replaced)
    revert(model)
    own = tuple(name for name in _YIELDING if hasattr(model, name))
    try:
        model.__class__ = _made_class(type(model), own)
    except TypeError as error:
        raise TocaError(
            f"{type(model).__name__} cannot be optimised in place ({error}): optimize(model, policy) makes a wrapper"
        ) from error
    vars(model)["_toca"] = calls
    return cast(OptimizedModel, model)


def revert(model: Any) -> Any:
    """What a model was before it was optimised: the same object, or the one in the wrapper."""
    if isinstance(model, _Wrapper):
        return model._model
    if isinstance(model, _InPlace):
        vars(model).pop("_toca").close()
        model.__class__ = model._toca_before
    return model
