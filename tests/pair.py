"""A pipeline of two transformers, as small as can be."""

from typing import Any

import torch
from torch import Tensor

from tests.models import PlainDiT, randomize


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

    def __call__(
        self, num_inference_steps: int, prompt: list[str] | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor]:
        """A picture for each prompt."""
        self.scheduler.set_timesteps(num_inference_steps)
        count = len(prompt or "ab")
        x, y = torch.randn(count, 2, 8, 8, generator=generator), torch.arange(count)
        with torch.no_grad():
            for i, t in enumerate(self.scheduler.timesteps):
                net = self.transformer if i < num_inference_steps // 2 else self.transformer_2
                x = self.scheduler.step(net(x, t.expand(count), y), x)
        return (x,)
