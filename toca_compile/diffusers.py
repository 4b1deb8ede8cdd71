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
from typing import Any, cast

from torch import nn

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import told
from toca_compile.ir.plan import Policy
from toca_compile.model import AROUND_CALL, OptimizedModel

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


def optimized_components(pipe: Any) -> dict[str, OptimizedModel]:
    """The optimised models among a pipeline's components."""
    return {n: c for n, c in transformers_of(pipe).items() if isinstance(c, OptimizedModel)}


def attach(pipe: Any, models: Mapping[str, OptimizedModel]) -> Any:
    """Put optimised models into a pipeline and let each call of it be one run; returns the pipeline."""
    for name, model in models.items():
        setattr(pipe, name, model)
    if not getattr(type(pipe), "_toca_sampling", False):
        pipe.__class__ = _with_runs(type(pipe))
    return pipe


_CLASSES: dict[type, type] = {}


def _with_runs(cls: type) -> type:
    """A class as ``cls`` whose call is a run. It has the same name: pipelines are saved and found by it."""
    if cls not in _CLASSES:
        _CLASSES[cls] = _made_with_runs(cls)
    return _CLASSES[cls]


def _made_with_runs(cls: type) -> type:
    call: Any = cls.__call__

    @functools.wraps(call)
    def sampled(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(call).bind(self, *args, **kwargs)
        arguments.apply_defaults()
        with _sampling(self, arguments.arguments):
            return call(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # By the class that a name finds; what it is made into is made again where it is read.
        return _blank, (cls,), vars(self)

    body = {
        "__call__": sampled, "__reduce_ex__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__,
        "_toca_sampling": True,
    }  # fmt: skip
    return type(cls.__name__, (cls,), body)


def _blank(cls: type) -> Any:
    return object.__new__(_with_runs(cls))


@contextlib.contextmanager
def _sampling(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """One call of a pipeline."""
    models = list(optimized_components(pipe).values())
    guidance = arguments.get("guidance_scale")
    guided = not isinstance(guidance, (int, float)) or guidance > 1
    runs = [_Run(model, pipe.scheduler, guided) for model in models]

    with contextlib.ExitStack() as stack:
        for method, act in (("step", _Run.next_step), ("set_timesteps", _Run.restart)):
            telling = _Telling(pipe.scheduler, method, functools.partial(_each, runs, act))
            stack.enter_context(_shadowed(pipe.scheduler, method, telling))
        for run in runs:
            stack.callback(run.close)
        around = {**AROUND_CALL.get(), **{id(run.model): run.around_call for run in runs}}
        stack.callback(AROUND_CALL.reset, AROUND_CALL.set(around))
        yield


def _each(runs: list["_Run"], act: Callable[["_Run"], None]) -> None:
    for run in runs:
        act(run)


class _Telling:
    """A method of an object that says when it is called. A copy of the object has the method itself: pipelines copy
    their scheduler for what they denoise beside the picture (sound), and its steps are none of the picture's."""

    def __init__(self, owner: Any, name: str, tell: Callable[[], None]) -> None:
        self.owner, self.method, self.tell = owner, getattr(owner, name), tell
        functools.update_wrapper(self, self.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.tell()
        return self.method(*args, **kwargs)

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

    def __init__(self, model: OptimizedModel, scheduler: Any, guided: bool) -> None:
        self.model, self.scheduler, self.guided = model, scheduler, guided
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
    def around_call(self) -> Iterator[None]:
        """Around one model call: the plan for the run before the first, and a context for each guidance pass."""
        if self.policy is None:
            self.policy = self._policy()
        # At each call: another thread may have sampled with the model by another plan since.
        self.model._session.follow(self.policy)
        number, self.passes = self.passes, self.passes + 1
        named = self.model._session.control.context
        if named is None and number >= _PASSES:
            if number == _PASSES and not self.stepped:
                log.warning("the scheduler does not step between model calls: all count as steps of one run")
            yield
        else:
            with self.model.cache_context(
                named or (f"pass {number + 1}" if number else "default"), step_index=self.index
            ):  # fmt: skip
                yield

    def _policy(self) -> Policy:
        """The policy as it is meant for this run; one that has no ``for_run`` is meant as it is."""
        # From here on: one of two transformers that share the steps may come in late.
        steps = len(self.scheduler.timesteps) - (getattr(self.scheduler, "begin_index", None) or 0) - self.index
        wanted = self.model._session.policy
        for_run = getattr(wanted, "for_run", None)
        if for_run is None:
            return wanted
        policy = for_run(steps, self.guided)
        if not callable(getattr(policy, "plan", None)):
            raise PolicyError(f"{type(wanted).__name__}.for_run must return a policy, not {told(policy)}")
        return cast(Policy, policy)
