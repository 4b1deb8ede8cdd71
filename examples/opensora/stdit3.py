"""STDiT3, the video transformer of OpenSora 1.2.

Blocks alternate between attention inside a frame (spatial) and along time at one place (temporal); each also reads the
text by cross-attention and has an MLP. All tokens of a video stand in one dimension, ``[batch, frames·places, width]``.

With an ``x_mask`` (frames given as a condition), those frames are modulated as at timestep 0: shift and scale before a
branch and the gate after it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Cosines and sines of positions, ``[..., dim]``."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScalarEmbedder(nn.Module):
    """An MLP on the sinusoid of a number for each sample (timestep, frames per second)."""

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Tensor) -> Tensor:
        """``[batch]`` to ``[batch, width]``."""
        return self.mlp(sinusoid(value, self.features).type_as(next(self.mlp.parameters())))


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding along the last but one dimension of ``[..., positions, features]``."""
    angles = sinusoid(torch.arange(x.shape[-2], device=x.device), x.shape[-1])
    cos, sin = (part.repeat_interleave(2, dim=-1).to(x.dtype) for part in angles.chunk(2, dim=-1))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


class SelfAttention(nn.Module):
    """Attention with normalised queries and keys, rotary positions for time."""

    def __init__(self, width: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads, eps=1e-6), nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Tokens read the text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens ``[batch, tokens, width]``, text ``[batch, words, width]``, mask bool ``[batch, words]``."""
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        allowed = mask[:, None, None, :] if mask is not None else None
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).flatten(2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x·(1 + scale) + shift``."""
    return x * (1 + scale) + shift


def by_frame(x_mask: Tensor, x: Tensor, given: Tensor, frames: int) -> Tensor:
    """``x`` where the mask ``[batch, frames]`` is set, ``given`` elsewhere."""
    choice = torch.where(x_mask[:, :, None, None], x.unflatten(1, (frames, -1)), given.unflatten(1, (frames, -1)))
    return choice.flatten(1, 2)


