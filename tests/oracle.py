"""ToCa's Algorithm 1, literally, in eager PyTorch on ``PlainDiT``: full maps, argsort, dictionaries of caches.

Written from the algorithm's description alone and sharing nothing with the compiler, so that agreement means something.
Step kinds are decided once a step.
"""

from math import floor
from typing import Any

import torch
from torch import Tensor

from tests.models import PlainDiT


def interval(s: int, total: int, n: int, slope: float, sensitive: bool) -> int:
    """The step-dependent interval, in single precision as published."""
    if sensitive and floor(0.2 * total) <= s < floor(0.4 * total):
        return 2
    weight = torch.tensor(1 + slope - 2 * slope * s / total)
    return max(1, int(torch.round(n / weight)))


class Oracle:
    """A sampler's model: call it once a step, ``total`` times."""

    def __init__(
        self, model: PlainDiT, total: int, n: int, ratio: float, *, weight: float = 0.25, cell: int = 2,
        bonus: float = 0.6, layer: tuple[float, float] = (0.8, 0.4), step: tuple[float, float] = (3.0, -4.0),
        mlp: float = 2.5,
    ) -> None:  # fmt: skip
        self.model, self.total, self.n, self.ratio = model, total, n, ratio
        self.weight, self.cell, self.bonus, self.layer, self.step, self.mlp = weight, cell, bonus, layer, step, mlp
        self.call = 0
        self.interval = 1
        self.cache: dict[Any, Tensor] = {}
        self.kinds: list[str] = []
        self.selected: list[dict[int, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s = self.total - 1 - self.call
        slope = 0.4 if self.ratio else 0.0
        full = self.call == 0
        if full or s % self.interval == 0:
            self.interval = interval(s, self.total, self.n, slope, self.ratio != 0)
            full = full or s % self.interval == 0
        self.kinds.append("full" if full else "cached")
        self.selected.append({})
        h, c = self.model.prepare(x, t, y)
        for i, block in enumerate(self.model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).unsqueeze(1).chunk(6, dim=-1)
            if full:
                out, weights = block.attention(block.norm1(h) * (1 + scale1) + shift1)
                self.cache["attn", i] = out
                received = weights.mean(1).sum(1)
                self.cache["score", i] = received / received.norm(dim=1, keepdim=True)
                h = h + gate1 * out
                self.cache["mlp", i] = block.mlp(block.norm2(h) * (1 + scale2) + shift2)
                self.cache["count", i] = torch.zeros(h.shape[:2], dtype=torch.int32)
            else:
                h = h + gate1 * self.cache["attn", i]
                self.partial(i, block, h, shift2, scale2, s)
            h = h + gate2 * self.cache["mlp", i]
        self.call += 1
        return self.model.finish(h, c)

    def partial(self, i: int, block: Any, h: Tensor, shift: Tensor, scale: Tensor, s: int) -> None:
        depth = len(self.model.blocks) - 1
        layer = self.layer[0] + self.layer[1] * (i / depth if depth else 0.0)
        share = self.ratio * layer * (self.step[0] + self.step[1] * s / self.total) * self.mlp
        k = floor(min(max(share, 0.0), 1.0) * h.shape[1])
        score = self.cache["score", i] + self.weight / self.n * self.cache["count", i].float()
        score = self.spread(score)
        chosen = score.argsort(dim=1, descending=True, stable=True)[:, :k]
        self.selected[-1][i] = chosen.sort(1).values
        self.cache["count", i] += 1
        self.cache["count", i].scatter_(1, chosen, 0)
        wide = chosen[..., None].expand(-1, -1, h.shape[2])
        rows = block.mlp(block.norm2(h.gather(1, wide)) * (1 + scale) + shift)
        self.cache["mlp", i].scatter_(1, wide, rows)

    def spread(self, score: Tensor) -> Tensor:
        """s4: in each cell of the grid the best token's score is raised."""
        height, width = self.model.grid
        out = score.clone()
        for b in range(score.shape[0]):
            for top in range(0, height, self.cell):
                for left in range(0, width, self.cell):
                    cell = [
                        r * width + c
                        for r in range(top, min(top + self.cell, height))
                        for c in range(left, min(left + self.cell, width))
                    ]
                    best = max(cell, key=lambda j: (score[b, j].item(), -j))
                    out[b, best] = score[b, best] * (1 + self.bonus)
        return out
