"""The model of a description.

Each residual branch hands its output, before its gate, to ``keep(path, value, lay)``. In the model under test that is
the identity; in its twin, which runs eagerly, it blends by a mask what is new with what it kept. ``lay`` brings
``[batch, tokens, 1]`` into the layout of the value.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from tests.fuzz.grammar import Attention, Block, Branch, Spec
from tests.fuzz.mixes import Mix
from tests.models import timestep_features

Keep = Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]


def as_it_is(path: str, value: Tensor, lay: Callable[[Tensor], Tensor]) -> Tensor:
    """What the model under test does with a branch's output."""
    return value


def mixed_as_it_is(out: Tensor) -> Tensor:
    """What the model under test does with what an attention yields."""
    return out


def both_as_they_are(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What the model under test does with an attention's keys and values."""
    return k, v


class Place(nn.Module):
    """Where a stream's tokens lie: between ``[batch, tokens, channels]`` and a layout."""

    def __init__(self, layout: str, frames: int, height: int, width: int, extra: int = 0) -> None:
        super().__init__()
        self.layout, self.frames, self.spots = layout, frames, height * width
        self.height, self.width, self.extra = height, width, extra

    @property
    def tokens(self) -> int:
        """All tokens of the stream, with registers and joined text."""
        return self.frames * self.spots + self.extra

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """Frames, height and width, where the stream holds nothing else."""
        return None if self.extra else (self.frames, self.height, self.width)

    def lay(self, h: Tensor) -> Tensor:
        """``[batch, tokens, channels]`` into the layout."""
        b, n, c = h.shape
        if self.layout in ("bfsc", "bsfc", "fbsc"):
            h = h.reshape(b, self.frames, self.spots, c)
            return {"bfsc": h, "bsfc": h.transpose(1, 2), "fbsc": h.transpose(0, 1)}[self.layout]
        if self.layout == "nbc":
            return h.transpose(0, 1)
        if self.layout == "flat":
            return h.reshape(b * n, c)
        if self.layout == "bcn":
            return h.transpose(1, 2)
        if self.layout == "bchw":
            return h.transpose(1, 2).reshape(b, c, self.frames * self.height, self.width)
        return h

    def wide(self, v: Tensor) -> Tensor:
        """``[batch, 1 or tokens, channels]`` so that it broadcasts against the layout."""
        if v.shape[1] == self.tokens:
            return self.lay(v)
        if self.layout in ("bfsc", "bsfc"):
            return v.unsqueeze(1)
        if self.layout in ("fbsc", "nbc"):
            v = v.transpose(0, 1)
            return v.unsqueeze(2) if self.layout == "fbsc" else v
        if self.layout == "flat":
            return v.expand(-1, self.tokens, -1).reshape(-1, v.shape[-1])
        if self.layout in ("bcn", "bchw"):
            v = v.transpose(1, 2)
            return v.unsqueeze(-1) if self.layout == "bchw" else v
        return v

    def flat(self, x: Tensor) -> Tensor:
        """Out of the layout."""
        if self.layout == "bfsc":
            return x.flatten(1, 2)
        if self.layout == "bsfc":
            return x.transpose(1, 2).flatten(1, 2)
        if self.layout == "fbsc":
            return x.transpose(0, 1).flatten(1, 2)
        if self.layout == "nbc":
            return x.transpose(0, 1)
        if self.layout == "flat":
            return x.reshape(-1, self.tokens, x.shape[-1])
        if self.layout in ("bcn", "bchw"):
            return x.flatten(2).transpose(1, 2)
        return x


class Norm(nn.Module):
    """A norm of a stream in its layout."""

    def __init__(self, kind: str, channels: int, place: Place) -> None:
        super().__init__()
        self.kind, self.place, self.channels_first = kind, place, place.layout in ("bcn", "bchw")
        if kind in ("layer", "rms"):
            self.inner: nn.Module = nn.LayerNorm(channels) if kind == "layer" else nn.RMSNorm(channels)
        elif kind != "none":
            self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The same layout."""
        if self.kind == "none":
            return x
        if self.kind == "tokens":
            h = self.place.flat(x)
            return self.place.lay(F.layer_norm(h.transpose(1, 2), h.shape[1:2]).transpose(1, 2) * self.weight)
        if self.kind == "group" and self.channels_first:
            return F.group_norm(x, 2, self.weight)
        h = x.movedim(1, -1) if self.channels_first else x
        if self.kind in ("layer", "rms"):
            h = self.inner(h)
        elif self.kind == "manual":
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + self.weight)
        elif self.kind == "group":
            h = F.layer_norm(h.unflatten(-1, (2, -1)), (h.shape[-1] // 2,)).flatten(-2) * self.weight
        else:
            h = F.normalize(h, dim=-1) * self.weight * 3
        return h.movedim(-1, 1) if self.channels_first else h


class Condition(nn.Module):
    """``parts`` values of the conditioning, each to broadcast against the stream."""

    def __init__(self, kind: str, parts: int, channels: int, place: Place) -> None:
        super().__init__()
        self.kind, self.parts, self.place = kind, parts, place
        if kind == "shared":
            self.table = nn.Parameter(torch.zeros(parts, channels))
        else:
            self.project = nn.Linear(channels, parts * channels)

    def forward(self, c: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """From the conditioning of a sample, a frame or a token."""
        if self.kind == "shared":
            whole = (c["shared"][:, : self.table.numel()] + self.table.flatten())[:, None]
        else:
            whole = self.project(F.silu(c[self.kind] if self.kind != "block" else c["sample"][:, None]))
        return tuple(self.place.wide(part) for part in whole.chunk(self.parts, -1))


class Attend(nn.Module):
    """Attention of all kinds on ``[batch, tokens, channels]``."""

    def __init__(
        self, spec: Attention, channels: int, place: Place, cross: bool, inside: str, on: str, seed: int
    ) -> None:
        super().__init__()
        self.spec, self.place, self.cross, self.on, self.keep_keys = spec, place, cross, on, both_as_they_are
        self.hold: Callable[[Tensor], Tensor] = mixed_as_it_is
        self.heads, self.d = 2, channels // 2
        self.kv_heads = 1 if spec.keys in ("single", "grouped") else 2
        self.fused = spec.fused and not cross and self.kv_heads == 2
        if spec.core == "mha":
            self.inner = nn.MultiheadAttention(channels, 2, batch_first=True)
            return
        if self.fused:
            self.qkv = nn.Linear(channels, 3 * channels)
        else:
            self.q = nn.Linear(channels, channels)
            self.k, self.v = (nn.Linear(channels, self.kv_heads * self.d) for _ in range(2))
        if spec.project:
            self.out = nn.Linear(channels, channels)
        if spec.qk_norm in ("layer", "rms"):
            norm: type[nn.Module] = nn.LayerNorm if spec.qk_norm == "layer" else nn.RMSNorm
            self.norm_q, self.norm_k = norm(self.d), norm(self.d)
        n = place.tokens
        if spec.keys == "memory":
            self.memory = nn.Parameter(torch.zeros(3, channels))
        if spec.mask in ("additive", "per_head"):
            self.bias = nn.Parameter(torch.zeros(*((2,) if spec.mask == "per_head" else ()), n, n))
        generator = torch.Generator().manual_seed(seed)
        allowed = (torch.rand(n, n, generator=generator) < 0.6) | torch.eye(n, dtype=torch.bool)
        self.register_buffer("allowed", allowed)
        self.register_buffer("padded", torch.arange(n) < n - 3)
        angles = torch.arange(n)[:, None] * torch.exp(-torch.arange(self.d // 2) * 1.3)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        rows = torch.arange(n) // place.width  # of the picture: half of the frequencies tell these, half the columns
        plane = torch.where(torch.arange(self.d // 2) % 2 == 0, rows[:, None], torch.arange(n)[:, None] % place.width)
        self.register_buffer("plane_cos", plane.cos())
        self.register_buffer("plane_sin", plane.sin())
        self.inside = Mix(inside, n, channels, place.grid, seed) if inside and not cross else None
        if spec.gate:
            self.gate = nn.Linear(channels, 2)

    def forward(self, h: Tensor, text: Tensor | None) -> Tensor:
        """What every token takes from the others, or from the text."""
        if self.spec.core == "mha":
            other = text if self.cross and text is not None else h
            return self.inner(h, other, other, need_weights=False)[0]
        q, k, v = self._project(h, text if self.cross and text is not None else h)
        if self.spec.qk_norm == "l2":
            q, k = F.normalize(q, dim=-1) * 2, F.normalize(k, dim=-1) * 2
        elif self.spec.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
        if self.spec.rope and not self.cross:
            q, k = self._turned(q), self._turned(k)
        k, v = self.keep_keys(k, v)
        out = self.hold(self._scoped(q, k, v))
        if self.spec.gate:
            open_ = self.gate(h).sigmoid() if self.spec.gate == "sigmoid" else self.gate(h).tanh()
            out = (out.unflatten(-1, (2, -1)) * open_[..., None]).flatten(-2)
        return self.out(out) if self.spec.project else out

    def _project(self, h: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[batch, heads, tokens, d]`` each."""
        b, n, _ = h.shape
        if self.fused:
            q, k, v = self.qkv(h).chunk(3, -1)
        else:
            q, k, v = self.q(h), self.k(source), self.v(source)
        if self.inside is not None and (self.on == "q" or self.kv_heads == 2):
            q, k, v = (self.inside(x) if self.on == name else x for name, x in zip("qkv", (q, k, v), strict=True))
        q = q.reshape(b, n, self.heads, self.d).transpose(1, 2)
        k, v = (x.reshape(b, -1, self.kv_heads, self.d).transpose(1, 2) for x in (k, v))
        if self.spec.keys == "grouped" or (self.kv_heads == 1 and self.spec.core != "sdpa"):
            k, v = k.expand(-1, 2, -1, -1), v.repeat_interleave(2, 1)
        return q, k, v

    def _turned(self, x: Tensor) -> Tensor:
        cos, sin = (self.plane_cos, self.plane_sin) if self.spec.rope == "plane" else (self.cos, self.sin)
        cos, sin = cos[: x.shape[2]].to(x.dtype), sin[: x.shape[2]].to(x.dtype)
        if self.spec.rope in ("halves", "plane"):
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        if self.spec.rope == "interleaved":
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        turn = torch.view_as_complex(torch.stack([cos.float(), sin.float()], -1))
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(z * turn).flatten(-2).to(x.dtype)

    def _scoped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention among all tokens, or in windows, frames or places; ``[batch, tokens, channels]``."""
        b, _, n, d = q.shape
        f, scope = self.place.frames, self.spec.scope
        if self.cross or (scope in ("space", "time") and (self.place.extra or f == 1)):
            scope = "all"
        if scope in ("window", "shifted"):
            f = next((w for w in (2, 3, 5) if n % w == 0), 1)
        if scope == "tiles":
            return self._tiled(q, k, v)
        if scope in ("packed", "packed_into"):
            return self._merged(self._packed(q, k, v, [n // 3, n - n // 3] if n < 9 else [n // 3, 2, n - n // 3 - 2]))
        if scope == "all" or f == 1:
            return self._merged(self._attend(q, self._thinned(k), self._thinned(v), self._mask(n, k)))
        if scope == "shifted":
            q, k, v = (x.roll(2, 2) for x in (q, k, v))
        split = [x.reshape(b, -1, f, n // f, d) for x in (q, k, v)]
        if scope == "time":
            q, k, v = (x.permute(0, 3, 1, 2, 4).flatten(0, 1) for x in split)
        else:
            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in split)
        mask = self._mask(q.shape[2], k) if self.spec.mask in ("tril", "causal") else None
        out = self._attend(q, k, v, mask)
        if scope == "time":
            out = out.reshape(b, n // f, -1, f, d).permute(0, 2, 3, 1, 4).reshape(b, -1, n, d)
        else:
            out = out.reshape(b, f, -1, n // f, d).transpose(1, 2).reshape(b, -1, n, d)
        return self._merged(out.roll(-2, 2) if scope == "shifted" else out)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, sizes: list[int]) -> Tensor:
        """Attention in each of several pictures of one sequence."""
        pictures = zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True)
        own = [self._attend(*picture, mask=None) for picture in pictures]
        if self.spec.scope == "packed":
            return torch.cat(own, 2)
        out, at = torch.empty_like(q, dtype=own[0].dtype), 0
        for part in own:
            out[:, :, at : at + part.shape[2]] = part
            at += part.shape[2]
        return out

    def _tiled(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention in tiles of 2 × 2 tokens of the picture, which is made even where it is not; or in pairs of tokens
        where there is no picture."""
        f, height, width = self.place.grid or (1, 1, self.place.tokens)
        b, heads, n, d = q.shape
        more = (0, 0, 0, width % 2, 0, height % 2)

        def apart(x: Tensor) -> Tensor:
            own = x.shape[1]  # keys may have fewer heads
            x = F.pad(x.reshape(b * own * f, height, width, d), more)
            x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)
            return x.reshape(b, own, -1, 4, d).transpose(1, 2).flatten(0, 1)

        out = self._attend(apart(q), apart(k), apart(v), None)
        tall, wide = height + height % 2, width + width % 2
        out = out.reshape(b, -1, heads, 4, d).transpose(1, 2).reshape(b * heads * f, tall // 2, wide // 2, 2, 2, d)
        out = out.transpose(2, 3).reshape(b, heads, f, tall, wide, d)[:, :, :, :height, :width]
        return self._merged(out.reshape(b, heads, n, d))

    def _thinned(self, x: Tensor) -> Tensor:
        """Keys or values, fewer or more of them."""
        if self.cross:
            return x
        if self.spec.keys == "pooled":
            return (
                F.avg_pool1d(x.flatten(0, 1).transpose(1, 2), 2, ceil_mode=True)
                .transpose(1, 2)
                .unflatten(0, x.shape[:2])
            )
        if self.spec.keys == "strided":
            return x[:, :, ::2]
        if self.spec.keys == "memory":
            extra = self.memory.reshape(3, self.heads, self.d).transpose(0, 1).expand(x.shape[0], -1, -1, -1)
            return torch.cat([x, extra.to(x.dtype)], 2)
        return x

    def _mask(self, n: int, k: Tensor) -> Tensor | None:
        """Additive or boolean, for queries and keys of the same tokens."""
        kind = self.spec.mask
        if not kind or kind == "causal" or self.cross or self.spec.keys in ("pooled", "strided", "memory"):
            return None
        if kind in ("additive", "per_head"):
            return self.bias[..., :n, :n].to(k.dtype)
        if kind == "padding":
            return self.padded[None, None, None, :n]
        return self.allowed[:n, :n] if kind == "boolean" else torch.ones(n, n, dtype=torch.bool, device=k.device).tril()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        core, causal = self.spec.core, self.spec.mask == "causal" and not self.cross and q.shape[2] == k.shape[2]
        if core == "sdpa":
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]
            )  # fmt: skip
        if core == "linear" or (core == "prefix" and q.shape[2] != k.shape[2]):
            q, k = F.elu(q) + 1, F.elu(k) + 1
            return (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(-2).unsqueeze(-1))
        if core == "prefix":  # each token reads those before it, by one running sum
            q, k = F.elu(q) + 1, F.elu(k) + 1
            state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(-3)
            return torch.einsum("bhnd,bhnde->bhne", q, state) / (q * k.cumsum(-2)).sum(-1, keepdim=True)
        if core == "flex":
            return flex_attention(q, k, v, lambda s, b, h, i, j: s - 0.1 * (i - j).abs())
        q = q * self.d**-0.5
        if core == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
        elif core == "bmm":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, q.shape[:2])
        else:
            scores = q @ k.transpose(-1, -2)
        if causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores + mask if mask.dtype != torch.bool else scores.masked_fill(~mask, -1e4)
        weights = torch.sigmoid(scores) / k.shape[2] if core == "sigmoid" else scores.softmax(-1)
        if core == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", weights, v)
        if core == "bmm":
            return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, q.shape[:2])
        return weights @ v

    def _merged(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(2)


class Perceptron(nn.Module):
    """MLPs of all kinds, on ``[batch, tokens, channels]``, or on channels first where ``conv`` finds them so."""

    def __init__(self, body: str, channels: int, place: Place, inside: str, seed: int) -> None:
        super().__init__()
        self.body, self.place = body, place
        hidden = 2 * channels
        self.native = body == "conv" and place.layout in ("bcn", "bchw")
        if body == "conv":
            conv = nn.Conv2d if place.layout == "bchw" else nn.Conv1d
            layers: list[nn.Module] = [conv(channels, hidden, 1), conv(hidden, channels, 1)]
        elif body == "mixer":
            layers = [nn.Linear(place.tokens, 10), nn.Linear(10, place.tokens)]
        else:
            layers = [nn.Linear(channels, hidden), nn.Linear(hidden if body != "glu" else channels, channels)]
        self.up, self.down = layers
        if body in ("experts", "routed", "shared"):
            self.router = nn.Linear(channels, 3)
            self.others = nn.ModuleList(
                nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)) for _ in range(2)
            )
        if body in ("swiglu", "geglu"):
            self.gate = nn.Linear(channels, hidden, bias=False)
        if body == "gmlp":
            self.along, self.wide = nn.Linear(place.tokens, place.tokens), nn.Linear(channels, hidden)
        self.inside = (
            Mix(inside, place.tokens, channels if body in ("glu", "mixer") else hidden, place.grid, seed)
            if inside
            else None
        )

    def forward(self, h: Tensor) -> Tensor:
        """The same shape."""
        if self.body == "conv":
            return self._conv(h)
        if self.body == "mixer":
            y = self.down(F.gelu(self.up(h.transpose(1, 2)))).transpose(1, 2)
            return y if self.inside is None else self.inside(y)
        y = self.up(h)
        if self.body == "gmlp":
            gate = F.layer_norm(self.wide(h), (y.shape[-1],)).transpose(1, 2)
            y = y * self.along(gate).transpose(1, 2)
        if self.body == "swiglu":
            y = F.silu(self.gate(h)) * y
        elif self.body == "geglu":
            y = F.gelu(self.gate(h)) * y
        elif self.body == "glu":
            y = F.glu(y)
        else:
            y = F.gelu(y, approximate="tanh")
        y = self.down(self.inside(y) if self.inside is not None else y)
        return self._mixed(h, y) if self.body in ("experts", "routed", "shared") else y

    def _mixed(self, h: Tensor, first: Tensor) -> Tensor:
        """What several experts make of each token, weighted; of ``"routed"`` the two that its router prefers, of
        ``"shared"`` one, beside one that takes all."""
        weights = self.router(h).softmax(-1)
        if self.body == "shared":
            best = self.router(h)[..., 1:].topk(1, -1)
            weights = torch.ones_like(weights[..., :1])
            weights = torch.cat([weights, torch.zeros_like(best.values).expand(*h.shape[:-1], 2)], -1)
            weights = weights.scatter(-1, best.indices + 1, best.values.sigmoid())
        elif self.body == "routed":
            best = weights.topk(2, -1)
            weights = torch.zeros_like(weights).scatter(-1, best.indices, best.values)
        made = torch.stack([first, *(expert(h) for expert in self.others)], -1)
        return (made * weights.unsqueeze(-2)).sum(-1)

    def _conv(self, h: Tensor) -> Tensor:
        y = F.gelu(self.up(h if self.native else h.transpose(1, 2)))
        if self.inside is not None:
            inner = self.inside(y.flatten(2).transpose(1, 2)).transpose(1, 2)
            y = inner.reshape(y.shape)
        y = self.down(y)
        return y if self.native else y.transpose(1, 2)