class Block(nn.Module):
    """Self-attention over space or time, cross-attention, MLP."""

    def __init__(self, width: int, heads: int, temporal: bool, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn, self.cross_attn = SelfAttention(width, heads, temporal), CrossAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * width, width)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def conditioning(self, t: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention and of the MLP, each ``[batch, 1, width]``."""
        return (self.scale_shift_table[None] + t.unflatten(-1, (6, -1))).chunk(6, dim=1)

    def attend(self, x: Tensor, frames: int) -> Tensor:
        """Attention among the places of a frame, or among the frames at a place."""
        x = x.unflatten(1, (frames, -1))
        if self.temporal:
            return (
                self.attn(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(1, 2)
            )
        return self.attn(x.flatten(0, 1)).unflatten(0, (x.shape[0], -1)).flatten(1, 2)

    def forward(
        self, x: Tensor, y: Tensor, t: Tensor, t0: Tensor, mask: Tensor | None, x_mask: Tensor | None, frames: int
    ) -> Tensor:
        """One block on ``[batch, frames·places, width]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.conditioning(t)
        zero = self.conditioning(t0)

        def prepare(norm: nn.Module, shift: Tensor, scale: Tensor, shift0: Tensor, scale0: Tensor) -> Tensor:
            normed = norm(x)
            z = modulate(normed, shift, scale)
            return z if x_mask is None else by_frame(x_mask, z, modulate(normed, shift0, scale0), frames)

        def gated(z: Tensor, gate: Tensor, gate0: Tensor) -> Tensor:
            return gate * z if x_mask is None else by_frame(x_mask, gate * z, gate0 * z, frames)

        x = x + gated(self.attend(prepare(self.norm1, shift1, scale1, zero[0], zero[1]), frames), gate1, zero[2])
        x = x + self.cross_attn(x, y, mask)
        return x + gated(self.mlp(prepare(self.norm2, shift2, scale2, zero[3], zero[4])), gate2, zero[5])


class STDiT3(nn.Module):
    """The video transformer.

    Args:
        width, heads, depth: 1152, 16 and 28 in the published model; ``depth`` counts pairs of blocks.
        in_channels: of the latents; the output has twice as many (``pred_sigma``).
        caption_channels: of the text encoder's states.
        patch: frames, height and width of a patch.
        input_sq_size: side of the picture for which positions count 1 a patch.
    """

    def __init__(
        self, width: int = 1152, heads: int = 16, depth: int = 28, in_channels: int = 4, caption_channels: int = 4096,
        patch: tuple[int, int, int] = (1, 2, 2), input_sq_size: int = 512,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.patch, self.in_channels, self.input_sq_size = width, patch, in_channels, input_sq_size
        self.x_embedder = nn.Conv3d(in_channels, width, patch, stride=patch)
        self.t_embedder, self.fps_embedder = ScalarEmbedder(width), ScalarEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Sequential(
            nn.Linear(caption_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.spatial_blocks = nn.ModuleList(Block(width, heads, temporal=False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(Block(width, heads, temporal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.head = nn.Linear(width, math.prod(patch) * 2 * in_channels)

    def positions(self, height: int, width: int, device: torch.device) -> Tensor:
        """Sinusoids of both coordinates of each place, ``[height·width, width]``."""
        # The latents are an eighth of the picture's side; positions are scaled with the picture.
        side = 8 * math.sqrt(height * width * self.patch[1] * self.patch[2])
        scale = side / self.input_sq_size
        base = round(math.sqrt(height * width))
        rows, columns = (torch.arange(n, device=device) / scale * base / n for n in (height, width))
        parts = (columns[None, :].expand(height, -1), rows[:, None].expand(-1, width))
        return torch.cat([sinusoid(p, self.width // 2) for p in parts], dim=-1).flatten(0, 1)

    def prepare(
        self, x: Tensor, timestep: Tensor, y: Tensor, fps: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int, int]]:
        """Tokens, text, conditioning at the timestep and at 0, and the token grid."""
        tokens = self.x_embedder(x)
        frames, height, width = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2).unflatten(1, (frames, -1))
        tokens = tokens + self.positions(height, width, x.device).to(x.dtype)
        speed = self.fps_embedder(fps if fps is not None else torch.full_like(timestep, 24.0))
        t, t0 = (self.t_embedder(s) + speed for s in (timestep, torch.zeros_like(timestep)))
        return tokens.flatten(1, 2), self.y_embedder(y), t, t0, (frames, height, width)

    def finish(self, x: Tensor, t: Tensor, t0: Tensor, x_mask: Tensor | None, grid: tuple[int, int, int]) -> Tensor:
        """Tokens to latents ``[batch, 2·channels, frames, height, width]``."""
        frames, height, width = grid
        normed = self.norm(x)
        at_t, at_0 = ((self.scale_shift_table[None] + s[:, None]).chunk(2, dim=1) for s in (t, t0))
        x = modulate(normed, *at_t)
        if x_mask is not None:
            x = by_frame(x_mask, x, modulate(normed, *at_0), frames)
        x = self.head(x).reshape(x.shape[0], frames, height, width, *self.patch, -1)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None, x_mask: Tensor | None = None,
        fps: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The predicted velocity (and an unused variance).

        Args:
            x: latents ``[batch, channels, frames, height, width]``.
            timestep: ``[batch]``.
            y: text ``[batch, words, caption_channels]``; ``mask``: bool ``[batch, words]``, which words count.
            x_mask: bool ``[batch, frames]``; False marks frames given as a condition, which count as timestep 0.
            fps: ``[batch]``.
        """
        h, words, t, t0, grid = self.prepare(x, timestep, y, fps)
        c, c0 = self.t_block(t), self.t_block(t0)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            h = spatial(h, words, c, c0, mask, x_mask, grid[0])
            h = temporal(h, words, c, c0, mask, x_mask, grid[0])
        return self.finish(h, t, t0, x_mask, grid)
