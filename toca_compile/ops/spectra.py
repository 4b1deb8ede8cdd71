"""What lies in which frequencies of the token grid."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from toca_compile.ops.registry import op

_LEAST = 1e-16  # of a frequency's power: that of the mean has none


@op("sea_filter(Tensor value, SymInt sigma, int dim, int span, int[] grid, int offset, float power) -> Tensor")
def sea_filter(
    value: Tensor, sigma: int, dim: int, span: int, grid: Sequence[int], offset: int, power: float
) -> Tensor:
    """SeaCache's filter over the token grid, float32 of the shape of ``value``: along each axis the Wiener gain
    (1 − σ)·S / ((1 − σ)²·S + σ²) with S = f⁻ᵖ, the product of the axes' scaled to a mean of 1. Tokens outside the grid
    are zero.

    Args:
        sigma: σ in units of 2⁻³².
        dim, span: where the tokens lie, in how many dimensions.
        grid: frames, height and width in tokens, of which the first stands at ``offset``.
        power: p.
    """
    noise = (torch.zeros((), device=value.device) + sigma * 2.0**-32).clamp(1e-6, 1 - 1e-6)

    def gain(frequency: Tensor) -> Tensor:
        clean = 1 / (frequency**power + _LEAST)
        own = (1 - noise) * clean / ((1 - noise) ** 2 * clean + noise**2 + _LEAST)
        return own / own.mean()

    return _filtered(value, gain, dim, span, grid, offset)


@op("with_low_band(Tensor value, Tensor low, int dim, int span, int[] grid, int offset, float cutoff) -> Tensor")
def with_low_band(
    value: Tensor, low: Tensor, dim: int, span: int, grid: Sequence[int], offset: int, cutoff: float
) -> Tensor:
    """``value``, float32, with the frequencies of ``low`` up to ``cutoff`` · ½ on every axis of the token grid in place
    of its own. The other arguments are those of ``sea_filter``."""
    low_pass: Callable[[Tensor], Tensor] = lambda frequency: (frequency <= cutoff / 2).float()  # noqa: E731
    return value.float() + _filtered(low.float() - value.float(), low_pass, dim, span, grid, offset)


def _filtered(
    value: Tensor, gain: Callable[[Tensor], Tensor], dim: int, span: int, grid: Sequence[int], offset: int
) -> Tensor:
    """``value`` with its frequencies over the token grid multiplied by the product of what ``gain`` says to those of
    each axis; tokens outside the grid are zero. A product with a matrix an axis: Inductor has no complex numbers."""
    tokens = value.float().flatten(dim, dim + span - 1) if span > 1 else value.float()
    count = grid[0] * grid[1] * grid[2]
    kept = tokens.narrow(dim, offset, count).reshape([*tokens.shape[:dim], *grid, *tokens.shape[dim + 1 :]])
    for axis, size in enumerate(grid):
        if size > 1:
            kept = (kept.movedim(dim + axis, -1) @ _circulant(gain, size, value.device)).movedim(-1, dim + axis)
        else:
            kept = kept * gain(torch.zeros(1, device=value.device))
    rest = tokens.shape[dim] - offset - count
    parts = [
        torch.zeros_like(tokens.narrow(dim, 0, offset)),
        kept.reshape([*tokens.shape[:dim], count, *tokens.shape[dim + 1 :]]),
    ]
    parts.append(torch.zeros_like(tokens.narrow(dim, 0, rest)))
    return torch.cat(parts, dim).reshape(value.shape)


def _circulant(gain: Callable[[Tensor], Tensor], size: int, device: torch.device) -> Tensor:
    """What a gain does along one axis, ``[size, size]``: Σ over frequencies k/size of gain · cos(2π·k·(i − j)/size)."""
    at = torch.arange(size, device=device)
    frequency = torch.minimum(at, size - at).float() / size
    waves = torch.cos((at[:, None] * at[None]) % size * (2 * torch.pi / size))  # of whole turns nothing is left
    return (gain(frequency) @ waves / size)[(at[:, None] - at[None]) % size]
