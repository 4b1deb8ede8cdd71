"""Models that are optimised in place: the same objects, of the same classes.

Exact types are looked at (``from_pipe`` of diffusers compares them, Dynamo finds ``super()`` by them), so nothing is
made of a model's class. What its calls and attributes need is put on the class for as long as something is optimised,
and looks, when it is called, whether this object is.
"""

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from toca_compile.backend import OptimizedModule, skip_code, uninlined
from toca_compile.errors import TocaError
from toca_compile.model import Calls, Handle, OptimizedModel, unwrapped
from toca_compile.session import Session


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


@uninlined
def _cached(model: Any, *args: Any, **kwargs: Any) -> Any:
    return vars(model)["_toca"].of(model)(*args, **kwargs)


def _revived(calls: Calls, own: Sequence[str], cls: type) -> _InPlace:
    _prepare(cls, own)
    return _InPlace(calls, own)


def handle_of(model: Any) -> Handle | None:
    """What an optimised model is called and controlled by, also where torch.compile was put around it; None where it is
    not optimised."""
    while isinstance(model, OptimizedModule) and not isinstance(model, OptimizedModel):
        model = model._orig_mod
    if isinstance(model, OptimizedModel):
        return model
    found = vars(model).get("_toca") if isinstance(model, nn.Module) else None
    return found.of(model) if isinstance(found, _InPlace) else None


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
    """What a model was before it was optimised: the same object, or the one in the wrapper. What torch.compile was put
    around after that stays around it."""
    if isinstance(model, OptimizedModel):
        return model._model
    if isinstance(model, OptimizedModule):
        plain = revert(model._orig_mod)
        return model if plain is model._orig_mod else plain
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


_OFFERED = ("_session", "cache_context", "compile", "cache_bytes", "fresh_tokens", "reset", "steps", "policy")
_YIELDING = _OFFERED[3:]  # to attributes of the model's own


def _prepare(cls: type, own: Sequence[str]) -> None:
    """Let objects of a class be optimised in place. Nothing is traced through what is put here, and subclasses do not
    take part in it."""

    def called(before: Any) -> Any:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            # What Dynamo traces with a plain model is guarded by `hasattr`, and not by a look into its `__dict__`.
            if hasattr(self, "_toca") and _is_called(self, cls):
                return _cached(self, *args, **kwargs)
            return before(self, *args, **kwargs)

        # Dynamo is to begin with the model, also where another object of the class is compiled.
        skip_code(__call__.__code__)
        __call__._toca_before = before  # type: ignore[attr-defined]
        return functools.wraps(before)(__call__)

    def forgetting(before: Any, **only: Any) -> Any:
        @functools.wraps(before)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _is_called(self, cls):
                self.__dict__["_toca"].of(self)._session.control.reset(**only)
            return before(self, *args, **kwargs)

        method._toca_before = before  # type: ignore[attr-defined]
        return method

    put(cls, "__call__", called)
    put(cls, "load_state_dict", forgetting)
    if hasattr(cls, "_reset_stateful_cache"):  # diffusers calls it when a pipeline is done
        put(cls, "_reset_stateful_cache", functools.partial(forgetting, mine=True))
    for name in _OFFERED:
        if name not in own:
            kind = _Assignable if name == "policy" else _Offered
            put(cls, name, functools.partial(kind, cls, name))


def _is_called(model: Any, cls: type) -> bool:
    """Whether this is an optimised model, and this class the one to answer for it: its own, or where that was changed
    since (``__class__``, as parametrizations of torch do), what it was."""
    handle, own = vars(model).get("_toca"), type(model)
    if handle is None or own is cls:
        return handle is not None
    if (own, "__call__") in _PUT:
        return False  # what its own class put there calls this one
    _prepare(own, handle._own)
    return True


class _Offered:
    """An attribute of the handle, as one of the model."""

    def __init__(self, cls: type, name: str, before: Any) -> None:
        self.cls, self.name, self.before = cls, name, before

    def __get__(self, model: Any, owner: Any) -> Any:
        if model is not None and _is_called(model, self.cls):
            return getattr(vars(model)["_toca"].of(model), self.name)
        if self.before is None:
            raise AttributeError(f"{owner.__name__!r} has no attribute {self.name!r}")
        return self.before.__get__(model, owner) if hasattr(self.before, "__get__") else self.before


class _Assignable(_Offered):
    def __get__(self, model: Any, owner: Any) -> Any:
        own = {} if model is None else vars(model)
        return own[self.name] if self.name in own else super().__get__(model, owner)

    def __set__(self, model: Any, value: Any) -> None:
        if _is_called(model, self.cls):
            setattr(vars(model)["_toca"].of(model), self.name, value)
        else:
            vars(model)[self.name] = value
