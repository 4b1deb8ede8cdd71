"""OpenSora 1.2: attention every 3 steps, cross-attention every 6, a share of the MLPs' tokens in between; s counts up.

With an ``x_mask`` the frames given as a condition are modulated and gated as at timestep 0, cached or not. (The published
code multiplies the wrong tensor there.)
"""

from typing import Any

import torch
from torch import Tensor

from examples.opensora.stdit3 import STDiT3, by_frame, modulate
from tests.oracles.tokens import Caches, count_of, heads, pair_entropy, rows


class OpenSoraOracle:
    """STDiT3's forward, once a step. The batch is a pair."""

    def __init__(self, model: STDiT3, ratio: float = 0.1, weight: float = 0.25 / 3) -> None:
        self.model, self.ratio, self.call = model, ratio, 0
        self.caches = Caches(weight)
        self.maps: dict[Any, Tensor] = {}
        self.full: list[tuple[bool, bool]] = []  # attention and MLP, cross-attention

    def __call__(
        self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None, x_mask: Tensor | None = None,
        fps: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        model, caches, s = self.model, self.caches, self.call
        full, cross_full = s <= 2 or s % 3 == 0, s <= 2 or s % 6 == 0
        self.full.append((full, cross_full))
        caches.selected.append({})
        h, words, t, t0, grid = model.prepare(x, timestep, y, fps)
        c, c0 = model.t_block(t), model.t_block(t0)
        frames = grid[0]
        for i, pair in enumerate(zip(model.spatial_blocks, model.temporal_blocks, strict=True)):
            for block in pair:
                key = (i, block.temporal)
                shift1, scale1, gate1, shift2, scale2, gate2 = block.conditioning(c)
                zero = block.conditioning(c0)

                def choose(at_t: Tensor, at_0: Tensor) -> Tensor:
                    return at_t if x_mask is None else by_frame(x_mask, at_t, at_0, frames)

                if full:
                    z = block.norm1(h)
                    z = choose(modulate(z, shift1, scale1), modulate(z, zero[0], zero[1]))
                    caches.keep(("attn", key), block.attend(z, frames))
                out = caches.out["attn", key]
                h = h + choose(gate1 * out, zero[2] * out)
                if cross_full:
                    out, self.maps[key] = self.attend(block.cross_attn, h, words, mask)
                    caches.keep(("cross", key), out)
                h = h + caches.out["cross", key]
                # Norm and modulation on all tokens, then gather: as published.
                z = block.norm2(h)
                z = choose(modulate(z, shift2, scale2), modulate(z, zero[3], zero[4]))
                if full:
                    caches.keep(("mlp", key), block.mlp(z))
                else:
                    k = count_of(self.ratio * 1.495, h.shape[1])
                    chosen = caches.choose(("mlp", key), pair_entropy(self.maps[key]), k)
                    caches.update(("mlp", key), chosen, block.mlp(rows(z, chosen)))
                out = caches.out["mlp", key]
                h = h + choose(gate2 * out, zero[5] * out)
        self.call += 1
        return model.finish(h, t, t0, x_mask, grid)

    @staticmethod
    def attend(attn: Any, x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q = heads(attn.q_linear(x), attn.heads)
        k, v = (heads(part, attn.heads) for part in attn.kv_linear(y).chunk(2, dim=-1))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
        weights = torch.softmax(logits, dim=-1)
        return attn.proj((weights @ v).transpose(1, 2).flatten(2)), weights
