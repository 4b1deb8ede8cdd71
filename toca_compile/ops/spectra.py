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
        return (1 - noise) * clean / ((1 - noise) ** 2 * clean + noise**2 + _LEAST)

    gains = _gains(gain, grid, value.device)
    return _filtered(value, gains / gains.mean(), dim, span, offset)


@op("with_low_band(Tensor value, Tensor low, int dim, int span, int[] grid, int offset, float cutoff) -> Tensor")
def with_low_band(
    value: Tensor, low: Tensor, dim: int, span: int, grid: Sequence[int], offset: int, cutoff: float
) -> Tensor:
    """``value``, float32, with the frequencies of ``low`` up to ``cutoff`` · ½ on every axis of the token grid in place
    of its own. The other arguments are those of ``sea_filter``."""
    gains = _gains(lambda frequency: (frequency <= cutoff / 2).float(), grid, value.device)
    return value.float() + _filtered(low.float() - value.float(), gains, dim, span, offset)


def _gains(gain: Callable[[Tensor], Tensor], grid: Sequence[int], device: torch.device) -> Tensor:
    """The product over the axes of what ``gain`` says to their frequencies: ``[frames, height, width]``."""
    gains = torch.ones([], device=device)
    for axis, size in enumerate(grid):
        own = gain(torch.fft.fftfreq(size, device=device).abs())
        gains = gains * own.reshape([-1 if i == axis else 1 for i in range(3)])
    return gains


def _filtered(value: Tensor, gains: Tensor, dim: int, span: int, offset: int) -> Tensor:
    """``value`` with its frequencies over the token grid multiplied; tokens outside the grid are zero."""
    tokens = value.float().flatten(dim, dim + span - 1) if span > 1 else value.float()
    count = gains.numel()
    inside = tokens.narrow(dim, offset, count)
    dims = [dim, dim + 1, dim + 2]
    shape = [*tokens.shape[:dim], *gains.shape, *tokens.shape[dim + 1 :]]
    gains = gains.reshape([*gains.shape, *[1] * (tokens.dim() - dim - 1)])
    kept = torch.fft.ifftn(torch.fft.fftn(inside.reshape(shape), dim=dims) * gains, dim=dims).real
    rest = tokens.shape[dim] - offset - count
    parts = [torch.zeros_like(tokens.narrow(dim, 0, offset)), kept.reshape(inside.shape)]
    parts.append(torch.zeros_like(tokens.narrow(dim, 0, rest)))
    return torch.cat(parts, dim).reshape(value.shape)
