"""The optimised model: the user's model with caching around it."""

import contextlib
import copy
import inspect
import logging
import operator
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from toca_compile.backend import (
    BackendCompilerFailed,
    OptimizedModule,
    TorchDynamoException,
    dynamo_limits,
    global_hooks,
    sizes_followed,
    split_by_sizes,
    uninlined,
    why_not_asked,
    why_recompiled,
)
from toca_compile.direct import Direct
from toca_compile.errors import (
    GRAD_ENABLED,
    NO_SITE,
    InferenceModeError,
    LoweringError,
    NoSiteError,
    PolicyError,
    TocaError,
    UnknownSizeError,
    no_rules,
)
from toca_compile.hooks import Hooked, Traceable, brought_in, hooked, why_no_site, why_untraced
from toca_compile.ir.plan import Policy
from toca_compile.ir.signature import UNKNOWN, Signature, called, fingerprint
from toca_compile.lowerings.inductor import machine_trouble
from toca_compile.policies.full import FullCompute
from toca_compile.progress import working
from toca_compile.runtime.controls import RunControls
from toca_compile.runtime.executor import Executor
from toca_compile.runtime.facts import facts_of
from toca_compile.runtime.host_known import HostKnown, known_to_host, plainly
from toca_compile.runtime.step_control import StepControl, Unexpected
from toca_compile.session import Session, patch_of
from toca_compile.traced import Caller, Traced, Tracing, context, waiting

log = logging.getLogger(__name__)

_RECOMPILE_LIMIT = 256  # Dynamo's default, 8, would turn the ninth policy of a graph into silent eager execution.
_DISTINCT = 4  # values in as many calls: no two pictures, whose sizes take turns
_SIGNATURES = 32
_RETRACED = 3  # calls in succession: not the first steps of as many samplings


# What a pipeline puts around each call of one of its models, in this thread or task; it is given what the call's inputs
# tell.
Around = Callable[[Signature], contextlib.AbstractContextManager[None]]
AROUND_CALL: ContextVar[Mapping[int, Around]] = ContextVar(
    "toca_around_call", default={}  # noqa: B039  (never changed, only replaced)
)  # fmt: skip


@dataclass
class _Entry:
    """One signature of calls: what Dynamo made of it, and why graphs of it run uncached."""

    call: Callable[..., Any]
    tracing: Tracing | None  # None: something stands around the model, or it is not traced at all
    policy: Policy
    executors: list[Executor] = field(default_factory=list)
    uncached: dict[str, TocaError] = field(default_factory=dict)
    traced: list[Traced] = field(default_factory=list)  # the graphs that Dynamo made of it
    retraced: int = 0  # calls in succession that were traced, though one like them had been
    direct: "Direct | Literal[False] | None" = None  # how its one graph is called; False: that cannot be told

    @property
    def refused(self) -> bool:
        """Whether the policy was more than the model can do."""
        return any(isinstance(error, PolicyError) for error in self.uncached.values())


@dataclass(frozen=True)
class _Last:
    """The call before, of one graph: inputs of which signature, what runs, and how that is called without Dynamo."""

    signature: Any
    executor: Executor
    direct: Direct

    def __call__(self, control: StepControl, scope: dict[str, Any]) -> Any:
        """A call like it, with these local variables, if it takes branches from caches, the sampling goes on, and the
        model has the tensors that it had.

        Raises:
            Unexpected: it is none.
        """
        run, executor = control.coming(), self.executor
        if run is None or not executor.is_cached(run):
            raise Unexpected
        reads = executor.reads(run)
        if reads is not None:
            with contextlib.suppress(Unexpected):  # of what follows from the time, something is to be made first
                return self._with(control, scope, reads, some=True)
        return self._with(control, scope, range(len(self.direct.names)), some=False)

    def _with(self, control: StepControl, scope: dict[str, Any], places: Sequence[int], *, some: bool) -> Any:
        inputs = self.direct.inputs(scope, places, self.executor.given)
        if inputs is None:
            raise Unexpected
        with control.unguarded():
            return self.direct.result(self.executor.call(inputs, some=some))


