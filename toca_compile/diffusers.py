"""Pipelines of diffusers: one call of the pipeline is one run of its transformer.

Everything a run needs to know is there before the first model call, and on the host: how many steps, from the length of
the scheduler's timesteps; whether there is guidance, from the call's own arguments; which guidance pass a model call
is, from how many came since the scheduler last stepped. No pipeline is known by name, and diffusers is not imported.
"""

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from toca_compile.errors import ExportError, PolicyError
from toca_compile.in_place import handle_of, put, revert, tidy
from toca_compile.ir.fields import told
from toca_compile.ir.plan import Policy
from toca_compile.ir.signature import Signature
from toca_compile.model import AROUND_CALL, Controls, Handle
from toca_compile.runtime.facts import facts_of
from toca_compile.runtime.host_known import HostKnown, known_to_host
from toca_compile.runtime.sight import on_host

log = logging.getLogger(__name__)

_PASSES = 4  # guidance passes a step at most; a loop that makes more model calls without a step is no pipeline's


def is_pipeline(model: Any) -> bool:
    """Whether an object is made of components with a scheduler among them and samples when called."""
    parts = getattr(model, "components", None)
    return not isinstance(model, nn.Module) and callable(model) and isinstance(parts, dict) and "scheduler" in parts


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The denoising transformers among a pipeline's components, by name."""
    found = {n: c for n, c in pipe.components.items() if n.split("_")[0] == "transformer" and isinstance(c, nn.Module)}
    return dict(sorted(found.items()))


def optimized_components(pipe: Any) -> dict[str, Handle]:
    """The optimised models among a pipeline's components."""
    handles = {name: handle_of(part) for name, part in transformers_of(pipe).items()}
    return {name: handle for name, handle in handles.items() if handle is not None}


def attach(pipe: Any, models: Mapping[str, Handle]) -> Any:
    """Let each call of a pipeline with optimised models be one run; returns the pipeline."""
    for name, handle in models.items():
        before = pipe.components[name]
        handle._toca.homes.add(Home(type(pipe)))
        part = handle if isinstance(handle, nn.Module) else handle._model
        if part is not before:  # in place of another model, or of a wrapper, ours or of torch.compile
            setattr(pipe, name, part)
            handle._toca.replaced = before
    return pipe


def detach(pipe: Any) -> Any:
    """Give a pipeline back the transformers that it had; returns the pipeline."""
    for name, handle in optimized_components(pipe).items():
        now, replaced = pipe.components[name], handle._toca.replaced
        plain = revert(now)
        if replaced is not None or plain is not now:
            setattr(pipe, name, plain if replaced is None else replaced)
    tidy()
    return pipe


@dataclass(frozen=True)
class FirstCall:
    """The first model call of a call of a pipeline: of which model, with what, in a run of how many steps. ``known``:
    of the sampling."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    steps: int
    guided: bool
    known: Signature


class _Stop(Exception):
    pass


def first_calls(pipe: Any, call: Mapping[str, Any]) -> dict[str, FirstCall]:
    """Call a pipeline as far as the first call of each of its transformers, by their names. One that is called again
    meanwhile answers with its first result.

    Raises:
        ExportError: it has no transformer, or does not call one.
    """
    models = transformers_of(pipe)
    if not models:
        raise ExportError(f"{type(pipe).__name__} has no transformer to export")
    arguments = inspect.signature(type(pipe).__call__).bind(pipe, **call)
    arguments.apply_defaults()
    found: dict[str, FirstCall] = {}
    index = 0

    def step() -> None:
        nonlocal index
        index += 1

    def answering(name: str, model: nn.Module) -> Callable[..., Any]:
        forward, answers = model.forward, list[Any]()

        def answer(*args: Any, **kwargs: Any) -> Any:
            if name not in found:
                steps, then = _part(pipe, index)
                known = _known(pipe.scheduler, arguments.arguments, steps, then)
                found[name] = FirstCall(model, args, kwargs, steps, _guided(arguments.arguments), known)
            if len(found) == len(models):
                raise _Stop
            if not answers:
                answers.append(forward(*args, **kwargs))
            return answers[0]

        return answer

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(_Stop))
        if len(models) > 1:
            stack.enter_context(_shadowed(pipe.scheduler, "step", _Telling(pipe.scheduler, "step", step)))
        for name, model in models.items():
            stack.enter_context(_shadowed(model, "forward", answering(name, model)))
        pipe(**call)
    left_out = [name for name in models if name not in found]
    if left_out:
        raise ExportError(f"this call of {type(pipe).__name__} does not call its {' and its '.join(left_out)}")
    return found


def _steps(scheduler: Any) -> int:
    """How many model calls of one guidance pass a call of a pipeline makes."""
    return len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or 0)


def _part(pipe: Any, index: int) -> tuple[int, int]:
    """How many steps in a row a transformer makes that a call of a pipeline asks at a step, and how many come then.
    Where two share the steps, the pipeline's ``boundary_ratio`` tells which are whose: those that are noisier than that
    share of the scheduler's training timesteps are one's."""
    left = _steps(pipe.scheduler) - index
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    most = getattr(getattr(pipe.scheduler, "config", None), "num_train_timesteps", None)
    if left < 1 or len(transformers_of(pipe)) < 2 or not isinstance(ratio, (int, float)) or not isinstance(most, int):
        return left, 0
    noisy = [t >= ratio * most for t in torch.as_tensor(pipe.scheduler.timesteps).tolist()[-left:]]
    own = next((i for i, one in enumerate(noisy) if one is not noisy[0]), left)
    return own, left - own


def _known(scheduler: Any, arguments: Mapping[str, Any], steps: int, then: int) -> Signature:
    """What a call of a pipeline tells of so many steps before its last few, ``then``."""
    guidance, eta = arguments.get("guidance_scale"), arguments.get("eta")
    known = facts_of(scheduler, steps, eta if isinstance(eta, (int, float)) else 0.0, then=then)
    return replace(known, guidance=float(guidance) if isinstance(guidance, (int, float)) else None)


def _guided(arguments: Mapping[str, Any]) -> bool:
    """Whether the batches of a pipeline's call may be guidance pairs."""
    guidance = arguments.get("guidance_scale")
    return not isinstance(guidance, (int, float)) or guidance > 1


