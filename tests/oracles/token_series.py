"""TaylorToCa on ``PlainDiT``, literally: every token has its differences and the step at which it was last computed."""

from functools import partial
from math import factorial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import PlainBlock, PlainDiT
from tests.oracles.tokens import count_of, rows, unit, wide


class TokenSeriesOracle:
    """A sampler's model: call it once a step. ``keys``: None, ``fresh``, ``update`` or ``keep``."""

    def __init__(
        self, model: PlainDiT, interval: int, order: int, ratio: float, keys: str | None, *, mlp: bool = True,
        warmup: int = 1, weight: float = 0.0, refresh: int = 0, update: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.interval, self.order, self.ratio, self.keys = model, interval, order, ratio, keys
        self.mlp, self.warmup, self.weight, self.refresh, self.update = mlp, warmup, weight / interval, refresh, update
        self.call, self.cached, self.made = 0, 0, 0
        self.table: dict[Any, list[Tensor]] = {}
        self.when: dict[Any, Tensor] = {}  # the step at which each token was last computed
        self.missed: dict[Any, Tensor] = {}
        self.count: dict[Any, Tensor] = {}
        self.kv: dict[int, tuple[Tensor, ...]] = {}

    def age(self, key: Any) -> Tensor:
        return (self.call - self.when[key]).float()[..., None]

    def forecast(self, key: Any) -> Tensor:
        table = self.table[key]
        return sum((d * self.age(key) ** i / factorial(i) for i, d in enumerate(table[: self.made + 1])), 0 * table[0])

    def differences(self, value: Tensor, old: list[Tensor], age: Tensor) -> list[Tensor]:
        fresh = [value]
        for i in range(self.order):
            fresh.append((fresh[i] - old[i]) / age)
        return fresh

    def full(self, key: Any, value: Tensor) -> Tensor:
        if key in self.table:
            self.missed[key] = (value - self.forecast(key)).norm(dim=-1)
            old, age = self.table[key], self.age(key)
        else:
            self.missed[key] = value.norm(dim=-1)
            old, age = [torch.zeros_like(value)] * (self.order + 1), torch.ones(1)
        makes = self.call >= max(1, self.warmup - 1)
        self.table[key] = self.differences(value, old, age) if makes else [value, *old[1:]]
        self.when[key] = torch.full(value.shape[:2], self.call)
        self.count[key] = torch.zeros(value.shape[:2])
        return value

    def some(self, key: Any, compute: Any) -> Tensor:
        k = count_of(self.ratio, self.table[key][0].shape[1])
        expected = self.forecast(key)
        if k == 0:
            return expected
        score = unit(self.missed[key]) + self.weight * self.count[key]
        chosen = score.argsort(dim=1, descending=True, stable=True)[:, :k]
        value = compute(chosen)
        self.count[key] = (self.count[key] + 1).scatter(1, chosen, 0)
        if not self.update:
            return expected.scatter(1, wide(chosen, value.shape[-1]), value)
        fresh = self.differences(value, [rows(d, chosen) for d in self.table[key]], rows(self.age(key), chosen))
        self.table[key] = [
            d.scatter(1, wide(chosen, d.shape[-1]), f) for d, f in zip(self.table[key], fresh, strict=True)
        ]
        self.when[key] = self.when[key].scatter(1, chosen, self.call)
        return expected.scatter(1, wide(chosen, value.shape[-1]), value)

    def projected(self, block: PlainBlock, x: Tensor) -> tuple[Tensor, ...]:
        b, n, c = x.shape
        return block.qkv(x).reshape(b, n, 3, block.heads, c // block.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def attention(self, i: int, block: PlainBlock, x: Tensor, phase: int, chosen: Tensor) -> Tensor:
        """Rows of the attention's output at the chosen queries."""
        q, k, v = self.projected(block, rows(x, chosen))
        if self.keys == "fresh" or (self.refresh and phase % self.refresh == 0):
            self.kv[i] = self.projected(block, x)[1:]
        elif self.keys == "update":
            at = chosen[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[-1])
            self.kv[i] = tuple(old.scatter(2, at, new) for old, new in zip(self.kv[i], (k, v), strict=True))
        out = F.scaled_dot_product_attention(q, *self.kv[i])
        return block.proj(out.transpose(1, 2).flatten(2))

    def rows_of_mlp(self, block: PlainBlock, x: Tensor, chosen: Tensor) -> Tensor:
        return block.mlp(rows(x, chosen))

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        full = self.call < self.warmup or self.cached == self.interval - 1
        self.cached = 0 if full else self.cached + 1
        h, c = self.model.prepare(x, t, y)
        for i, block in enumerate(self.model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).unsqueeze(1).chunk(6, dim=-1)
            into = block.norm1(h) * (1 + scale1) + shift1
            if full:
                out = self.full(("attn", i), block.attention(into))
                self.kv[i] = self.projected(block, into)[1:]
            elif self.keys is None:
                out = self.forecast(("attn", i))
            else:
                out = self.some(("attn", i), partial(self.attention, i, block, into, self.cached))
            h = h + gate1 * out
            into = block.norm2(h) * (1 + scale2) + shift2
            if full:
                out = self.full(("mlp", i), block.mlp(into))
            elif self.mlp:
                out = self.some(("mlp", i), partial(self.rows_of_mlp, block, into))
            else:
                out = self.forecast(("mlp", i))
            h = h + gate2 * out
        if full:
            self.made = min(self.order, self.made + 1) if self.call >= max(1, self.warmup - 1) else 0
        self.call += 1
        return self.model.finish(h, c)
