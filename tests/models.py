"""Small diffusion transformers, written in three different styles."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of the timestep, ``[batch, dim]``."""
    frequencies = torch.exp(-9.21 * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class PlainBlock(nn.Module):
    """adaLN-Zero block with a fused qkv projection, as in the code of the DiT paper."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attention(self, x: Tensor) -> Tensor:
        """The projected output."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, c))

    def attention_map(self, x: Tensor) -> Tensor:
        """The post-softmax map ``[batch, heads, queries, keys]``: what an oracle needs."""
        b, n, c = x.shape
        q, k, _ = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """One block on ``[batch, tokens, width]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiT(nn.Module):
    """A class-conditional DiT in the style of the paper's own code."""

    def __init__(
        self, size: tuple[int, int] = (8, 8), width: int = 16, heads: int = 2, depth: int = 2, channels: int = 2
    ) -> None:
        super().__init__()
        self.grid, self.width = (size[0] // 2, size[1] // 2), width
        self.embed = nn.Conv2d(channels, width, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(1, self.grid[0] * self.grid[1], width))
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 4 * channels)

    def prepare(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and conditioning."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return tokens, self.time(timestep_features(t, 16).to(x.dtype)) + self.labels(y)

    def finish(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens to a picture."""
        shift, scale = self.modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        x = self.head(self.norm(x) * (1 + scale) + shift)
        h, w = self.grid
        return torch.einsum("nhwpqc->nchpwq", x.reshape(x.shape[0], h, w, 2, 2, -1)).reshape(
            x.shape[0], -1, 2 * h, 2 * w
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The predicted noise of pictures ``[batch, channels, height, width]``."""
        x, c = self.prepare(x, t, y)
        for block in self.blocks:
            x = block(x, c)
        return self.finish(x, c)


class Halved(PlainDiT):
    """Breaks within the stack of blocks."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.prepare(x, t, y)
        for block in self.blocks:
            x = block(x, c)
            torch._dynamo.graph_break()
        return self.finish(x, c)


class RegisterBlock(nn.Module):
    """Pre-norm without adaLN, attention written out, SwiGLU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.to_q, self.to_kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.gate, self.up, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """One block on ``[batch, registers + tokens, width]``."""
        y = self.n1(x)
        q = rearrange(self.to_q(y), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.to_kv(y), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / q.shape[-1] ** 0.5, dim=-1)
        x = x + self.out(rearrange(torch.matmul(weights, v), "b h n d -> b n (h d)"))
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class RegisterDiT(nn.Module):
    """einops reshapes, registers before the tokens, conditioning added to the tokens once."""

    def __init__(self, size: tuple[int, int] = (8, 8), width: int = 16, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Linear(8, width)
        self.registers = nn.Parameter(torch.randn(3, width))
        self.time = nn.Linear(16, width)
        self.labels = nn.Embedding(11, width)
        self.layers = nn.ModuleList(RegisterBlock(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The predicted noise of pictures ``[batch, 2, height, width]``."""
        tokens = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2))
        tokens = tokens + (self.time(timestep_features(t, 16)) + self.labels(y))[:, None]
        z = torch.cat([self.registers.expand(x.shape[0], -1, -1), tokens], dim=1)
        for layer in self.layers:
            z = layer(z)
        z = self.head(z[:, 3:])
        return rearrange(z, "b (h w) (p q c) -> b c (h p) (w q)", h=self.size[0] // 2, p=2, q=2)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every branch matters; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def diffusers_dit(depth: int = 2, **overrides: Any) -> nn.Module:
    """A small ``DiTTransformer2DModel``."""
    from diffusers import DiTTransformer2DModel

    settings: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 2, "out_channels": 2, "num_layers": depth,
        "patch_size": 2, "sample_size": 8, "num_embeds_ada_norm": 10, "attention_bias": True,
        "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
        "norm_num_groups": 1,
    }  # fmt: skip
    return randomize(DiTTransformer2DModel(**settings | overrides))


class FusedFlux(nn.Module):
    """FLUX in the layout of its original repository, with the weights of a diffusers model: one linear for queries,
    keys and values, and in single blocks one for those and the MLP's input; text and image joined once."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.heads = model.transformer_blocks[0].attn.heads if model.transformer_blocks else 1
        self.fused_double = nn.ModuleList()
        for block in model.transformer_blocks:
            a = block.attn
            image, words = _joined(a.to_q, a.to_k, a.to_v), _joined(a.add_q_proj, a.add_k_proj, a.add_v_proj)
            self.fused_double.append(nn.ModuleList([image, words]))
        self.fused_single = nn.ModuleList(
            _joined(b.attn.to_q, b.attn.to_k, b.attn.to_v, b.proj_mlp) for b in model.single_transformer_blocks
        )

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each ``[batch, heads, tokens, d]``."""
        return tuple(rearrange(qkv, "b l (k h d) -> k b h l d", k=3, h=self.heads).unbind(0))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rope: Any) -> Tensor:
        """Attention after rotation; heads merged."""
        from diffusers.models.embeddings import apply_rotary_emb

        q, k = apply_rotary_emb(q, rope, sequence_dim=2), apply_rotary_emb(k, rope, sequence_dim=2)
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, timestep: Tensor,
        img_ids: Tensor, txt_ids: Tensor,
    ) -> Tensor:  # fmt: skip
        """As the diffusers model's."""
        m = self.inner
        img, txt = m.x_embedder(hidden_states), m.context_embedder(encoder_hidden_states)
        temb = m.time_text_embed(timestep * 1000, pooled_projections)
        rope = m.pos_embed(torch.cat([txt_ids, img_ids]))
        words = txt.shape[1]
        for linears, block in zip(self.fused_double, m.transformer_blocks, strict=True):
            a, image, text = block.attn, linears[0], linears[1]
            s1, c1, g1, s2, c2, g2 = block.norm1.linear(F.silu(temb))[:, None].chunk(6, dim=-1)
            t1, d1, h1, t2, d2, h2 = block.norm1_context.linear(F.silu(temb))[:, None].chunk(6, dim=-1)
            q, k, v = self.split(image((1 + c1) * block.norm1.norm(img) + s1))
            tq, tk, tv = self.split(text((1 + d1) * block.norm1_context.norm(txt) + t1))
            q, k = torch.cat([a.norm_added_q(tq), a.norm_q(q)], 2), torch.cat([a.norm_added_k(tk), a.norm_k(k)], 2)
            out = self.attend(q, k, torch.cat([tv, v], dim=2), rope)
            txt_out, img_out = out[:, :words], out[:, words:]
            img = img + g1 * a.to_out[0](img_out)
            img = img + g2 * block.ff((1 + c2) * block.norm2(img) + s2)
            txt = txt + h1 * a.to_add_out(txt_out)
            txt = txt + h2 * block.ff_context((1 + d2) * block.norm2_context(txt) + t2)
        x = torch.cat([txt, img], dim=1)
        for linear1, block in zip(self.fused_single, m.single_transformer_blocks, strict=True):
            shift, scale, gate = block.norm.linear(F.silu(temb))[:, None].chunk(3, dim=-1)
            sizes: Any = [3 * x.shape[-1], linear1.out_features - 3 * x.shape[-1]]
            qkv, mlp = torch.split(linear1((1 + scale) * block.norm.norm(x) + shift), sizes, dim=-1)
            q, k, v = self.split(qkv)
            out = self.attend(block.attn.norm_q(q), block.attn.norm_k(k), v, rope)
            x = x + gate * block.proj_out(torch.cat((out, block.act_mlp(mlp)), 2))
        return m.proj_out(m.norm_out(x[:, words:], temb))


def _joined(*parts: Any) -> nn.Linear:
    """One linear layer that makes the outputs of several, end to end."""
    whole = nn.Linear(parts[0].in_features, sum(p.out_features for p in parts))
    whole.weight.data = torch.cat([p.weight.data for p in parts])
    whole.bias.data = torch.cat([p.bias.data for p in parts])
    return whole


class Positional(nn.Module):
    """A model called as ``model(x, t, y)`` and answering with a tensor, whatever it is inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Call the diffusers model by keyword."""
        return self.inner(x, timestep=t, class_labels=y, return_dict=False)[0]


def zoo() -> dict[str, nn.Module]:
    """One small model of each style."""
    return {
        "plain": randomize(PlainDiT()),
        "register": randomize(RegisterDiT()),
        "diffusers": Positional(diffusers_dit()).eval(),
    }


class Mixing(PlainDiT):
    """Its MLPs look at all tokens: a cumulative sum before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = nn.Sequential(Cumulative(), *block.mlp)


class Cumulative(nn.Module):
    """Each token is the sum of those before it."""

    def forward(self, x: Tensor) -> Tensor:
        """On ``[batch, tokens, width]``."""
        return x.cumsum(1)


class Texted(PlainDiT):
    """Text is projected in every block, the same at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.ModuleList(nn.Linear(8, 16) for _ in self.blocks)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        """As ``PlainDiT``, with words ``[batch, words, 8]``."""
        h, c = self.prepare(x, t, torch.zeros(x.shape[0], dtype=torch.long))
        for block, keys in zip(self.blocks, self.keys, strict=True):
            words = keys(text)
            weights = (h @ words.transpose(1, 2)).softmax(-1)
            h = block(h + weights @ words, c)
        return self.finish(h, c)


class JointBlock(nn.Module):
    """Words and patches attend together, and have an MLP each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.qkv, self.proj = (
            nn.ModuleList(nn.Linear(width, size) for _ in range(2)) for size in (3 * width, width)
        )  # fmt: skip
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2)
        )

    def attention(self, words: Tensor, patches: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """What both streams gain by it."""
        normed = self.norms[0](words) + c, self.norms[1](patches) + c
        parts = [linear(x).unflatten(-1, (3, self.heads, -1)) for linear, x in zip(self.qkv, normed, strict=True)]
        q, k, v = torch.cat(parts, 1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj[0](out[:, : words.shape[1]]), self.proj[1](out[:, words.shape[1] :])

    def mlp(self, stream: int, x: Tensor, c: Tensor) -> Tensor:
        """What a stream gains by its MLP."""
        return self.mlps[stream](self.norms[2 + stream](x) + c)

    def forward(self, words: Tensor, patches: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams, ``[batch, tokens, width]``."""
        own = self.attention(words, patches, c)
        words, patches = words + own[0], patches + own[1]
        return words + self.mlp(0, words, c), patches + self.mlp(1, patches, c)


class JointDiT(nn.Module):
    """Joint attention, as in SD3: ``model(x, t, text)`` on ``[batch, patches, 4]`` and ``[batch, words, 6]``."""

    def __init__(self, width: int = 8, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patches, self.words, self.time = nn.Linear(4, width), nn.Linear(6, width), nn.Linear(8, width)
        self.blocks = nn.ModuleList(JointBlock(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def prepare(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Words, patches and the conditioning that enter the blocks."""
        return self.words(text), self.patches(x), self.time(timestep_features(t, 8))[:, None]

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The predicted noise."""
        words, patches, c = self.prepare(x, t, text)
        for block in self.blocks:
            words, patches = block(words, patches, c)
        return self.head(patches)
