"""TaylorSeer on ``PlainDiT``, literally: difference tensors by recursion, a Taylor series between full steps."""

from math import factorial
from typing import Any

from torch import Tensor

from tests.models import PlainDiT


class TaylorOracle:
    """A sampler's model: call it once a step."""

    def __init__(self, model: PlainDiT, interval: int, order: int, warmup: int) -> None:
        self.model, self.interval, self.order, self.warmup = model, interval, order, warmup
        self.call, self.cached = 0, 0
        self.last_full = -1
        self.table: dict[Any, list[Tensor]] = {}
        self.kinds: list[str] = []

    def full(self, key: Any, value: Tensor) -> Tensor:
        """Update the differences: order grows by one with each full step, from the last warm-up step on."""
        fresh = [value]
        old = self.table.get(key, [])
        if self.call > self.warmup - 2:
            distance = self.call - self.last_full
            for i in range(self.order):
                if i < len(old):
                    fresh.append((fresh[i] - old[i]) / distance)
        self.table[key] = fresh
        return value

    def forecast(self, key: Any) -> Tensor:
        x = self.call - self.last_full
        return sum((d * x**i / factorial(i) for i, d in enumerate(self.table[key])), start=0 * self.table[key][0])

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        full = self.call < self.warmup or self.cached == self.interval - 1
        self.cached = 0 if full else self.cached + 1
        self.kinds.append("full" if full else "cached")
        h, c = self.model.prepare(x, t, y)
        for i, block in enumerate(self.model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).unsqueeze(1).chunk(6, dim=-1)
            for name, gate in (("attn", gate1), ("mlp", gate2)):
                if not full:
                    out = self.forecast((name, i))
                elif name == "attn":
                    out = self.full((name, i), block.attention(block.norm1(h) * (1 + scale1) + shift1))
                else:
                    out = self.full((name, i), block.mlp(block.norm2(h) * (1 + scale2) + shift2))
                h = h + gate * out
        if full:
            self.last_full = self.call
        self.call += 1
        return self.model.finish(h, c)
