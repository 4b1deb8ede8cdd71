"""Weights of a forecast that follow from the kept values themselves, worked out where those lie."""

import math

import torch
from torch import Tensor

from toca_compile.ops.registry import op


@op("gram(Tensor value, Tensor ring) -> Tensor")
def gram(value: Tensor, ring: Tensor) -> Tensor:
    """The products of ``value`` and of all that ``ring`` ``[places, …]`` holds with one another, float64
    ``[1 + places, 1 + places]``, pair by pair, so that no wider copy of them is made."""
    kept = [value, *ring.unbind(0)]
    rows = [[(a.double() * b.double()).sum() for b in kept[: i + 1]] for i, a in enumerate(kept)]
    return torch.stack([torch.stack([rows[max(i, j)][min(i, j)] for j in range(len(kept))]) for i in range(len(kept))])


@op("dmd(Tensor gram, SymInt place, SymInt even, SymInt gap, int ahead, float ridge) -> Tensor")
def dmd(gram: Tensor, place: int, even: int, gap: int, ahead: int, ridge: float) -> Tensor:
    """What each kept value counts in the forecasts of the next ``ahead`` steps, float32 ``[ahead, kept]``.

    Dynamic mode decomposition of the last ``even`` values Y, which are ``gap`` steps apart: the matrix that best takes
    each to the next is A = Y₁·(Y₀ᵀY₀ + ρI)⁻¹·Y₀ᵀ, and A·Y₁ = Y₁·C with C = (Y₀ᵀY₀ + ρI)⁻¹·Y₀ᵀY₁. So r steps after
    the last value Aʳᐟᵍᵃᵖ makes of it Y₁ · the last column of Cʳᐟᵍᵃᵖ: a few numbers, found from the products alone. The
    root is that of C², whose eigenvalues that were negative, noise for the most part, have one.

    Args:
        gram: float64, the products of the values, the last one first, then as they lie in the ring.
        place: of the ring, where the value before the last one lies.
        gap: at most half of ``ahead``.
        ridge: ρ, relative to the largest product.
    """
    count = gram.shape[0]
    back = torch.arange(count - 1, -1, -1, device=gram.device)
    at = torch.where(back == 0, 0, 1 + (place + 1 - back) % (count - 1))  # where each lies, oldest first
    live = (back < even).to(gram.dtype)
    square = gram[at][:, at] * live * live[:, None]
    square = square / square.diagonal().amax().clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(count - 1, dtype=gram.dtype, device=gram.device)
    change = torch.linalg.solve_ex(square[:-1, :-1] + ridge * eye, square[:-1, 1:])[0]
    twice = change @ change
    power = _power(twice, 0.5 / (torch.zeros((), dtype=gram.dtype, device=gram.device) + gap))
    found = power[:, -1:].T
    while found.shape[0] < ahead:
        found, power = torch.cat([found, found @ power.T]), power @ power
    # What cannot be told is repeated: of one value there is no change, and the root may not be one.
    end, meant = weights_at(found, 2 * gap - 1), twice[:, -1]
    told = ((end - meant).abs().amax() <= 1e-4 * (1 + meant.abs().amax())) & (live.sum() > 1)
    found = torch.where(told & found.isfinite(), found, eye[-1])[:ahead].float()
    weights = torch.cat([found.new_zeros(ahead, 1), found], 1)  # the oldest one tells the change alone
    return torch.zeros_like(weights).index_copy(1, at, weights)


def _power(matrix: Tensor, exponent: Tensor) -> Tensor:
    """A real power of a small matrix, 0 < exponent < 1, without its eigenvalues, which a GPU hands to the host::

        Mᵏ = sin(πk)/π · ∫ eᵏᵘ · M·(eᵘ + M)⁻¹ du

    by the trapezoid rule, which converges exponentially unless M has eigenvalues by the negative axis. Beyond the grid
    the integrand is eᵏᵘ below and eᵏᵘ⁻ᵘ·M above: two geometric series.
    """
    width, reach = 0.2, 150
    places = width * torch.arange(-reach, reach + 1, dtype=matrix.dtype, device=matrix.device)
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    shift = places.exp()[:, None, None]
    parts = eye - shift * torch.linalg.inv_ex(shift * eye + matrix)[0]
    total = ((exponent * places).exp()[:, None, None] * parts).sum(0)
    for rate, limit in ((exponent, eye), (1 - exponent, matrix)):
        total = total + limit * (-rate * width * (reach + 1)).exp() / (1 - (-rate * width).exp())
    return total * width * torch.sin(math.pi * exponent) / math.pi


@op("weights_at(Tensor table, SymInt row) -> Tensor")
def weights_at(table: Tensor, row: int) -> Tensor:
    """One row of a table of weights."""
    return table.index_select(0, torch.zeros(1, dtype=torch.int64, device=table.device) + row)[0]


@op("weighted_by(Tensor value, Tensor weights, int number) -> Tensor")
def weighted_by(value: Tensor, weights: Tensor, number: int) -> Tensor:
    """value · weights[number] in float32: a term of a sum whose weights lie on the device."""
    return value.float() * weights[number]