class Fused(nn.Module):
    """Attention beside an MLP behind one projection, as in FLUX's single blocks."""

    def __init__(self, spec: Branch, channels: int, place: Place, seed: int) -> None:
        super().__init__()
        self.attend = Attend(spec.attention, channels, place, False, spec.inside, spec.on, seed)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(3 * channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """The same shape."""
        return self.down(torch.cat([self.attend(h, None), F.gelu(self.up(h))], -1))


class Residual(nn.Module):
    """One branch."""

    def __init__(self, spec: Branch, channels: int, place: Place, path: str, seed: int, streams: int = 1) -> None:
        super().__init__()
        self.spec, self.place, self.path, self.keep, self.streams = spec, place, path, as_it_is, streams
        if streams > 1:
            self.read, self.write = (nn.Parameter(torch.zeros(streams, 1)) for _ in range(2))
            self.mix = nn.Parameter(torch.zeros(streams, streams))
        self.norm = Norm(spec.norm, channels, place)
        if spec.place == "sandwich":
            self.norm_out = Norm("rms" if spec.norm == "none" else spec.norm, channels, place)
        if spec.modulation != "none":
            self.modulate = Condition(spec.modulation, 2, channels, place)
        if spec.gate == "static":
            self.scale = nn.Parameter(torch.zeros(channels))
        elif spec.gate != "none":
            self.gating = Condition("block" if spec.gate == "tanh" else spec.gate, 1, channels, place)
        if spec.body in ("attention", "cross"):
            self.body: nn.Module = Attend(
                spec.attention, channels, place, spec.body == "cross", spec.inside, spec.on, seed
            )  # fmt: skip
        elif spec.body == "fused":
            self.body = Fused(spec, channels, place, seed)
        else:
            self.body = Perceptron(spec.body, channels, place, spec.inside, seed)
        self.before, self.after = (
            Mix(name, place.tokens, channels, place.grid, seed + 1) if name else None
            for name in (spec.before, spec.after)
        )

    def value(self, x: Tensor, c: dict[str, Tensor], text: Tensor | None) -> Tensor:
        """The branch's output with its gate, in the stream's layout."""
        h = self.norm(x) if self.spec.place != "post" else x
        if self.spec.modulation != "none":
            shift, scale = self.modulate(c)
            h = h * (1 + scale) + shift
        if self.spec.wrap == "break":
            torch._dynamo.graph_break()
        h = self._inner(h, text)
        if self.spec.place == "sandwich":
            h = self.norm_out(h)
        h = self.keep(self.path, h, self.place.lay)
        if self.spec.gate == "static":
            return self.place.wide(self.scale[None, None]) * h if self.place.layout != "flat" else self.scale * h
        if self.spec.gate != "none":
            (gate,) = self.gating(c)
            return (torch.tanh(gate) if self.spec.gate == "tanh" else gate) * h
        return h

    def _inner(self, h: Tensor, text: Tensor | None) -> Tensor:
        if self.spec.wrap == "checkpoint":
            return checkpoint(self._precise, h, text, use_reentrant=False)
        return self._precise(h, text)

    def _precise(self, h: Tensor, text: Tensor | None) -> Tensor:
        if self.spec.island == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self._computed(h, text).to(h.dtype)
        return self._computed(h, text)

    def _computed(self, h: Tensor, text: Tensor | None) -> Tensor:
        if isinstance(self.body, Perceptron) and self.body.native:
            return self.body(h)
        dtype = h.dtype
        h = self.place.flat(h)
        if self.before is not None:
            h = self.before(h)
        if isinstance(self.body, Attend):
            h = self.body(h, text)
        else:
            h = self.body(h)
        if self.spec.island == "bfloat16":
            h = (h.to(torch.bfloat16) * 1.5).to(dtype)
        if self.after is not None:
            h = self.after(h)
        return self.place.lay(h)

    def forward(self, x: Tensor, c: dict[str, Tensor], text: Tensor | None) -> Tensor:
        """The stream with the branch added."""
        if self.streams > 1:
            out = self.value((self.read * x).sum(2), c, text)
            return x + 0.3 * (self.mix @ x) + self.write * out[:, :, None]
        y = self.value(x, c, text)
        how = self.spec.add
        if how == "reversed":
            x = y + x
        elif how == "in_place":
            x = x.add_(y)
        elif how == "alpha":
            x = torch.add(x, y, alpha=0.5)
        elif how == "scaled":
            x = x * 0.9 + 0.5 * y
        elif how == "lerp":
            x = torch.lerp(x, x + y, 0.7)
        else:
            x = x + y
        return self.norm(x) if self.spec.place == "post" else x


class Joint(nn.Module):
    """Attention over text and picture, each with weights of its own, then an MLP for each."""

    def __init__(self, spec: Block, model: Spec, place: Place, words: Place, path: str, seed: int) -> None:
        super().__init__()
        c = model.channels
        self.path, self.keep, self.place, self.words = path, as_it_is, place, words
        attention = spec.branches[0]
        self.norms = nn.ModuleList(Norm(attention.norm, c, p) for p in (place, words))
        self.modulations = nn.ModuleList(
            Condition("block" if attention.modulation != "none" else "shared", 2, c, p) for p in (place, words)
        )
        self.gates = nn.ModuleList(Condition("block", 1, c, p) for p in (place, words))
        self.gated = attention.gate != "none"
        self.qkvs = nn.ModuleList(nn.Linear(c, 3 * c) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(c, c) for _ in range(2))
        self.written = attention.attention.core != "sdpa"
        self.mlp = Residual(spec.branches[-1], c, place, f"{path}.mlp", seed)
        plain = Branch(modulation="block", gate="block")
        self.mlp_words = Residual(plain, c, words, f"{path}.mlp_words", seed + 2)

    def forward(self, x: Tensor, s: Tensor, c: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Both streams."""
        parts = []
        for i, h in enumerate((x, s)):
            shift, scale = self.modulations[i](c)
            h = self.qkvs[i](self.norms[i](h) * (1 + scale) + shift)
            parts.append(h.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4))
        q, k, v = torch.cat([parts[1], parts[0]], 3).unbind(0)
        if self.written:
            out = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).flatten(2)
        size = s.shape[1]
        ours = self.keep(f"{self.path}#picture", self.outs[0](out[:, size:]), self.place.lay)
        theirs = self.keep(f"{self.path}#words", self.outs[1](out[:, :size]), self.words.lay)
        if self.gated:
            ours, theirs = self.gates[0](c)[0] * ours, self.gates[1](c)[0] * theirs
        return self.mlp(x + ours, c, None), self.mlp_words(s + theirs, c, None)


class Stage(nn.Module):
    """One block."""

    def __init__(self, spec: Block, model: Spec, place: Place, words: Place | None, path: str, seed: int) -> None:
        super().__init__()
        c = model.channels
        if spec.pool:
            place = Place(model.layout, model.frames, model.height, model.width // 2)
            if model.width % 2:
                place = Place(model.layout, model.frames, model.height // 2, model.width)
            if spec.pool == "merge":
                self.down, self.up = nn.Linear(2 * c, c), nn.Linear(c, 2 * c)
        self.spec, self.place, self.path, self.keep = spec, place, path, as_it_is
        if spec.skip:
            self.skip = nn.Linear(2 * c if spec.skip == "cat" else c, c)
        if spec.style == "joint" and words is not None:
            self.joint: Joint | None = Joint(spec, model, place, words, f"{path}.joint", seed)
            return
        self.joint = None
        if spec.style == "encoder":
            self.layer = nn.TransformerEncoderLayer(c, 2, 2 * c, batch_first=True, norm_first=seed % 2 == 0)
            return
        self.branches = nn.ModuleList(
            Residual(branch, c, place, f"{path}.branches.{i}", seed + 7 * i, model.streams)
            for i, branch in enumerate(spec.branches)
        )

    def fewer(self, x: Tensor) -> Tensor:
        """Two tokens as one."""
        pairs = x.unflatten(1, (-1, 2))
        return self.down(pairs.flatten(2)) if self.spec.pool == "merge" else pairs.mean(2)

    def as_many(self, x: Tensor) -> Tensor:
        """One token as two."""
        if self.spec.pool == "merge":
            return self.up(x).unflatten(-1, (2, -1)).flatten(1, 2)
        return x.repeat_interleave(2, 1)

    def forward(
        self, x: Tensor, s: Tensor | None, earlier: Tensor, c: dict[str, Tensor], text: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The streams behind the block."""
        if self.spec.breaks:
            torch._dynamo.graph_break()
        if self.spec.skip:
            a, b = self.place.flat(x), self.place.flat(earlier)
            if self.spec.skip == "cat":
                x = self.place.lay(self.skip(torch.cat([a, b], -1)))
            else:
                x = x + self.keep(f"{self.path}.skip", self.place.lay(self.skip(b)), self.place.lay)
        if self.joint is not None:
            assert s is not None
            return self.joint(x, s, c)
        if self.spec.style == "encoder":
            return self.place.lay(self.layer(self.place.flat(x))), s
        if self.spec.style == "serial":
            whole = x
            x = self.fewer(x) if self.spec.pool else x
            for branch in self.branches:
                x = branch(x, c, text)
            return whole + self.as_many(x) if self.spec.pool else x, s
        values = [branch.value(x, c, text) for branch in self.branches]
        if self.spec.style == "parallel":
            for value in values:
                x = x + value
            return x, s
        whole = values[0]
        for value in values[1:]:
            whole = whole + value
        return x + self.keep(f"{self.path}.branches!", whole, self.place.lay), s


class Transformer(nn.Module):
    """The model of a description. ``x``: tokens ``[batch, n, 4]`` or a picture ``[batch, 2, 2·height, 2·width]``."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        c = spec.channels
        joined = spec.words if spec.text in ("before", "after") else 0
        extra = joined + spec.registers + spec.time_token
        self.place = Place(spec.layout if not extra else "bnc", spec.frames, spec.height, spec.width, extra)
        words = Place("bnc", 1, 1, spec.words) if spec.text == "joint" else None
        self.embed = nn.Conv2d(2, c, 2, 2) if spec.given == "picture" else nn.Linear(4, c)
        self.positions = nn.Parameter(torch.zeros(spec.tokens, c))
        self.time = nn.Sequential(nn.Linear(8 if spec.clock == "sine" else 1, c), nn.SiLU(), nn.Linear(c, c))
        if spec.text:
            self.words, self.pooled = nn.Linear(6, c), nn.Linear(6, c)
        else:
            self.labels = nn.Embedding(11, c)
        if spec.registers:
            self.registers = nn.Parameter(torch.zeros(spec.registers, c))
        branches = [branch for block in spec.blocks for branch in block.branches]
        self.kinds = {kind for branch in branches for kind in (branch.modulation, branch.gate)}
        if any(block.style == "joint" for block in spec.blocks):
            self.kinds.add("shared")
        self.shared = nn.Linear(c, 2 * c)
        self.by_frame = nn.Parameter(torch.zeros(spec.frames, c))
        self.by_token = nn.Parameter(torch.zeros(self.place.tokens, c))
        self.input_condition = nn.Linear(4, c)
        first = Stage(spec.blocks[0], spec, self.place, words, "blocks.0", spec.seed)
        self.blocks = nn.ModuleList([first])
        for i, block in enumerate(spec.blocks[1:], 1):
            stage = Stage(
                block, spec, self.place, words, f"blocks.{i}", spec.seed if block == spec.blocks[0] else spec.seed + i
            )
            self.blocks.append(first if spec.shared_weights else stage)
        self.norm, self.head = nn.LayerNorm(c), nn.Linear(c, 4)

    def _condition(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        spec = self.spec
        text = self.words(y) if spec.text else None
        # Made from the stream of the text, the conditioning would be a part of its branches.
        c = self.pooled(y.mean(1)) if text is not None else self.labels(y)
        t = t.reshape(-1).expand(x.shape[0]) if spec.time != "b" else t
        if spec.clock == "sine":
            c = c + self.time(timestep_features(t, 8).to(c.dtype))
        elif spec.clock == "linear":
            c = c + self.time(t.to(c.dtype)[:, None] / 1000)
        made = {"sample": c}
        if "shared" in self.kinds:
            made["shared"] = self.shared(F.silu(c))
        if "token" in self.kinds:
            made["token"] = c[:, None] + self.by_token
        if "frame" in self.kinds:
            frame = (c[:, None] + self.by_frame).repeat_interleave(spec.height * spec.width, 1)
            made["frame"] = F.pad(frame, (0, 0, self.place.extra, 0))
        if "input" in self.kinds:
            made["input"] = F.pad(self.input_condition(x) + c[:, None], (0, 0, self.place.extra, 0))
        return made, text

    def run_block(self, i: int, block: Any, h: Tensor, s: Tensor | None, given: Any) -> tuple[Tensor, Tensor | None]:
        """The streams behind one block: a twin puts something else in its place."""
        return block(h, s, *given)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """``[batch, n, 4]``."""
        spec = self.spec
        if spec.given == "picture":
            h = self.embed(x).flatten(2).transpose(1, 2)
            b, _, a, w = x.shape
            x = x.reshape(b, 2, a // 2, 2, w // 2, 2)[..., 0].permute(0, 2, 4, 1, 3).reshape(b, -1, 4)
        else:
            h = self.embed(x)
        h = h + self.positions
        c, text = self._condition(x, t, y)
        if spec.registers:
            h = torch.cat([self.registers.expand(h.shape[0], -1, -1), h], 1)
        if spec.time_token:
            h = torch.cat([c["sample"][:, None].to(h.dtype), h], 1)
        if text is not None and spec.text in ("before", "after"):
            h = torch.cat([text, h] if spec.text == "before" else [h, text], 1)
        s = text if spec.text == "joint" else None
        h = self.place.lay(h)
        if spec.streams > 1:
            h = h.unsqueeze(2).expand(-1, -1, spec.streams, -1)
        streams: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            streams.append(h)
            earlier = streams[max(0, len(self.blocks) - 2 - i)] if i else h
            h, s = self.run_block(i, block, h, s, (earlier, c, text))
        h = self.place.flat(h.sum(2) if spec.streams > 1 else h)
        h = h[:, int(spec.time_token) :][:, : spec.tokens] if spec.text == "after" else h[:, self.place.extra :]
        return self.head(self.norm(h))


Made = TypeVar("Made", bound=Transformer)


def build(spec: Spec, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a description, in eval mode."""
    return made(Transformer(spec), dtype)


def made(model: Made, dtype: torch.dtype | None = None) -> Made:
    """The model with weights large enough that every branch matters; eval mode."""
    spec = model.spec
    generator = torch.Generator().manual_seed(spec.seed)
    for name, parameter in model.named_parameters():
        fan = parameter.shape[-1] if parameter.dim() > 1 else 4
        draw = torch.randn(parameter.shape, generator=generator)
        parameter.data = draw * (1.2 * min(1.0, fan**-0.5)) if "embed" not in name else draw * 0.7
    return model.eval().to(getattr(torch, spec.dtype) if dtype is None else dtype)


def inputs(spec: Spec, steps: int, constant: bool, dtype: torch.dtype | None = None) -> list[tuple[Tensor, ...]]:
    """What each call of a run is given: the same every time, or a sampling's changing latents and falling times."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    dtype = getattr(torch, spec.dtype) if dtype is None else dtype
    b = spec.batch
    shape = (b, 2, 2 * spec.height, 2 * spec.width) if spec.given == "picture" else (b, spec.tokens, 4)
    x = torch.randn(shape, generator=generator)
    y = torch.randn(b, spec.words, 6, generator=generator).to(dtype) if spec.text else torch.arange(b) % 11
    times = {"b": (b,), "b1": (b, 1), "scalar": ()}[spec.time]
    calls: list[tuple[Tensor, ...]] = []
    for i in range(steps):
        now = 900.0 if constant else 900.0 - 90 * i
        calls.append((x.to(dtype), torch.full(times, now).to(dtype), y if spec.given_text == "same" else y.clone()))
        if not constant:
            x = 0.8 * x + 0.6 * torch.randn(shape, generator=generator)
            if spec.given_text in ("changed", "in_place") and spec.text:  # other labels would be another run
                y = y * 0.9 + 0.1
    return calls
