"""FLUX: both streams' MLPs partial in double blocks, the MLP half of single blocks; s counts up, N − 1 cached steps
between full ones after three full steps.

Works on diffusers' ``FluxTransformer2DModel``. As published the double blocks keep the attention before its output
projection and project it anew at each step; the single blocks keep attention and output.
"""

from typing import Any

import torch
from torch import Tensor

from tests.oracles.tokens import Caches, count_of, rows


class FluxOracle:
    """The transformer's forward, once a step."""

    def __init__(self, model: Any, n: int = 4, ratio: float = 0.1, span: tuple[int, int] | None = None) -> None:
        self.model, self.n, self.ratio = model, n, ratio
        depths = (len(model.transformer_blocks) - 1, len(model.single_transformer_blocks) - 1)
        self.span = span or depths
        self.call = self.since = 0
        self.caches = Caches(0.25 / n)
        self.kinds: list[str] = []

    def __call__(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor,
        img_ids: Tensor, txt_ids: Tensor, guidance: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        model = self.model
        full = self.call <= 2 or self.since == self.n - 1
        self.since = 0 if full else self.since + 1
        self.kinds.append("full" if full else "cached")
        self.caches.selected.append({})
        img, txt = model.x_embedder(hidden_states), model.context_embedder(encoder_hidden_states)
        given = () if guidance is None else (guidance * 1000,)
        temb = model.time_text_embed(timestep * 1000, *given, pooled_projections)
        rope = model.pos_embed(torch.cat([txt_ids, img_ids]))
        for i, block in enumerate(model.transformer_blocks):
            img, txt = self.double(i, block, img, txt, temb, rope, full)
        x = torch.cat([txt, img], dim=1)
        for i, block in enumerate(model.single_transformer_blocks):
            x = self.single(i, block, x, temb, rope, full)
        self.call += 1
        return model.proj_out(model.norm_out(x[:, txt.shape[1] :], temb))

    def share(self, i: int, span: int, stream: float) -> float:
        return self.ratio * (1.5 - (i / span if span else 0.0)) * stream

    def double(
        self, i: int, block: Any, img: Tensor, txt: Tensor, temb: Tensor, rope: Any, full: bool
    ) -> tuple[Tensor, Tensor]:
        caches, words, attn = self.caches, txt.shape[1], block.attn
        normed, gate, shift, scale, gate_mlp = block.norm1(img, emb=temb)
        normed_txt, gate_txt, shift_txt, scale_txt, gate_mlp_txt = block.norm1_context(txt, emb=temb)
        if full:
            parts: list[Any] = []
            for image, text, norm, norm_text in (
                (attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q),
                (attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k),
                (attn.to_v, attn.add_v_proj, lambda z: z, lambda z: z),
            ):
                a = norm_text(text(normed_txt).unflatten(-1, (attn.heads, -1)))
                b = norm(image(normed).unflatten(-1, (attn.heads, -1)))
                parts.append(torch.cat([a, b], dim=1))
            out, received = self.attend(parts[0], parts[1], parts[2], rope)
            caches.keep(("attn", i), out)
            caches.score["txt", i], caches.score["img", i] = received[:, :words], received[:, words:]
        out = caches.out["attn", i]
        img = img + gate[:, None] * attn.to_out[0](out[:, words:])
        txt = txt + gate_txt[:, None] * attn.to_add_out(out[:, :words])
        img = self.feed(("img", i), block.norm2, block.ff, img, shift, scale, gate_mlp, full)
        txt = self.feed(
            ("txt", i), block.norm2_context, block.ff_context, txt, shift_txt, scale_txt, gate_mlp_txt, full
        )
        return img, txt

    def feed(
        self, key: Any, norm: Any, module: Any, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, full: bool
    ) -> Tensor:
        def run(z: Tensor) -> Tensor:
            return module(norm(z) * (1 + scale[:, None]) + shift[:, None])

        if full:
            self.caches.keep(key, run(x))
        else:
            k = count_of(self.share(key[1], self.span[0], 0.4), x.shape[1])
            chosen = self.caches.choose(key, self.caches.score[key], k)
            if k:
                self.caches.update(key, chosen, run(rows(x, chosen)))
        return x + gate[:, None] * self.caches.out[key]

    def single(self, i: int, block: Any, x: Tensor, temb: Tensor, rope: Any, full: bool) -> Tensor:
        caches, attn, key = self.caches, block.attn, ("single", i)
        shift, scale, gate = block.norm.linear(torch.nn.functional.silu(temb)).chunk(3, dim=1)

        def prepare(z: Tensor) -> Tensor:
            return block.norm.norm(z) * (1 + scale[:, None]) + shift[:, None]

        def finish(attention: Tensor, z: Tensor) -> Tensor:
            return block.proj_out(torch.cat([attention, block.act_mlp(block.proj_mlp(z))], dim=2))

        if full:
            z = prepare(x)
            q, k, v = (part(z).unflatten(-1, (attn.heads, -1)) for part in (attn.to_q, attn.to_k, attn.to_v))
            out, caches.score[key] = self.attend(attn.norm_q(q), attn.norm_k(k), v, rope)
            caches.keep(("attn", key), out)
            caches.keep(key, finish(out, z))
        else:
            k = count_of(self.share(i, self.span[1], 1.6), x.shape[1])
            chosen = caches.choose(key, caches.score[key], k)
            if k:
                caches.update(key, chosen, finish(rows(caches.out["attn", key], chosen), prepare(rows(x, chosen))))
        return x + gate[:, None] * caches.out[key]

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
        """Attention on ``[batch, tokens, heads, d]``; its output, and what each token receives, mean over queries."""
        from diffusers.models.embeddings import apply_rotary_emb

        q, k = (apply_rotary_emb(z, rope, sequence_dim=1).transpose(1, 2) for z in (q, k))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        out = (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
        return out, weights.mean(1).mean(1)
