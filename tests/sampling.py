"""A sampling loop small enough to read, for models called as ``model(x, t, y)``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
