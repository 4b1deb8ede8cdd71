"""Signatures: what a plan that was searched for was searched with, and what a call is made with."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import nn

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import Checked, Count, Number, told

Time = Annotated[float, Number(-1e9, 1e9)]
Move = Annotated[float, Number(-1e9, 1e9)]
FLOW = "flow_prediction"
"""As ``Signature.prediction``: the velocity of flow matching."""
NOISE = "epsilon"
"""In the same way: the noise."""
_NEAR = 1e-3  # by which two times may differ, relative to the first of a run


@dataclass(frozen=True)
class Signature(Checked):
    """Facts of a sampling; None where a fact is not known, which then fits any other.

    Args:
        model: a fingerprint of the weights.
        sampler: the name of the scheduler's class, or of the function that samples.
        times: what the model is told of the denoising time at each call, timesteps or σ.
        size: of one sample, as the model is given it.
        guidance: its scale.
        dtype: of what the model is given.
        prediction: what it predicts, as diffusers' schedulers have it: ``"epsilon"``, ``"flow_prediction"``, ….
        moves: by how much of what it predicts the sampler moves the picture at each call, up to a common factor.
    """

    model: str | None = None
    sampler: str | None = None
    times: tuple[Time, ...] | None = None
    size: tuple[Count, ...] | None = None
    guidance: Annotated[float, Number(-1e6, 1e6)] | None = None
    dtype: str | None = None
    prediction: str | None = None
    moves: tuple[Move, ...] | None = None

    def check(self) -> None:
        for name in ("model", "sampler", "dtype", "prediction"):
            if not isinstance(getattr(self, name), str | None):
                raise PolicyError(f"{name} must be a text or None, not {told(getattr(self, name))}")

    def unlike(self, other: "Signature") -> list[str]:
        """The facts that both know and that differ, but for what is told of each call."""
        names = [f.name for f in fields(self) if f.name not in ("times", "moves")]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return [name for name, (a, b) in pairs.items() if a is not None and b is not None and a != b]

    def filled(self, other: "Signature") -> "Signature":
        """The same with what only the other knows."""
        return replace(other, **{f.name: own for f in fields(self) if (own := getattr(self, f.name)) is not None})

    def without(self, names: Iterable[str]) -> "Signature":
        """The same with some facts unknown."""
        unknown: dict[str, Any] = dict.fromkeys(names)
        return replace(self, **unknown)


UNKNOWN = Signature()
"""Of a sampling of which nothing is known."""


def relative(times: Sequence[float]) -> tuple[float, ...]:
    """Times as shares of the first: schedulers and models may count in different units."""
    return tuple(t / times[0] for t in times) if times and times[0] else tuple(times)


def same_times(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two runs go through the same times."""
    return len(a) == len(b) and all(abs(x - y) <= _NEAR for x, y in zip(relative(a), relative(b), strict=True))


def fingerprint(*models: nn.Module) -> str:
    """Tells models apart by their weights."""
    digest = hashlib.sha256()
    for model in models:
        for name, value in model.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)} {float(value.float().sum()):.6e}".encode())
    return digest.hexdigest()[:16]


def called(leaves: Mapping[Any, Any]) -> Signature:
    """What a call's inputs tell: size and dtype of the first that is a batch of latents or of their tokens."""
    floats = (x for x in leaves.values() if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() > 2)
    first = next(floats, None)
    return UNKNOWN if first is None else _of_input(tuple(first.shape[1:]), str(first.dtype).removeprefix("torch."))


@lru_cache(maxsize=256)
def _of_input(size: tuple[int, ...], dtype: str) -> Signature:
    return Signature(size=size, dtype=dtype)  # whose fields are checked, which each step of a sampling would pay


def clock_of(calls: Sequence[Mapping[Any, Any]]) -> tuple[float, ...] | None:
    """The times of a run's calls, from their inputs: those of the input that is one number a call, the same for all
    samples, and goes one way; None where there is none or several."""
    found = []
    for key in calls[0] if calls else ():
        values = [call.get(key) for call in calls]
        tensors = [torch.as_tensor(v) for v in values if isinstance(v, torch.Tensor | int | float)]
        if len(tensors) != len(values) or not all(t.numel() and bool((t == t.reshape(-1)[0]).all()) for t in tensors):
            continue
        times = tuple(float(t.reshape(-1)[0]) for t in tensors)
        steps = [b - a for a, b in pairwise(times)]
        if steps and (all(s < 0 for s in steps) or all(s > 0 for s in steps)):
            found.append(times)
    return found[0] if len(found) == 1 else None
