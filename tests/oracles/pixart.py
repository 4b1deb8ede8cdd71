"""PixArt: cross-attention and MLP partial by the entropy of cross-attention rows (s2), one selection for the pair.

Works on diffusers' ``PixArtTransformer2DModel``; s counts up.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.tokens import Caches, count_of, heads, interval, pair_entropy, rows


class PixArtOracle:
    """The transformer's forward, once a step, ``total`` times. The batch is a pair: [unconditional, conditional]."""

    def __init__(
        self, model: Any, total: int, n: int = 3, ratio: float = 0.3, *, slope: float = 0.2,
        layer: tuple[float, float] = (1.6, -1.2), step: tuple[float, float] = (1.9, -1.8), span: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.total, self.n, self.ratio, self.slope = model, total, n, ratio, slope
        self.layer, self.step = layer, step
        self.span = span or len(model.transformer_blocks) - 1
        self.call, self.interval = 0, 1
        self.caches = Caches(0.25 / n)
        self.maps: dict[int, Tensor] = {}
        self.kinds: list[str] = []

    def __call__(
        self, x: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, encoder_attention_mask: Tensor,
        added_cond_kwargs: Any = None,
    ) -> Tensor:  # fmt: skip
        model, caches, s = self.model, self.caches, self.call
        full = s == 0
        if full or s % self.interval == 0:
            # A counter that runs up: the slope's sign is the other.
            self.interval = interval(s, self.total, self.n, -self.slope, False)
            full = full or s % self.interval == 0
        self.kinds.append("full" if full else "cached")
        caches.selected.append({})
        size = model.config.patch_size
        grid = (x.shape[-2] // size, x.shape[-1] // size)
        h = model.pos_embed(x)
        t, embedded = model.adaln_single(timestep, added_cond_kwargs, batch_size=len(x), hidden_dtype=h.dtype)
        y = model.caption_projection(encoder_hidden_states)
        bias = (1 - encoder_attention_mask.to(h.dtype))[:, None, None] * -10000.0
        for i, block in enumerate(model.transformer_blocks):
            table = block.scale_shift_table[None] + t.reshape(len(x), 6, -1)
            shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)
            attn1, cross, mlp = ("attn", i), ("cross", i), ("mlp", i)
            if full:
                caches.keep(attn1, block.attn1(block.norm1(h) * (1 + scale1) + shift1))
            h = h + gate1 * caches.out[attn1]
            layer = self.layer[0] + self.layer[1] * (i / self.span if self.span else 0.0)
            share = self.ratio * layer * (self.step[0] + self.step[1] * s / self.total)
            if full:
                out, self.maps[i] = self.attend(block.attn2, h, y, bias)
                caches.keep(cross, out)
            else:
                self.partial(
                    cross,
                    i,
                    count_of(share * 0.6, h.shape[1]),
                    h,
                    grid,
                    lambda z, b=block: self.attend(b.attn2, z, y, bias),
                )
            h = h + caches.out[cross]

            def feed(
                z: Tensor, block: Any = block, shift: Tensor = shift2, scale: Tensor = scale2
            ) -> tuple[Tensor, None]:
                return block.ff(block.norm2(z) * (1 + scale) + shift), None

            if full:
                caches.keep(mlp, feed(h)[0])
            else:
                self.partial(mlp, i, count_of(share * 1.6, h.shape[1]), h, grid, feed)
            h = h + gate2 * caches.out[mlp]
        self.call += 1
        shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        h = model.proj_out(model.norm_out(h) * (1 + scale) + shift)
        h = h.reshape(-1, *grid, size, size, model.out_channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, grid[0] * size, grid[1] * size)

    def partial(self, key: Any, i: int, k: int, h: Tensor, grid: tuple[int, int], module: Any) -> None:
        chosen = self.caches.choose(key, pair_entropy(self.maps[i]), k, grid, 4, 0.4)
        if k == 0:
            return
        out, fresh = module(rows(h, chosen))
        self.caches.update(key, chosen, out)
        if fresh is not None:
            index = chosen[:, None, :, None].expand(-1, fresh.shape[1], -1, fresh.shape[-1])
            self.maps[i] = self.maps[i].scatter(2, index, fresh)

    @staticmethod
    def attend(attn: Any, z: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention of the rows ``z``, and its map."""
        q, k, v = heads(attn.to_q(z), attn.heads), heads(attn.to_k(y), attn.heads), heads(attn.to_v(y), attn.heads)
        weights = F.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias, dim=-1)
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2)), weights
