"""A sampling loop small enough to read, for models called as ``model(x, t, y)``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models import PlainDiT, randomize


def noise(batch: int = 2, size: tuple[int, int] = (8, 8), channels: int = 2, seed: int = 0) -> Tensor:
    """Initial noise, a function of the seed and the sample's place."""
    return torch.stack(
        [torch.randn(channels, *size, generator=torch.Generator().manual_seed(seed + i)) for i in range(batch)]
    )


def sample(model: Callable[..., Any], steps: int, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Euler steps along the model's output; the final picture."""
    y = torch.arange(x.shape[0]) % 10 if y is None else y
    with torch.no_grad():
        for i in range(steps):
            t = torch.full((x.shape[0],), (steps - 1 - i) * 1000 // steps)
            x = x - model(x, t, y)[:, : x.shape[1]] / steps
    return x


class _Scheduler:
    """Times as diffusers has them."""

    def set_timesteps(self, steps: int) -> None:
        """So many of them."""
        self.timesteps = torch.arange(steps).flip(0) * 1000 // steps

    def step(self, noise: Tensor, x: Tensor) -> Tensor:
        """One Euler step."""
        return x - noise / len(self.timesteps)


class Pair:
    """A pipeline of two transformers: one for the first half of the steps, one for the second."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = randomize(PlainDiT(depth=1)), randomize(PlainDiT(depth=1), seed=1)
        self.scheduler = _Scheduler()

    @property
    def components(self) -> dict[str, Any]:
        """By name."""
        return {n: getattr(self, n) for n in ("transformer", "transformer_2", "scheduler")}

    def __call__(self, steps: int) -> Tensor:
        """A picture."""
        self.scheduler.set_timesteps(steps)
        x, y = noise(), torch.arange(2)
        with torch.no_grad():
            for i, t in enumerate(self.scheduler.timesteps):
                net = self.transformer if i < steps // 2 else self.transformer_2
                x = self.scheduler.step(net(x, t.expand(2), y), x)
        return x
