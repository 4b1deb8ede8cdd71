"""A pipeline of two transformers, as small as can be."""

from typing import Any

import torch
from torch import Tensor

from tests.models import PlainDiT, randomize
from tests.sampling import noise


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
