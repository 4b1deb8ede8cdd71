"""What lies in which frequencies of the token grid."""

from collections.abc import Sequence

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
    tokens = value.float().flatten(dim, dim + span - 1) if span > 1 else value.float()
    count = grid[0] * grid[1] * grid[2]
    inside = tokens.narrow(dim, offset, count)
    dims = [dim, dim + 1, dim + 2]
    shape = [*tokens.shape[:dim], *grid, *tokens.shape[dim + 1 :]]
    noise = (torch.zeros((), device=value.device) + sigma * 2.0**-32).clamp(1e-6, 1 - 1e-6)
    gain = torch.ones([], device=value.device)
    for axis, size in enumerate(grid):
        frequency = torch.fft.fftfreq(size, device=value.device).abs()
        clean = 1 / (frequency**power + _LEAST)
        own = (1 - noise) * clean / ((1 - noise) ** 2 * clean + noise**2 + _LEAST)
        gain = gain * own.reshape([-1 if i == axis else 1 for i in range(3)])
    gain = (gain / gain.mean()).reshape([*grid, *[1] * (tokens.dim() - dim - 1)])
    kept = torch.fft.ifftn(torch.fft.fftn(inside.reshape(shape), dim=dims) * gain, dim=dims).real
    rest = tokens.shape[dim] - offset - count
    parts = [torch.zeros_like(tokens.narrow(dim, 0, offset)), kept.reshape(inside.shape)]
    parts.append(torch.zeros_like(tokens.narrow(dim, 0, rest)))
    return torch.cat(parts, dim).reshape(value.shape)
