"""Facts: what a scheduler of diffusers tells of a sampling before it begins. None is known by name but for what stands
in the names, and diffusers is not imported."""

from itertools import pairwise
from typing import Any

import torch

from toca_compile.ir.signature import FLOW, NOISE, Signature


def facts_of(scheduler: Any, steps: int, eta: float = 0.0, *, then: int = 0) -> Signature:
    """What is known of so many steps of a scheduler that was given its timesteps, before the last few, ``then``.
    ``eta``: the share of noise that it is told to add."""
    end = len(scheduler.timesteps) - then
    part = slice(max(end - steps, 0), end)
    return Signature(
        sampler=_sampler(scheduler, eta),
        times=_numbers(scheduler.timesteps)[part],
        prediction=_prediction(scheduler),
        moves=_moves(scheduler, part),
    )


def _sampler(scheduler: Any, eta: float) -> str:
    """A scheduler by its class, and what makes of it one that adds noise."""
    way = getattr(getattr(scheduler, "config", None), "algorithm_type", None)
    told = [way] if isinstance(way, str) and way.startswith("sde") else []
    told += [f"eta={eta:g}"] if eta else []
    return " ".join([type(scheduler).__name__, *told])


def _prediction(scheduler: Any) -> str | None:
    """What a scheduler takes its model to predict. Those that know flow matching alone do not say it."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return FLOW
    told = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    return told if isinstance(told, str) else None


def _moves(scheduler: Any, part: slice) -> tuple[float, ...] | None:
    """By what σ falls, which is how far a flow's velocity moves the picture, and noise one that is scaled to its own
    size. What is predicted otherwise, or scaled on its way (``precondition_outputs``), moves it by other amounts, and
    where σ stays from one call to the next a step is of several calls."""
    sigmas = _sigmas(scheduler)
    straight = _prediction(scheduler) in (NOISE, FLOW) and not hasattr(scheduler, "precondition_outputs")
    if not straight or len(sigmas) != len(scheduler.timesteps) + 1:
        return None
    found = tuple(b - a for a, b in pairwise(sigmas))[part]
    falls = all(move < 0 for move in found[:-1]) and found[-1] <= 0
    return found if falls or all(move > 0 for move in found) else None


def _sigmas(scheduler: Any) -> tuple[float, ...]:
    """The schedule's noise, one more than there are steps: its own, or √((1 − ᾱ) / ᾱ) at the timesteps."""
    if getattr(scheduler, "sigmas", None) is not None:
        return _numbers(scheduler.sigmas)
    kept, last = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "final_alpha_cumprod", None)
    if kept is None or last is None:
        return ()
    told = _numbers(kept)
    alphas = [*(told[round(t)] for t in _numbers(scheduler.timesteps)), float(last)]
    return tuple(((1 - a) / a) ** 0.5 for a in alphas) if all(alphas) else ()  # some schedules begin with noise alone


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(torch.as_tensor(values).tolist())