def watch(cls: type) -> None:
    """Let calls of pipelines of this class be runs, where a transformer of theirs is optimised when they are called;
    and those of each class to which an optimised transformer is given from now on, through the base class of all."""
    base = next((c for c in reversed(cls.__mro__) if "components" in vars(c)), cls)
    put(base, "__setattr__", _watching)
    if any("__call__" in vars(c) for c in cls.__mro__):
        put(cls, "__call__", _with_runs)


def _watching(setattr_before: Any) -> Any:
    @functools.wraps(setattr_before)
    def assigned(self: Any, name: str, value: Any) -> None:
        setattr_before(self, name, value)
        handle = handle_of(value)
        if handle is not None:
            handle._toca.homes.add(Home(type(self)))

    return assigned


def _with_runs(call: Any) -> Any:
    @functools.wraps(call)
    def sampled(self: Any, *args: Any, **kwargs: Any) -> Any:
        models = optimized_components(self)
        if not models or id(self) in _SAMPLING.get():  # a subclass's call that calls its base's
            return call(self, *args, **kwargs)
        arguments = inspect.signature(call).bind(self, *args, **kwargs)
        arguments.apply_defaults()
        with _sampling(self, arguments.arguments):
            return call(self, *args, **kwargs)

    return sampled


# Pipelines that are being called, in this thread or task.
_SAMPLING: ContextVar[tuple[int, ...]] = ContextVar("toca_sampling", default=())


@dataclass(frozen=True)
class Home:
    """A class of pipelines in which a model is; where it is unpickled, they are watched."""

    cls: type

    def __post_init__(self) -> None:
        watch(self.cls)

    def __reduce__(self) -> Any:
        return Home, (self.cls,)


