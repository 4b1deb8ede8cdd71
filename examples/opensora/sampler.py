"""Rectified-flow sampling as OpenSora 1.2 does it."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def timesteps(steps: int, latents: Tensor, shift: bool = True, total: int = 1000) -> list[float]:
    """Timesteps from ``total`` down; with ``shift`` larger videos stay longer at the noisy end."""
    plain = [total * (1 - i / steps) for i in range(steps)]
    if not shift:
        return plain
    frames, height, width = latents.shape[2:]
    # The reference resolution is 512² pixels in one latent frame; five latent frames stand for seventeen of video.
    ratio = (64 * height * width / 512**2) ** 0.5 * max(frames * 5 // 17, 1) ** 0.5
    return [total * ratio * (t / total) / (1 + (ratio - 1) * (t / total)) for t in plain]


def sample(
    model: Callable[..., Tensor], noise: Tensor, text: Tensor, null_text: Tensor, *, text_mask: Tensor | None = None,
    steps: int = 30, guidance: float = 7.0, condition: Tensor | None = None, given: Tensor | None = None,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """Sample latents; each step one call with the pair [conditional, unconditional] in one batch.

    Args:
        noise: ``[batch, channels, frames, height, width]``.
        text, null_text: ``[batch, words, channels]``.
        text_mask: bool ``[batch, words]``; the null text counts whole.
        condition, given: latents of frames to keep, and which they are, bool ``[batch, frames]``.
    """
    x, total = noise, 1000
    y = torch.cat([text, null_text])
    mask = None if text_mask is None else torch.cat([text_mask, torch.ones_like(text_mask)])
    free = None if given is None else ~given
    if condition is not None and free is not None:
        x = torch.where(free[:, None, :, None, None], x, condition)
    # Tensors that do not change from step to step are made once: the compiler may then keep what follows from them.
    x_mask = None if free is None else torch.cat([free, free])
    fps = torch.full((2 * x.shape[0],), 24.0, device=x.device)
    times = [*timesteps(steps, noise, total=total), 0.0]
    with torch.no_grad():
        for now, after in pairwise(times):
            t = torch.full((2 * x.shape[0],), now, device=x.device)
            velocity = model(torch.cat([x, x]), t, y, mask=mask, x_mask=x_mask, fps=fps).chunk(2, dim=1)[0]
            cond, uncond = velocity.chunk(2)
            moved = x + (uncond + guidance * (cond - uncond)) * ((now - after) / total)
            x = moved if free is None else torch.where(free[:, None, :, None, None], moved, x)
    return x
