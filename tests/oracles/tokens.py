"""What the four oracles share: the interval function and the selection of tokens."""

from math import floor
from typing import Any

import torch
from torch import Tensor


def interval(s: int, total: int, n: int, slope: float, sensitive: bool) -> int:
    """The step-dependent interval, in single precision as published; a counter that runs up bends the other way."""
    if sensitive and floor(0.2 * total) <= s < floor(0.4 * total):
        return 2
    weight = torch.tensor(1 + slope - 2 * slope * s / total)
    return max(1, int(torch.round(n / weight)))


def count_of(share: float, tokens: int) -> int:
    """K of a share."""
    return floor(min(max(share, 0.0), 1.0) * tokens)


def unit(score: Tensor) -> Tensor:
    """Normalised over the tokens of each sample."""
    return score / score.norm(dim=1, keepdim=True)


def spread(score: Tensor, grid: tuple[int, int], cell: int, bonus: float) -> Tensor:
    """s4: in each cell of the grid the best token's score is raised."""
    height, width = grid
    out = score.clone()
    for b in range(score.shape[0]):
        for top in range(0, height, cell):
            for left in range(0, width, cell):
                places = [
                    r * width + c
                    for r in range(top, min(top + cell, height))
                    for c in range(left, min(left + cell, width))
                ]
                best = max(places, key=lambda j: (score[b, j].item(), -j))
                out[b, best] = score[b, best] * (1 + bonus)
    return out


class Caches:
    """Outputs, scores and counters by (layer, module), and what was selected at each step."""

    def __init__(self, weight: float) -> None:
        self.weight = weight  # λ3 / N
        self.out: dict[Any, Tensor] = {}
        self.score: dict[Any, Tensor] = {}
        self.count: dict[Any, Tensor] = {}
        self.selected: list[dict[Any, Tensor]] = []

    def keep(self, key: Any, out: Tensor) -> Tensor:
        """A full computation: the output is kept and nothing is stale."""
        self.out[key] = out
        self.count[key] = torch.zeros(out.shape[:2], dtype=torch.int32)
        return out

    def choose(self, key: Any, base: Tensor, k: int, grid: Any = None, cell: int = 1, bonus: float = 0.0) -> Tensor:
        """The k tokens to recompute, int64 ``[batch, k]``; counters move on. ``base`` is normalised here."""
        score = unit(base) + self.weight * self.count[key].float()
        if bonus and grid is not None:
            score = spread(score, grid, cell, bonus)
        chosen = score.argsort(dim=1, descending=True, stable=True)[:, :k]
        self.selected[-1][key] = chosen.sort(1).values
        self.count[key] += 1
        self.count[key].scatter_(1, chosen, 0)
        return chosen

    def update(self, key: Any, chosen: Tensor, rows: Tensor) -> Tensor:
        """Scatter fresh rows into the kept output."""
        self.out[key] = self.out[key].clone()
        return self.out[key].scatter_(1, wide(chosen, rows.shape[-1]), rows)


def wide(chosen: Tensor, width: int) -> Tensor:
    """Indices of whole rows."""
    return chosen[..., None].expand(-1, -1, width)


def rows(x: Tensor, chosen: Tensor) -> Tensor:
    """The chosen rows of ``[batch, tokens, width]``."""
    return x.gather(1, wide(chosen, x.shape[-1]))


def heads(x: Tensor, count: int) -> Tensor:
    """``[batch, tokens, heads·d]`` to ``[batch, heads, tokens, d]``."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def pair_entropy(weights: Tensor) -> Tensor:
    """1 + entropy of the mean of both halves' head-mean rows, whose texts are packed side by side, for both halves."""
    first, second = weights.mean(1).chunk(2)
    row = torch.cat([first / 2, second / 2], dim=-1)
    entropy = -(row * (row + 1e-7).log()).sum(-1)
    return 1 + entropy.repeat(2, 1)