@contextlib.contextmanager
def _sampling(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """One call of a pipeline."""
    models = list(optimized_components(pipe).values())
    runs = [_Run(model, pipe, arguments) for model in models]

    with contextlib.ExitStack() as stack:
        stack.callback(_forget_timesteps, pipe.scheduler)
        for method, act in (("step", _Run.next_step), ("set_timesteps", _Run.restart)):
            then = functools.partial(_know_timesteps, pipe.scheduler) if method == "set_timesteps" else _nothing
            telling = _Telling(pipe.scheduler, method, functools.partial(_each, runs, act), then)
            stack.enter_context(_shadowed(pipe.scheduler, method, telling))
        for run in runs:
            stack.callback(run.close)
        around = {**AROUND_CALL.get(), **{id(run.model): run.around_call for run in runs}}
        stack.callback(AROUND_CALL.reset, AROUND_CALL.set(around))
        stack.callback(_SAMPLING.reset, _SAMPLING.set((*_SAMPLING.get(), id(pipe))))
        yield


def _each(runs: list["_Run"], act: Callable[["_Run"], None]) -> None:
    for run in runs:
        act(run)


def _know_timesteps(scheduler: Any) -> None:
    """Let the host know the numbers of a scheduler's timesteps, and so of what a pipeline tells its models of them."""
    timesteps = getattr(scheduler, "timesteps", None)
    known = known_to_host(timesteps)
    if known is not timesteps and "timesteps" in vars(scheduler):
        scheduler.timesteps = known


def _forget_timesteps(scheduler: Any) -> None:
    if isinstance(getattr(scheduler, "timesteps", None), HostKnown):
        scheduler.timesteps = scheduler.timesteps.plain


def _nothing() -> None:
    return None


class _Telling:
    """A method of an object that says when it is called, and when it is done. A copy of the object has the method
    itself: pipelines copy their scheduler for what they denoise beside the picture (sound), and its steps are none of
    the picture's."""

    def __init__(self, owner: Any, name: str, tell: Callable[[], None], then: Callable[[], None] = _nothing) -> None:
        self.owner, self.method, self.tell, self.then = owner, getattr(owner, name), tell, then
        functools.update_wrapper(self, self.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.tell()
        result = self.method(*args, **kwargs)
        self.then()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.method, memo) if id(self.owner) in memo else self


@contextlib.contextmanager
def _shadowed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object, shadowed for a while."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    vars(owner)[name] = value
    try:
        yield
    finally:
        del vars(owner)[name]
        vars(owner).update(before)


class _Run:
    """One model during one call of a pipeline."""

    def __init__(self, model: Handle, pipe: Any, arguments: Mapping[str, Any]) -> None:
        self.model, self.pipe, self.scheduler, self.arguments = model, pipe, pipe.scheduler, arguments
        self.restart()

    def restart(self) -> None:
        """The scheduler was given its timesteps: the next model call is the first of a run."""
        self.stepped, self.passes, self.index = False, 0, 0
        self.model._session.numbers.clear()  # of one call's picture
        self.close()

    def next_step(self) -> None:
        """The scheduler steps: the next model call is the first pass of the next step."""
        if self.policy is not None and not self.passes:
            self.close()  # the step went by without it: another model has taken over
        self.stepped, self.passes, self.index = True, 0, self.index + 1

    def close(self) -> None:
        """What the model keeps is of no more use: the next call of it, if there is one, begins a run."""
        self.policy: Policy | None = None
        self.model._session.control.reset(mine=True)

    @contextlib.contextmanager
    def around_call(self, call: Signature) -> Iterator[None]:
        """Around one model call: the plan for the run before the first, and a context for each guidance pass."""
        if self.policy is None:
            self.policy = self._policy(call)
            self._announce()
        # At each call: another thread may have sampled with the model by another plan since.
        self.model._session.follow(self.policy)
        number, self.passes = self.passes, self.passes + 1
        named = self.model._session.control.context
        if named is None and number >= _PASSES:
            if number == _PASSES and not self.stepped:
                log.warning("the scheduler does not step between model calls: all count as steps of one run")
            yield
        else:
            name = named or (f"pass {number + 1}" if number else "default")
            with Controls.cache_context(self.model, name, step_index=self.index):  # ours alone: the model has its own
                yield

    def _announce(self) -> None:
        """Say which timesteps will come, where what is made of them for all at once pays: a lowering that does not
        compile stays equal to the model to the last bit."""
        timesteps = self.scheduler.timesteps
        visible = isinstance(timesteps, HostKnown) or (isinstance(timesteps, torch.Tensor) and on_host(timesteps))
        if self.model._session.compiles and visible:
            self.model._session.control.announce(Signature(times=tuple(timesteps.tolist())))

    def _policy(self, call: Signature) -> Policy:
        """The policy as it is meant for this run; one that says nothing of runs is meant as it is."""
        # From here on, and as far as it is asked: two transformers may share the steps.
        (steps, then), wanted = _part(self.pipe, self.index), self.model._session.policy
        if hasattr(wanted, "for_call"):
            known = _known(self.scheduler, self.arguments, steps, then)
            known = replace(known, size=call.size, dtype=call.dtype)
            wanted = self.model._toca.fitted(wanted, self.model._model, known)
        return for_run(wanted, steps, _guided(self.arguments))


def for_run(wanted: Policy, steps: int, guided: bool) -> Policy:
    """A policy as it is meant for a run; one that has no ``for_run`` is meant as it is.

    Raises:
        PolicyError: what it says is no policy.
    """
    if not hasattr(wanted, "for_run"):
        return wanted
    policy = wanted.for_run(steps, guided)
    if not callable(getattr(policy, "plan", None)):
        raise PolicyError(f"{type(wanted).__name__}.for_run must return a policy, not {told(policy)}")
    return cast(Policy, policy)
