"""Sampling loops small enough to read: for models called as ``model(x, t, y)``, and as PixArt and FLUX are."""

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


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Noise of a shape, a function of the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample_pixart(model: Callable[..., Any], steps: int, pictures: int, size: tuple[int, int], extra: bool) -> Tensor:
    """Euler steps with guidance, the pair [unconditional, conditional] in one batch, as PixArt's pipelines have it."""
    x = gaussian(pictures, 4, *size)
    text = gaussian(2 * pictures, 7, 12, seed=1)
    mask = torch.ones(2 * pictures, 7)
    mask[pictures:, 4:] = 0
    more: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    if extra:
        resolution = torch.tensor([[8.0 * size[0], 8.0 * size[1]]] * 2 * pictures)
        more = {"resolution": resolution, "aspect_ratio": torch.full((2 * pictures, 1), size[0] / size[1])}
    with torch.no_grad():
        for i in range(steps):
            t = torch.full((2 * pictures,), 1000 - 1000 * i // steps)
            out = model(
                torch.cat([x, x]), encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask,
                added_cond_kwargs=more,
            )  # fmt: skip
            uncond, cond = (out if isinstance(out, Tensor) else out.sample).chunk(2, dim=1)[0].chunk(2)
            x = x - (uncond + 2.0 * (cond - uncond)) / steps
    return x


def sample_flux(model: Callable[..., Any], steps: int, pictures: int, size: tuple[int, int]) -> Tensor:
    """Euler steps of FLUX with its guidance embedded; pictures as sequences of patches."""
    x = gaussian(pictures, size[0] * size[1], 16)
    text, pooled = gaussian(pictures, 6, 12, seed=1), gaussian(pictures, 12, seed=2)
    ids = torch.zeros(*size, 3)
    ids[..., 1], ids[..., 2] = torch.arange(size[0])[:, None], torch.arange(size[1])[None]
    txt_ids, img_ids = torch.zeros(6, 3), ids.flatten(0, 1)
    with torch.no_grad():
        for i in range(steps):
            out = model(
                hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled,
                timestep=torch.full((pictures,), 1 - i / steps), img_ids=img_ids, txt_ids=txt_ids,
            )  # fmt: skip
            x = x - (out if isinstance(out, Tensor) else out.sample) / steps
    return x
