"""DiT: MLP partial by the attention received (s1), each half of the batch for itself; s counts down."""

from typing import Any

from torch import Tensor

from tests.models import PlainDiT
from tests.oracles.tokens import Caches, count_of, interval, rows


class Oracle:
    """A sampler's model: call it once a step, ``total`` times."""

    def __init__(
        self, model: PlainDiT, total: int, n: int, ratio: float, *, weight: float = 0.25, cell: int = 2,
        bonus: float = 0.6, layer: tuple[float, float] = (0.8, 0.4), step: tuple[float, float] = (3.0, -4.0),
        mlp: float = 2.5, span: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.total, self.n, self.ratio = model, total, n, ratio
        self.cell, self.bonus, self.layer, self.step, self.mlp = cell, bonus, layer, step, mlp
        self.span = span or len(model.blocks) - 1
        self.call, self.interval = 0, 1
        self.caches = Caches(weight / n)
        self.kinds: list[str] = []

    @property
    def selected(self) -> list[dict[Any, Tensor]]:
        """The tokens that each step selected."""
        return self.caches.selected

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s = self.total - 1 - self.call
        slope = 0.4 if self.ratio else 0.0
        full = self.call == 0
        if full or s % self.interval == 0:
            self.interval = interval(s, self.total, self.n, slope, self.ratio != 0)
            full = full or s % self.interval == 0
        self.kinds.append("full" if full else "cached")
        caches = self.caches
        caches.selected.append({})
        h, c = self.model.prepare(x, t, y)
        for i, block in enumerate(self.model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).unsqueeze(1).chunk(6, dim=-1)
            if full:
                into = block.norm1(h) * (1 + scale1) + shift1
                out = block.attention(into)
                caches.keep(("attn", i), out)
                caches.score[i] = block.attention_map(into).mean(1).sum(1)
                h = h + gate1 * out
                caches.keep(i, block.mlp(block.norm2(h) * (1 + scale2) + shift2))
            else:
                h = h + gate1 * caches.out["attn", i]
                layer = self.layer[0] + self.layer[1] * (i / self.span if self.span else 0.0)
                share = self.ratio * layer * (self.step[0] + self.step[1] * s / self.total) * self.mlp
                k = count_of(share, h.shape[1])
                chosen = caches.choose(i, caches.score[i], k, self.model.grid, self.cell, self.bonus)
                caches.update(i, chosen, block.mlp(block.norm2(rows(h, chosen)) * (1 + scale2) + shift2))
            h = h + gate2 * caches.out[i]
        self.call += 1
        self.stream = h
        return self.model.finish(h, c)


class DuCaOracle(Oracle):
    """DuCa: at even offsets within the interval no block runs, and the final layer gets the stream as it last was."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s = self.total - 1 - self.call
        if self.call and s % self.interval == 0:
            self.interval = interval(s, self.total, self.n, 0.4 if self.ratio else 0.0, self.ratio != 0)
        if self.call == 0 or s % self.interval == 0 or s % self.interval % 2:
            return super().__call__(x, t, y)
        self.kinds.append("skip")
        self.caches.selected.append({})
        for count in self.caches.count.values():
            count += 1  # a skipped step is one that its tokens missed
        self.call += 1
        return self.model.finish(self.stream, self.model.prepare(x, t, y)[1])
