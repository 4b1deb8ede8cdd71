"""Requests: one sampling each, and how it is sampled."""

import copy
import inspect
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toca_compile.diffusers import for_run
from toca_compile.errors import TocaError
from toca_compile.ir.plan import Policy
from toca_compile.ir.signature import FLOW, UNKNOWN, Signature, called
from toca_compile.runtime.facts import facts_of

Sampling = Generator["Call", Any, Any]
"""Yields the model calls of one sampling, one after the other, is sent what the model answers, and returns what comes
of it."""


class Call(NamedTuple):
    """What a model is called with: positional arguments and those by name. Its first tensor is of so many samples (its
    first dimension) as the call is of, two with guidance; another tensor whose first dimension is that belongs to the
    request, and what is left (positions of tokens) must be the same for whoever is to share a call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


def call(*args: Any, **kwargs: Any) -> Call:
    """A model call, written as one."""
    return Call(args, kwargs)


@dataclass(frozen=True, eq=False)
class Request:
    """One sampling.

    Attributes:
        latents: the noise that it begins with, ``[1, …]``; None where the sampler makes it of the ``seed``.
        conditioning: what the model is given by name beside latents and time, of one sample (``[1, …]``), or shared.
        num_steps: model calls of the sampling: the policy is fitted to it.
        guidance: weight of classifier-free guidance; None: without. With it each call is of a pair.
        negative: of ``conditioning``, what the other half of the pair is given; the rest is the same for both.
        seed: of all random numbers of the request, and of nothing else's.
        sampler: makes the model calls.
    """

    latents: Tensor | None
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int = 50
    guidance: float | None = None
    negative: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    sampler: "Callable[[Request], Sampling]" = field(default_factory=lambda: Euler())

    @property
    def guided(self) -> bool:
        """Whether its calls are of guidance pairs."""
        return self.guidance is not None

    def given(self, latents: Tensor, time: Tensor, names: tuple[str, str]) -> Call:
        """The model call at a time (a number): of a pair, unconditional first, with guidance. ``names``: what the
        model calls latents and time."""
        rows = 2 if self.guided else 1
        told = time.reshape(1).expand(rows * len(latents))
        if not self.guided:
            return Call((), {names[0]: latents, names[1]: told, **self.conditioning})
        pair = {k: self._paired(v, self.negative.get(k, v), len(latents)) for k, v in self.conditioning.items()}
        return Call((), {names[0]: torch.cat([latents, latents]), names[1]: told, **pair})

    def guided_by(self, answer: Any) -> Tensor:
        """What the model's answer says, after guidance."""
        out: Tensor = answer if isinstance(answer, Tensor) else answer[0]
        if self.guidance is None:
            return out
        without, with_it = out.chunk(2)
        return without + self.guidance * (with_it - without)

    @staticmethod
    def _paired(value: Any, negative: Any, rows: int) -> Any:
        own = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
        if not own:
            if negative is not value:
                raise TocaError(f"negative conditioning must be a tensor of {rows} samples, as its counterpart is")
            return value
        return torch.cat([negative, value])

    def noise(self) -> Tensor:
        """What the sampling begins with."""
        if self.latents is None:
            raise TocaError("the request has no latents, and its sampler makes none: give it latents=…")
        return self.latents


def meant(policy: Policy, request: Request, first: Call) -> Policy:
    """A policy as it is meant for a request, which begins with this call.

    Raises:
        PolicyError: it was made for something else.
    """
    if hasattr(policy, "for_call"):
        told = called({**dict(enumerate(first.args)), **first.kwargs})
        facts = getattr(request.sampler, "facts", None)
        policy = policy.for_call(told.filled(facts(request.num_steps) if callable(facts) else UNKNOWN))
    return for_run(policy, request.num_steps, request.guided)


@dataclass(frozen=True)
class Euler:
    """Euler steps of a flow from noise (time 1) to data (time 0): the model tells the velocity.

    Attributes:
        latents, time: what the model calls them.
        scale: of the time that the model is told.
    """

    latents: str = "hidden_states"
    time: str = "timestep"
    scale: float = 1.0

    def facts(self, num_steps: int) -> Signature:
        """What is known of a sampling in so many steps."""
        return Signature(prediction=FLOW)

    def __call__(self, request: Request) -> Sampling:
        """The calls of a request."""
        x = request.noise()
        times = torch.linspace(1, 0, request.num_steps + 1, device=x.device)
        for now, then in pairwise(times):
            answer = yield request.given(x, now * self.scale, (self.latents, self.time))
            x = x + (then - now) * request.guided_by(answer)
        return x


@dataclass(frozen=True)
class Scheduled:
    """The steps of a scheduler of diffusers, of which each request has a copy.

    Attributes:
        scheduler: any that makes one step of each model call.
        latents, time: what the model calls them.
        step: further arguments of the scheduler's ``step``.
    """

    scheduler: Any
    latents: str = "hidden_states"
    time: str = "timestep"
    step: Mapping[str, Any] = field(default_factory=dict)

    def facts(self, num_steps: int) -> Signature:
        """What is known of a sampling in so many steps, as far as the scheduler tells it."""
        return facts_of(self._set(num_steps, "cpu"), num_steps)

    def _set(self, num_steps: int, device: Any) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_steps, device=device)
        return scheduler

    def __call__(self, request: Request) -> Sampling:
        """The calls of a request."""
        x = request.noise()
        scheduler = self._set(request.num_steps, x.device)
        if len(scheduler.timesteps) != request.num_steps:
            raise TocaError(
                f"{type(scheduler).__name__} makes {len(scheduler.timesteps)} calls of {request.num_steps} steps, and "
                "num_steps is how many calls there are"
            )
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        generator = torch.Generator(x.device).manual_seed(request.seed)
        more = dict(self.step)
        if "generator" in inspect.signature(scheduler.step).parameters:
            more.setdefault("generator", generator)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            answer = yield request.given(scaled, t, (self.latents, self.time))
            out = request.guided_by(answer)[:, : x.shape[1]]
            x = scheduler.step(out, t, x, **more)[0]
        return x


class Ticket(Future[Any]):
    """What comes of a request: ``result()`` when it is done, ``cancel()`` at any time before.

    Attributes:
        steps: model calls that are done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def settle(self, *, result: Any = None, error: Exception | None = None) -> bool:
        """Say how it ended; False where it was cancelled meanwhile."""
        try:
            self.set_result(result) if error is None else self.set_exception(error)
        except InvalidStateError:
            return False
        return True