class Calls:
    """The calls of one model by one session, and what Dynamo made of them. It does not hold the model."""

    alive: ClassVar["weakref.WeakSet[Calls]"] = weakref.WeakSet()

    def __init__(self, session: Session, homes: Iterable[Any] = (), replaced: Any = None) -> None:
        self.session = session
        self.signatures = _SIGNATURES  # traced at a time; the one that was not called for longest is forgotten
        self.homes = set(homes)  # where the model was put: what must be made known where it is unpickled
        self.replaced = replaced  # the wrapper for which the model now stands in a pipeline
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._hook_lists: tuple[int, list[Any], tuple[type, ...]] = (-1, [], ())
        self._class_members: tuple[list[Any], tuple[Any, ...]] = ([], ())  # all, and the functions among them
        self._altered = False  # whether modules have hooks, or a forward, of their own
        self._dispatched = False  # whether the call that runs has come as far as here
        self._hooked: tuple[tuple[str, ...], list[Hooked], Traceable] = ((), [], Traceable(()))
        # A policy, what it was told of a call, what it meant by that, and the weights' fingerprint if it asks for it.
        self._fit: tuple[Policy, tuple[Signature, Signature], Policy, str | None] | None = None
        self._last: _Last | None = None  # the call before, if one like it can be made without guards
        # One for all calls, which are made one at a time: each new one would stay in the thread's context.
        self._limits = dynamo_limits(_LIMITS)
        self.context, self._caller = context(), Caller(session)
        session.bounded = True
        Calls.alive.add(self)

    def __reduce__(self) -> Any:
        # Graphs and caches are made anew in a copy, and where it is read.
        return type(self), (self.session.fresh(), tuple(self.homes))

    def run(self, step: Callable[..., Any], model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One call of the model, which is one step, or a part of one; ``step`` dispatches it."""
        session = self.session
        try:
            return self._run(step, model, args, kwargs)
        except UnknownSizeError as error:
            if session.follows_sizes is False:
                raise
            log.info("%s: %s", type(model).__name__, error)
        # First as torch.compile does by itself, which splits a model there; then in one graph; then split after all.
        session.follows_sizes = session.follows_sizes is None
        self._limits = dynamo_limits({**_LIMITS, **sizes_followed(session.follows_sizes)})
        self.context = context(whole=session.follows_sizes)
        self._forget_all()
        session.broken, session.breaks = False, {}
        session.control.calls -= 1  # that one computed nothing
        return self.run(step, model, args, kwargs)

    def _run(self, step: Callable[..., Any], model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        session = self.session
        if session.strict:
            _check_mode(model)
        self._watch_numbers(args, kwargs)
        control, leaves = session.control, _leaves(args, kwargs)
        known: dict[int, Any] = {}
        if any(isinstance(value, HostKnown) for value in leaves.values()):
            args, kwargs, known = plainly(args, kwargs)
            leaves = _leaves(args, kwargs)
        control.begin_call(leaves, known)
        failed, shapes, self._dispatched = True, [], False
        try:
            out = step(*args, **kwargs)
            failed, shapes = False, [tuple(v.shape) for v in _leaves((out,), {}).values() if _is_tensor(v)]
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, TocaError):
                raise error.inner_exception from None
            raise machine_trouble(error) or error from error
        except TorchDynamoException as error:
            if not session.follows_sizes:
                raise
            raise UnknownSizeError(str(error).splitlines()[0]) from None
        except LoweringError as error:
            if session.strict:
                raise
            session.warn_once(f"{error} The model runs uncached.")
            return _plain_call(model)(model, *args, **kwargs)
        finally:
            reached = control.end_call(failed, shapes)
        if not reached:
            self._uncached(model)
        return out

    def fitted(self, policy: Policy, model: nn.Module, call: Signature) -> Policy:
        """A policy as it is meant for a call; one without ``for_call`` is meant as it is. A model's weights are looked
        at when it comes under a policy, and not again.

        Raises:
            PolicyError: it is made for something else (with ``strict``; else the call runs uncached).
        """
        if not hasattr(policy, "for_call"):
            return policy
        told = (call, self.session.control.announced)
        if self._fit is None or self._fit[0] is not policy or self._fit[1] != told:
            known = call.filled(told[1])
            own = self._fit[3] if self._fit is not None and self._fit[0] is policy else None
            if own is None and getattr(policy, "made_for", None) is not None:
                own = fingerprint(model)
            try:
                meant = policy.for_call(replace(known, model=own))
            except PolicyError as error:
                if self.session.strict:
                    raise
                self.session.warn_once(f"{error}. The model runs uncached.")
                meant = FullCompute()
            self._fit = (policy, told, meant, own)
        return self._fit[2]

    def dispatch(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The call by its signature: each is traced by itself, unless a model like it was (``Tracing``).

        Of a step that takes branches from caches, signature and run are looked at alone: the model is looked at, its
        hooks and by Dynamo's guards, where a step computes everything, and what is cached is of the model as it was."""
        entries, self._dispatched = self._entries, True
        signature = _signature(args, kwargs, self.session.control.known)
        last, scope = self._last, {"self": model, "args": args, "kwargs": kwargs}
        if last is not None and last.signature == signature:
            try:
                return last(self.session.control, scope)
            except Unexpected:
                pass
        self._last = None
        key = (*signature, self._hooks(model))
        entry = entries.get(key)
        if entry is not None and entry.refused and entry.policy is not self.session.policy:
            self._forget(entries.pop(key))  # the policy now may be one that the graphs can follow
            entry = None
        if entry is None:
            entry = entries[key] = self._new_entry(model, key, args, kwargs)
            if len(entries) > self.signatures:
                self._forget(entries.popitem(last=False)[1])
        entries.move_to_end(key)
        shared = entry.tracing is not None and len(entry.tracing.users) > 1
        if shared and not entry.tracing.holds(model, args, kwargs):  # type: ignore[union-attr]
            self._trace(entry, Tracing(None, _plain_call(model), self.context))  # it is no longer like others
            shared = False
        session = self.session
        session.patch = patch_of(model)
        before, session.uncached = session.seen, entry.uncached
        known, session.splits = len(session.executors), split_by_sizes()
        made = len(self._caller.made)
        new = not entry.executors and not entry.uncached
        told = working(f"tracing {type(model).__name__}") if new else contextlib.nullcontext()
        ran, self._caller.seen = [], []
        try:
            with _UNFUSED, self._limits, self._caller, told, self._hooked[2]():
                out = self._call(entry, scope, held=shared)
            ran = self._caller.seen
            return out
        finally:
            self._caller.seen = None
            if session.seen != before:
                entry.executors += session.executors[known:]
                entry.traced += list(self._caller.made)[made:]
                if entry.tracing is not None:
                    entry.tracing.graphs |= dict.fromkeys(entry.traced)
                if not new and entries.get(key) is entry:  # layers that were replaced have hooks and classes of theirs
                    entries[(*signature, self._hooks(model))] = entries.pop(key)
            entry.retraced = entry.retraced + 1 if session.seen != before and not new else 0
            if entry.retraced == _RETRACED:
                self._warn_of_retracing(entry)
            session.graphs = len(entry.traced)
            if not new and len(ran) == 1:
                self._last = self._called(entry, signature, scope, *ran[0], out)

    def _call(self, entry: _Entry, scope: dict[str, Any], *, held: bool) -> Any:
        """A call of an entry. ``held``: Dynamo's guards were found to hold, and it would ask them once more."""
        if not held or not entry.direct or len(entry.traced) != 1:
            return entry.call(scope["self"], scope["args"], scope["kwargs"])
        return entry.direct.result(self._caller(entry.traced[0], entry.direct.every(scope)))

    def _trace(self, entry: _Entry, tracing: Tracing) -> None:
        if entry.tracing is not None:
            entry.tracing.users.discard(self)
        entry.tracing, entry.call = tracing, tracing.call
        tracing.users.add(self)

    def _called(
        self, entry: _Entry, signature: Any, scope: dict[str, Any], inputs: Sequence[Any], results: Any, out: Any
    ) -> "_Last | None":
        """A call of an entry, as one like it is made without Dynamo; None where that cannot be told."""
        if entry.tracing is None or len(entry.executors) != 1 or len(entry.traced) != 1:
            return None
        if self.session.broken or self._hooked[1]:
            return None
        # What an object says, which the signature tells by its type, Dynamo's guards alone look at.
        if any(isinstance(kind, type) for _, kind, *_ in signature[2]):
            return None
        names = entry.traced[0].names
        if entry.direct is None and names is not None:
            entry.direct = Direct.of(names, scope, inputs, results, out) or False
        if not entry.direct:
            return None
        entry.direct.guarded(inputs)
        return _Last(signature, entry.executors[0], entry.direct)

    def close(self) -> None:
        """Forget what was compiled, and every run."""
        self._forget_all()
        self._hook_lists, self._hooked, self._last = (-1, [], ()), ((), [], Traceable(())), None
        self._class_members = [], ()
        self.session.control.reset()
        Calls.alive.discard(self)

    def _forget_all(self) -> None:
        while self._entries:
            self._forget(self._entries.popitem()[1])

    def _forget(self, entry: _Entry) -> None:
        self._last = None
        if entry.tracing is not None:
            entry.tracing.users.discard(self)
        for traced in entry.traced if not self.session.breaks else ():
            self._caller.made.pop(traced, None)
        if not self.session.breaks:
            # Graphs behind a break belong to code of the model, not to the entry's: they go on being reached.
            self.session.forget(entry.executors)

    def _hooks(self, model: nn.Module) -> tuple[Any, ...]:
        """The hooks of all submodules, those of all modules there are, and the functions of their classes: they are
        traced, and Dynamo does not look for new ones. Hooks that stand around a forward are told by their classes,
        since some are put there anew at each call of a pipeline."""
        seen, listed, classes = self._hook_lists
        modules = [module() for module, _, _ in listed]
        if seen != self.session.seen or None in modules:  # a layer was replaced
            modules = list(model.modules())
            listed = [(weakref.ref(m), m._forward_pre_hooks, m._forward_hooks) for m in modules]
            classes = _classes(modules)
            self._hook_lists = (self.session.seen, listed, classes)
        keys = tuple(key for _, pre, post in listed if pre or post for key in (*pre, *post))
        around = any("forward" in m.__dict__ for m in modules)
        self._altered = bool(keys) or around
        keys += (*global_hooks(), *self._functions(classes))
        found = hooked(model) if around else []
        names = tuple(name for one in found for name in (one.path, *one.names))
        if names != self._hooked[0]:
            self._hooked = (names, found, Traceable(found))
        return (*keys, *names)

    def _functions(self, classes: Sequence[type]) -> tuple[Any, ...]:
        """The functions of classes."""
        held = [value for cls in classes for value in vars(cls).values()]
        before, functions = self._class_members
        if len(held) != len(before) or not all(map(operator.is_, held, before)):
            functions = tuple(filter(_is_traced, held))
            self._class_members = held, functions
        return functions

    def _new_entry(self, model: nn.Module, key: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Entry:
        call, policy = _plain_call(model), self.session.policy
        why = why_untraced(type(model).__name__, self._hooked[1])
        if why is not None:
            if self.session.strict:
                raise TocaError(f"{why} (strict=False runs it uncached)")
            self.session.warn_once(f"{why}. The model runs uncached.")
            return _Entry(
                lambda _, args, kwargs: call(model, *args, **kwargs), None, policy, uncached={why: TocaError(why)}
            )
        shards = brought_in(model)
        if shards:
            self.session.breaks[shards] = None
        if has_hooks(model):
            # Hooks of the whole model (offloading, timers) run as they are, outside of what is traced.
            inner = waiting(lambda args, kwargs: compiled(*args, **kwargs))
            compiled = self.context(types.MethodType(call, model))
            return _Entry(lambda _, args, kwargs: inner(args, kwargs), None, policy)
        kind = None if self._altered else (type(model), call, key, self.session.follows_sizes)
        tracing = Tracing.found(kind, model, args, kwargs) if kind is not None else None
        tracing = tracing or Tracing(kind, call, self.context)
        entry = _Entry(tracing.call, None, policy)
        self._trace(entry, tracing)
        return entry

    def _watch_numbers(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A Python number that is another one at each call of a run is traced anew for each value: say so."""
        session = self.session
        for name, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                last = session.numbers.setdefault(name, deque(maxlen=_DISTINCT))
                last.append(value)
                if len(set(last)) == _DISTINCT:
                    session.warn_once(
                        f"argument {name!r} is a Python number, and another one at each call, so torch.compile traces "
                        "the model again for each value and no cache is ever reused: pass it as a tensor"
                    )

    def _warn_of_retracing(self, entry: _Entry) -> None:
        """Something that the traced code reads is another at each call."""
        why = why_recompiled(entry.tracing.code) if entry.tracing is not None else ""
        self.session.warn_once(
            "torch.compile traced the model again at each of the last calls, though their inputs are alike, which "
            "takes longer than caching saves (and out of a pipeline no cache is reused): what it reads changes from "
            "call to call"
            f"{f' (no longer true: {why})' if why else ''}. A hook that appends to a list, or a counter that the model "
            "keeps, is such a thing: take it away, or put it into a function under torch.compiler.disable"
        )

    def _uncached(self, model: nn.Module) -> None:
        """No graph with sites ran in a call: say why, and once."""
        session = self.session
        name = type(model).__name__
        why = next(iter(session.uncached.values()), None)
        if isinstance(why, NoSiteError):
            # What hooks do is traced with the model, unless Dynamo stops at it.
            blamed = (why_no_site(self._hooked[1]) if session.broken else "") or no_rules(why.unknown)
            error: TocaError = NoSiteError(
                f"no site was found in {name} for inputs like these{f'. {blamed}' if blamed else f': it {NO_SITE}'} "
                f"(strict=False runs it uncached) {session.split(session.graphs)}".rstrip()
            )
        elif why is not None and session.strict:
            raise why
        elif why is not None:
            return  # as was said when it was traced
        elif not self._dispatched:
            error = TocaError(
                f"{name} ran uncached, because the forward of what optimize returned was replaced after that, by one "
                "that does not call the one before: assign it to the model that optimize was given, where it is traced "
                "(strict=False allows it)"
            )
        else:
            known = why_not_asked()
            guess = (
                "torch.compile handed over no graph. It may be switched off (look for TORCHDYNAMO_DISABLE, "
                "torch.compiler.disable, an active TorchDispatchMode), or have given up after "
                f"{_RECOMPILE_LIMIT} graphs of one signature"
            )
            error = TocaError(f"{name} ran uncached, because {known or guess} (strict=False allows it)")
        if session.strict:
            raise error
        session.warn_once(str(error))


class Controls(RunControls):
    """What is seen and said of the caching of one model: an optimised model is one, ``controls`` gives one for any."""

    @property
    def _session(self) -> Session:
        raise NotImplementedError

    @property
    def _control(self) -> StepControl:
        return self._session.control

    def begin(self, timesteps: Any) -> Any:
        """A sampling begins, in this thread or task, and its timesteps are these: what follows from them alone
        (embeddings, modulations, gates) is made for all of them at once by its first call. Of a scheduler the policy is
        told, too, what it is, what the model predicts, and how far each step moves the picture.

        Pipelines of diffusers announce those of their scheduler by themselves. Rows differ from those made step by step
        by rounding (1e-6 in float32). Where the model is told the time in a form that is not recognised, nothing is
        made ahead; nor on an accelerator, whose numbers the host does not see, but for a loop over what is returned:
        ``for t in opt.begin(scheduler.timesteps)``.

        Args:
            timesteps: as the scheduler has them, in the order of sampling; or the scheduler itself, which was given
                its timesteps.

        Returns:
            The timesteps; of a tensor on an accelerator, one of the same memory whose numbers the host knows.

        Raises:
            TocaError: they are no numbers.
        """
        try:
            facts = UNKNOWN
            if hasattr(timesteps, "timesteps"):
                facts, timesteps = facts_of(timesteps, len(timesteps.timesteps)), timesteps.timesteps
            numbers = torch.as_tensor(timesteps if isinstance(timesteps, torch.Tensor) else list(timesteps))
            announced = replace(facts, times=tuple(float(t) for t in numbers.reshape(-1).tolist()))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TocaError(f"timesteps must be numbers, as a scheduler's timesteps are, not {timesteps!r}") from error
        with self._session.control.lock:
            self._session.control.reset(mine=True)
            self._session.control.announce(announced)
        return known_to_host(timesteps)

    @property
    def policy(self) -> Policy:
        """The policy. Assigning another takes effect with the next run, without tracing again."""
        return self._session.policy

    @policy.setter
    def policy(self, policy: Policy | str) -> None:
        with self._session.control.lock:
            self._session.set_policy(policy)

    @property
    def lowering(self) -> str:
        """How graphs are lowered. Assigning another name takes effect with the next run, without tracing again."""
        return self._session.lowering

    @lowering.setter
    def lowering(self, name: str) -> None:
        with self._session.control.lock:
            self._session.set_lowering(name)

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
            call = called(_leaves(args, kwargs)) if hasattr(session.policy, "for_call") else UNKNOWN
            if around is None:
                session.follow(self._toca.fitted(session.policy, self._model, call))
                return self._toca.run(self._step, self._model, args, kwargs)
            with around(call):
                return self._toca.run(self._step, self._model, args, kwargs)

    @contextlib.contextmanager
    def cache_context(self, name: str, **told: Any) -> Iterator[None]:
        """As ``Controls.cache_context``, and the model's own by that name, if it has one: diffusers' caches ask for
        it."""
        own = inspect.getattr_static(type(self._model), "cache_context", None)
        own = getattr(own, "before", own)  # that which ours stands in for
        context = contextlib.nullcontext() if own is None else own.__get__(self._model)(name, **told)
        with context, super().cache_context(name, **told):
            yield

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
        if not args and kwargs.keys() <= _OF_TORCH:
            raise TocaError(
                "the model is compiled already, with caching: compile(*example_inputs) takes what the model is called "
                "with, and makes all variants of the plan before the first step"
            )
        session, own = self._session, "(compile)"
        with session.control.lock, torch.no_grad():
            try:
                with Controls.cache_context(self, own, step_index=0):
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

    def __init__(self, model: nn.Module, session: Session, homes: Iterable[Any] = ()) -> None:
        calls = Calls(session, homes)
        object.__setattr__(self, "_toca", calls)
        OptimizedModule.__init__(self, model, calls.context)

    @uninlined
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Handle.__call__``."""
        return super().__call__(*args, **kwargs)

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

    def __setattr__(self, name: str, value: Any) -> None:
        """As of the model. ``torch.func.functional_call`` comes here with a tensor that is no parameter."""
        try:
            super().__setattr__(name, value)
        except TypeError as error:
            raise TypeError(
                f"{error}; torch.func.functional_call of an optimised model takes the names that its own "
                f"named_parameters() has: '_orig_mod.{name}'"
            ) from None

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """diffusers calls this when a pipeline is done: of the thread that it ran in, nothing is kept."""
        self._session.control.reset(mine=True)

    def __copy__(self) -> "OptimizedModel":
        return OptimizedModel(self._orig_mod, self._session.fresh(), self._toca.homes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptimizedModel":
        twin = OptimizedModel(copy.deepcopy(self._orig_mod, memo), self._session.fresh(), self._toca.homes)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OptimizedModel, (self._orig_mod, self._session.fresh(), tuple(self._toca.homes))


def wrap(model: nn.Module, session: Session) -> OptimizedModel:
    """A wrapper around a model that calls it with caching."""
    return OptimizedModel(unwrapped(model), session)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of our wrappers and those of ``torch.compile``; of what that compiled, nothing is used."""
    compiled = False
    while isinstance(model, OptimizedModule):
        compiled |= not isinstance(model, OptimizedModel)
        model = model._orig_mod
    if compiled or model._compiled_call_impl is not None:
        log.info(
            "%s was compiled by torch.compile before: caching compiles the model itself, and that is left aside until "
            "restore(…)",
            type(model).__name__,
        )
    return model


def _plain_call(model: nn.Module) -> Callable[..., Any]:
    """What a call of the model is without us, and without what ``model.compile()`` put in its place."""
    call = type(model).__call__
    call = getattr(call, "_toca_before", call)
    return nn.Module._call_impl if call is nn.Module.__call__ else call


def _check_mode(model: nn.Module) -> None:
    if model.training:
        raise InferenceModeError("the model is in training mode: call model.eval() before sampling")
    if torch.is_grad_enabled():
        raise InferenceModeError(GRAD_ENABLED)


def _signature(args: Sequence[Any], kwargs: Mapping[str, Any], known: Mapping[int, Any]) -> tuple[Any, ...]:
    """What tells traced calls apart: kinds of inputs, which of them the host knows (``known``) and which are the same,
    and modes."""
    leaves = _leaves(args, kwargs)
    first: dict[int, Any] = {}
    kinds = tuple(
        (k, _kind(v), id(v) in known, first.setdefault(id(v), k) if _is_tensor(v) else None) for k, v in leaves.items()
    )
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), *(
        torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cpu", "cuda")
    )  # fmt: skip
    return len(args), tuple(kwargs), kinds, modes


_TOLD = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, type(None))  # by their values


def _kind(value: Any) -> Any:
    if _is_tensor(value):
        return (
            type(value), value.shape, value.stride() if value.layout == torch.strided else None, value.dtype,
            value.device, value.is_inference(),
        )  # fmt: skip
    return value if isinstance(value, _TOLD) else type(value)


def has_hooks(model: nn.Module) -> bool:
    """Whether something stands around the whole model, which runs outside of what is traced."""
    return bool(model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model))


def _classes(modules: Iterable[nn.Module]) -> tuple[type, ...]:
    """The classes of modules, and of what they hold that is called as they are (processors of attention)."""
    held = (value for m in modules for value in vars(m).values() if callable(value))
    found = dict.fromkeys(base for x in (*modules, *held) for base in type(x).__mro__)
    return tuple(cls for cls in found if cls not in (nn.Module, object) and not cls.__module__ == "builtins")


def _is_traced(value: Any) -> bool:
    # Not what stands there while something is optimised in place: that is no part of what is traced.
    return type(value) is types.FunctionType and not hasattr(value, "_toca_before")


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
_OF_TORCH = frozenset(("fullgraph", "dynamic", "backend", "mode", "options", "disable"))
_LIMITS = {"recompile_limit": _RECOMPILE_LIMIT, "accumulated_recompile_limit": 4 * _RECOMPILE_LIMIT}
