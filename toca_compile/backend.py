"""The Dynamo backend: the entry point, and the hooks of Dynamo that are not public.

Each was seen on torch 2.13 and has a test named after it in ``tests/test_backend_hooks.py``, which fails where a
version of torch has changed it. (Inductor's stand in ``lowerings/inductor.py``, and ``make_fx``'s in the capture pass.)
"""

import sys
import types
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizedModule, _debug_get_cache_entry_list, remove_from_cache, skip_code
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters, guard_failures
from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting
from torch._subclasses import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from toca_compile.errors import (
    GRAD_ENABLED,
    InferenceModeError,
    NoSiteError,
    PolicyError,
    TocaError,
    UnknownSizeError,
    UnsupportedGraphError,
)
from toca_compile.ir.graph import TORCH
from toca_compile.ir.signature import called, fingerprint
from toca_compile.runtime.executor import Executor
from toca_compile.session import Options, Session

Called = TypeVar("Called", bound=Callable[..., Any])


def toca(
    gm: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend behind ``torch.compile(model, backend="toca", options={"policy": policy, …})``.

    Options are the keywords of ``toca_compile.optimize``: ``policy`` (here, too, a level's name will do, and
    ``"balanced"`` is the default), ``lowering``, ``strict``, ``grid``, ``hoist``, ``mode``. A mode may also be
    ``torch.compile``'s own argument, which takes no options beside it.
    """
    # torch hands a backend its options, and nothing that tells one torch.compile call from another: options may be one
    # dictionary for several calls, or none. What does is the wrapper that calls us.
    owner = sys._getframe(1).f_locals.get("self")
    try:
        session = session_of(owner, options if mode is None else {**(options or {}), "mode": mode})
        graph = graph_of(session, gm, inputs)
        if isinstance(graph, _Graph) and owner is not None:
            owner._toca_starting = None  # from here on the graph keeps the session, and later the model
        return graph
    except TocaError as error:
        return _raising(error)


def graph_of(session: Session, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """What Dynamo is given for one graph that it found.

    Dynamo keeps its backends and what they return for as long as the process lives, so it is given neither the session
    nor an executor, but a stand-in that refers to it weakly (``_Graph``), or one that asks who calls
    (``traced.Caller``).

    A graph that cannot be compiled with caching gets a callable that raises the typed error when it is called (with
    ``strict``), or runs uncached after one warning: Dynamo wraps what a backend raises, and users should see our error.
    """
    session.seen += 1
    session.recompiles += session.control.calls > 0
    _note_break(session, gm)
    session.broken |= _is_nested()
    if _may_be_whole(session):
        raise UnknownSizeError("torch.compile splits the model")
    try:
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            raise InferenceModeError(GRAD_ENABLED)
        fixed = _static_inputs(gm, inputs)
        if not session.bounded and hasattr(session.policy, "for_call"):
            _fit(session, [x for x, own in zip(inputs, fixed, strict=True) if not own])
        executor = session.compile(gm, fixed, inputs)
    except NoSiteError as error:
        session.uncached.setdefault(str(error), error)
        if session.strict and not session.bounded and not session.broken and not session.executors:
            return _raising(error)
        if not session.bounded and not session.executors:
            session.warn_once(f"{error} {session.split()}".rstrip())
        return _plain(session, gm, inputs)
    except TocaError as error:
        if isinstance(error, UnknownSizeError) and session.bounded and session.follows_sizes is not False:
            raise  # the model traces it again, and lets torch.compile split it there
        session.uncached.setdefault(str(error), error)
        # A fragment that writes to what the fragment before it made runs as it is; the others may be cached.
        if session.strict and not (session.broken and isinstance(error, UnsupportedGraphError)):
            return _raising(error)
        session.warn_once(f"{str(error).rstrip('.')}. The graph runs uncached.")
        return _plain(session, gm, inputs)
    finally:
        _let_go(gm)
    if session.bounded:
        return executor
    module = compiled_module()
    if module is not None:
        _hold(_BY_MODULE, module, session)
    return _Graph(executor, None if module is not None else session)


def _fit(session: Session, inputs: Sequence[Any]) -> None:
    """Let a bare torch.compile call follow the policy as it is meant for a graph with these inputs. Which of them are
    the latents nobody says: it is meant for them if it is for one.

    Raises:
        PolicyError: it is made for something else.
    """
    policy, model = session.policy, compiled_module()
    asks = model is not None and getattr(policy, "made_for", None) is not None
    own = fingerprint(model) if model is not None and asks else None
    calls = list(dict.fromkeys(called({0: x}) for x in inputs)) or [called({})]
    known = [call for call in calls if call.size is not None] or calls
    *others, last = [replace(c, model=own).filled(session.control.announced) for c in known]
    for call in others:
        with suppress(PolicyError):
            return session.follow(cast(Any, policy).for_call(call))
    session.follow(cast(Any, policy).for_call(last))


def compiled_module() -> torch.nn.Module | None:
    """The module that torch.compile was given, if it was one: what its wrapper calls is bound to it."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        frame = frame.f_back
    module = getattr(frame.f_locals.get("fn"), "__self__", None) if frame is not None else None
    return module if isinstance(module, torch.nn.Module) else None


def _note_break(session: Session, gm: fx.GraphModule) -> None:
    """Why, and where, Dynamo split the model before this graph, if it did."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    if getattr(reason, "graph_break", False):
        session.broken = True
        frames = [f for f in reason.user_stack if not f.filename.startswith(TORCH)] or reason.user_stack
        at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        # Under a default device Dynamo follows no method of tensors that torch wraps in Python, such as unflatten.
        wrapped = "super()" in str(reason.reason) and len(frames) < len(reason.user_stack)
        mode = "; is a default device set? Say the device where tensors are made instead" if wrapped else ""
        session.breaks[f"{str(reason.reason).splitlines()[0]}{at}{mode}"] = None


def sizes_followed(follow: bool) -> dict[str, bool]:
    """Dynamo's setting, whether it follows what has a size that only values tell, or splits a model there."""
    return {"capture_dynamic_output_shape_ops": follow}


def split_by_sizes() -> int:
    """How often Dynamo split a model there."""
    return sum(n for reason, n in counters["graph_break"].items() if "Dynamic shape operator" in reason)


def _may_be_whole(session: Session) -> bool:
    """Whether the model is about to be split where a size follows from values, and nobody tried yet to follow that."""
    once = session.bounded and session.follows_sizes is None and not any(p.written for p in session.programs)
    return once and split_by_sizes() > session.splits


def _let_go(gm: fx.GraphModule) -> None:
    """Drop the weak references by which Dynamo knows tensors again: the graph, which is kept, holds fake tensors, and
    they those; and ``module.to`` swaps the parameters of quantised layers, or all where it is asked to
    (``set_swap_module_params_on_conversion``), which torch refuses for a tensor that one refers to."""
    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    for mode in {value.fake_mode for value in values if isinstance(value, FakeTensor)}:
        mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


def _plain(session: Session, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    if session.lowering != "inductor":
        return gm.forward
    return lookup_backend("inductor")(gm, list(inputs))


def session_of(owner: Any, options: dict[str, Any] | None = None) -> Session:
    """The session of one torch.compile call, found by the object by which torch represents that call.

    Raises:
        PolicyError: the options have an unknown key.
    """
    session = getattr(owner, "_toca_session", lambda: None)()
    if session is None:
        given = dict(options or {})
        known = {"policy", *Options.__annotations__}
        if set(given) - known:
            unknown = ", ".join(sorted(set(given) - known))
            raise PolicyError(f"unknown options for backend 'toca': {unknown}; there are {', '.join(sorted(known))}")
        session = Session(given.pop("policy", "balanced"), **given)
        if owner is not None:
            owner._toca_session, owner._toca_starting = weakref.ref(session), session
    return session


# Sessions of bare torch.compile calls, by the model, or of functions by the first parameter: they live as long as it.
_BY_MODULE: "weakref.WeakKeyDictionary[torch.nn.Module, list[Session]]" = weakref.WeakKeyDictionary()
_BY_PARAMETER = WeakTensorKeyDictionary()


def _hold(keeper: Any, key: Any, session: Session) -> None:
    held = keeper.setdefault(key, [])
    held += [session] if session not in held else []


def compiled_session(model: Any) -> Session | None:
    """The session of a model's own ``model.compile(backend="toca")``, after its first call."""
    if getattr(model, "_compiled_call_impl", None) is None:
        return None
    return next(reversed(_BY_MODULE.get(model, [])), None)


class _Graph:
    """What Dynamo is given for one graph: it refers to the executor weakly, once a parameter of the model holds the
    session (``starting``) in its place."""

    def __init__(self, executor: Executor, starting: Session | None) -> None:
        # A list, since Dynamo copies our attributes into a wrapper of its own.
        self._executor, self._starting = weakref.ref(executor), [starting] if starting is not None else []

    def __call__(self, *inputs: Any) -> Any:
        executor = self._executor()
        if executor is None:
            raise TocaError(
                "this graph belongs to an optimised model that is gone: keep what optimize or torch.compile "
                "returned, or make it again"
            )
        if self._starting and executor.parameter(inputs) is not None:
            _hold(_BY_PARAMETER, executor.parameter(inputs), self._starting.pop())
        return executor(*inputs)


def dynamo_context(backend: Callable[..., Any], whole: bool = False) -> Any:
    """What makes a callable one that Dynamo compiles by a backend. The cache key of a graph is its shape: a new
    resolution or batch is a new graph, never a generic slow one. ``whole``: where Dynamo would split it, it raises
    ``TorchDynamoException``."""
    return torch._dynamo.optimize(backend, nopython=whole, dynamic=False)


def dynamo_limits(limits: dict[str, Any]) -> AbstractContextManager[Any]:
    """Dynamo's settings, for a while."""
    return torch._dynamo.config.patch(limits)


def input_names(gm: fx.GraphModule) -> tuple[str, ...] | None:
    """By what expressions over the local variables ``L`` of the traced function Dynamo finds each input of the graph
    that it hands over; None where it does not say, or where its code does more than call the graph: it changes what was
    there before the call (an attribute of the model, a list of the caller's)."""
    tx = InstructionTranslator.current_tx()
    effects = tx.output.side_effects
    changed = (v.mutation_type for v in effects.id_to_variable.values() if effects.is_modified(v))
    outside = any(isinstance(kind, (ValueMutationExisting, AttributeMutationExisting)) for kind in changed)
    if outside or effects.tensor_hooks or effects.save_for_backward or tx.output.random_calls:
        return None
    arguments = [node.meta.get("grapharg") for node in gm.graph.nodes if node.op == "placeholder"]
    if not all(hasattr(argument, "source") for argument in arguments):
        return None
    names: list[Any] = [argument.source.name for argument in arguments]
    return tuple(str(name() if callable(name) else name) for name in names)


def is_traced_elsewhere(error: RuntimeError) -> bool:
    """Whether a call was refused, before it began, because another thread traces: there is one flag for all."""
    return "using FX to symbolically trace" in str(error)


def guards_hold(code: types.CodeType, scope: dict[str, Any]) -> bool:
    """Whether what Dynamo made of a code object, if that is one thing, is right for a call with these local
    variables."""
    made = _debug_get_cache_entry_list(code)
    return len(made) == 1 and bool(made[0].guard_manager.check(scope))


def why_recompiled(code: types.CodeType) -> str:
    """What Dynamo compiled a code object anew for, the last time: the check that failed; empty where none did."""
    reasons = guard_failures.get(code, [])
    first = str(reasons[-1]).splitlines()[0] if reasons else ""
    return first.partition(": ")[2].partition("  #")[0].strip()


def uninlined(function: Called) -> Called:
    """A function that runs as it is where what calls it is traced: what it compiles would there be inlined, and our
    backend never asked."""
    return cast(Called, torch.compiler.disable(function, reason="toca_compile compiles the model that is called here"))


def global_hooks() -> tuple[int, ...]:
    """The hooks of all modules there are, by their numbers."""
    every = torch.nn.modules.module
    return (*every._global_forward_pre_hooks, *every._global_forward_hooks)


def why_not_asked() -> str:
    """Why Dynamo compiles nothing here, as far as it can be told; empty where nothing speaks against it."""
    if torch.compiler.is_exporting():
        return (
            "it is being exported, and caches are no part of what torch.export makes of a model: a file with them is "
            "made by toca_compile.export(model, policy, inputs, path), and restore(model) gives back the model without"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return (
            "it was called within a transform of torch.func (vmap, grad, …), in which torch.compile traces nothing: "
            "call it with the whole batch, or transform restore(model)"
        )
    return ""


def _is_nested() -> bool:
    """Whether the frame being compiled was called by user code that runs uncompiled: then it is a fragment of the
    model, not the model. Between torch.compile's wrapper and Dynamo there are otherwise torch's own frames only."""
    frame = sys._getframe(1)
    own = (str(Path(__file__).parent), TORCH)
    while frame.f_code.co_name != "compile_wrapper":
        if not frame.f_code.co_filename.startswith(own) or frame.f_back is None:
            return frame.f_back is not None
        frame = frame.f_back
    return False


def _raising(error: TocaError) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def _static_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[bool, ...]:
    """Which inputs are parameters or buffers of the model."""
    fixed = []
    for node, value in zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True):
        source = getattr(node.meta.get("grapharg"), "source", None)
        owned = False
        if source is not None:
            guard = source.guard_source
            guard = guard() if callable(guard) else guard
            owned = guard.is_unspecialized_nn_module() or guard.is_specialized_nn_module()
        fixed.append(owned or isinstance(value, torch.nn.Parameter))
    return tuple(fixed)


__all__ = [
    "BackendCompilerFailed",
    "OptimizedModule",
    "TorchDynamoException",
    "compile_lock",
    "compiled_module",
    "compiled_session",
    "dynamo_context",
    "dynamo_limits",
    "global_hooks",
    "graph_of",
    "guards_hold",
    "input_names",
    "is_traced_elsewhere",
    "remove_from_cache",
    "session_of",
    "sizes_followed",
    "skip_code",
    "split_by_sizes",
    "toca",
    "uninlined",
    "why_not_asked",
    "why_recompiled",
]
