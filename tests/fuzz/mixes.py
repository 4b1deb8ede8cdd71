"""What a branch may do to ``[batch, tokens, channels]`` beside attention and linear layers: some of it token by token,
some across tokens, channels or the batch. Each keeps the shape, and only the model knows which is which."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Apply = Callable[["Mix", Tensor], Tensor]


class Mix(nn.Module):
    """One op of the table with what it may need, for ``tokens`` on a ``grid`` (None where they are no picture)."""

    def __init__(self, name: str, tokens: int, channels: int, grid: tuple[int, int, int] | None, seed: int) -> None:
        super().__init__()
        self.name, self.tokens, self.grid = name, tokens, grid
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "vector": (channels,), "matrix": (channels, channels), "positions": (tokens, channels),
            "square": (tokens, tokens), "each": (tokens, channels, channels), "slope": (1,), "down": (channels, 2),
            "up": (2, channels), "kernel": (channels, 1, 3), "kernel2d": (channels, 1, 3, 3),
        }  # fmt: skip
        needs, self.apply_to = TABLE[name]
        for need in needs:
            if need == "order":
                self.register_buffer("order", torch.randperm(tokens, generator=generator))
            elif need == "chosen":
                self.register_buffer("chosen", torch.rand(tokens, generator=generator) < 0.4)
            else:
                setattr(self, need, nn.Parameter(torch.zeros(shapes[need])))

    def forward(self, h: Tensor) -> Tensor:
        """The same shape."""
        return self.apply_to(self, h)


def _in_place(m: Mix, h: Tensor) -> Tensor:
    h = h * 1.0
    h.mul_(m.vector)
    return h.add_(0.1)


def _assign(m: Mix, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = h[:, -1] * 0.5
    return h


def _assign_channel(m: Mix, h: Tensor) -> Tensor:
    h = h.clone()
    h[..., 0] = h[..., -1] * 0.5
    return h


def _pairs(m: Mix, h: Tensor) -> Tensor:
    b, n, c = h.shape
    return h.reshape(b, n // 2, 2, c).flip(2).reshape(b, n, c) if n % 2 == 0 else h.flip(1)


def _on_grid(op: Callable[[Mix, Tensor], Tensor]) -> Apply:
    """On ``[batch · frames, channels, height, width]``, or on one row of pixels where there is no picture."""

    def apply(m: Mix, h: Tensor) -> Tensor:
        f, a, w = m.grid or (1, 1, m.tokens)
        b, n, c = h.shape
        picture = h.reshape(b * f, a, w, c).permute(0, 3, 1, 2)
        return op(m, picture).permute(0, 2, 3, 1).reshape(b, n, c)

    return apply


def _pooled(m: Mix, h: Tensor) -> Tensor:
    small = F.adaptive_avg_pool1d(h.transpose(1, 2), 3)
    return h + F.interpolate(small, size=h.shape[1]).transpose(1, 2)


def _top(m: Mix, h: Tensor) -> Tensor:
    score = (h * m.vector).sum(-1)
    best = score.topk(4, dim=1).values  # between the third and the fourth: no token lies on the edge
    return h * (score > best[:, 2:].mean(1, keepdim=True)).to(h.dtype)[..., None]


def _complex(m: Mix, h: Tensor) -> Tensor:
    z = torch.view_as_complex(h.float().reshape(*h.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(z * z.conj().roll(1, -1)).flatten(-2).to(h.dtype)


def _put(m: Mix, h: Tensor) -> Tensor:
    return torch.zeros_like(h).index_add(1, m.order, h)


def _attends(m: Mix, h: Tensor) -> Tensor:
    return torch.softmax(h @ h.transpose(1, 2) * 0.3, -1) @ h


def _strided(m: Mix, h: Tensor) -> Tensor:
    return h[:, ::2].repeat_interleave(2, 1)[:, : h.shape[1]]


def _misread(m: Mix, h: Tensor) -> Tensor:
    """Tokens and channels confused by a reshape, as in a wrongly ported model."""
    b, n, c = h.shape
    return h.reshape(b, c, n).transpose(1, 2) * 1.0


TABLE: dict[str, tuple[tuple[str, ...], Apply]] = {
    # token by token
    "silu": ((), lambda m, h: F.silu(h)),
    "scale": (("vector",), lambda m, h: h * m.vector),
    "positions": (("positions",), lambda m, h: h + m.positions),
    "by_position": (("positions",), lambda m, h: h * m.positions[None]),
    "each_token": (("each",), lambda m, h: torch.einsum("bnc,ncd->bnd", h, m.each)),
    "each_bmm": (("each",), lambda m, h: torch.bmm(h.transpose(0, 1), m.each).transpose(0, 1)),
    "masked": (("chosen",), lambda m, h: h.masked_fill(m.chosen[None, :, None], 0.3)),
    "where": (("chosen", "vector"), lambda m, h: torch.where(m.chosen[:, None], h, h * m.vector)),
    "clamp": ((), lambda m, h: h.clamp(-0.5, 0.5)),
    "prelu": (("vector",), lambda m, h: F.prelu(h.transpose(1, 2), m.vector).transpose(1, 2)),
    "prelu_one": (("slope",), lambda m, h: F.prelu(h, m.slope)),
    "prelu_tokens": (("slope",), lambda m, h: F.prelu(h, m.slope.expand(h.shape[1]))),
    "adapter": (("down", "up"), lambda m, h: h + F.silu(h @ m.down) @ m.up),
    "l2": ((), lambda m, h: F.normalize(h, dim=-1)),
    "softmax_channels": ((), lambda m, h: h.softmax(-1)),
    "cumsum_channels": ((), lambda m, h: h.cumsum(-1) * 0.3),
    "flip_channels": ((), lambda m, h: h.flip(-1)),
    "roll_channels": ((), lambda m, h: h.roll(1, -1)),
    "sort_channels": ((), lambda m, h: h.sort(-1).values),
    "top_channels": ((), lambda m, h: h * (h >= h.topk(2, -1).values[..., -1:])),
    "pad_channels": ((), lambda m, h: F.pad(h, (1, -1))),
    "in_place": (("vector",), _in_place),
    "assign_channel": ((), _assign_channel),
    "addcmul": (("vector",), lambda m, h: torch.addcmul(h, h, m.vector, value=0.5)),
    "lerp": (("vector",), lambda m, h: torch.lerp(h, h * h, m.vector.to(h.dtype))),
    "rounded": ((), lambda m, h: h.to(torch.bfloat16).to(h.dtype)),
    "complex": ((), _complex),
    "groups": ((), lambda m, h: F.group_norm(h.reshape(-1, h.shape[-1]), 2).reshape(h.shape)),
    "outer": (("vector",), lambda m, h: torch.einsum("bnc,d->bncd", h, m.vector).mean(-1)),
    "kron": (("matrix",), lambda m, h: F.linear(h.unsqueeze(2), m.matrix).squeeze(2)),
    "expand": (("vector",), lambda m, h: (h[:, :, None] * m.vector).expand(-1, -1, 2, -1).sum(2)),
    "halves": ((), lambda m, h: torch.cat(h.chunk(2, -1)[::-1], -1)),
    "stacked": ((), lambda m, h: torch.stack((h, h.flip(-1)), 1).mean(1)),
    "tiled": ((), lambda m, h: h.repeat(1, 1, 2)[..., 1 : 1 + h.shape[-1]]),
    "where_sign": ((), lambda m, h: torch.where(h > 0, h, h.mean(-1, keepdim=True))),
    "batch_first_view": ((), lambda m, h: h.flatten(0, 1).view(h.shape) * 0.5),
    # across tokens
    "roll": ((), lambda m, h: h.roll(1, 1)),
    "roll_flat": ((), lambda m, h: h.roll(h.shape[-1])),
    "roll_picture": ((), _on_grid(lambda m, p: p.roll((1, 1), (2, 3)))),
    "flip": ((), lambda m, h: h.flip(1)),
    "cumsum": ((), lambda m, h: h.cumsum(1) * 0.3),
    "cummax": ((), lambda m, h: h.cummax(1).values),
    "centre": ((), lambda m, h: h - h.mean(1, keepdim=True)),
    "squeeze": (("matrix",), lambda m, h: h * torch.sigmoid(h.mean(1) @ m.matrix)[:, None]),
    "largest": ((), lambda m, h: h + h.amax(1, keepdim=True)),
    "softmax": ((), lambda m, h: h.softmax(1) * h.shape[1]),
    "sort": ((), lambda m, h: h.sort(1).values),
    "gather": (("order",), lambda m, h: h[:, m.order]),
    "select": (("order",), lambda m, h: h.index_select(1, m.order)),
    "take": (("order",), lambda m, h: h.gather(1, m.order[None, :, None].expand(h.shape))),
    "put": (("order",), _put),
    "top": (("vector",), _top),
    "conv": (("kernel",), lambda m, h: F.conv1d(h.transpose(1, 2), m.kernel, padding=1, groups=h.shape[2]).transpose(1, 2)),
    "conv2d": (("kernel2d",), _on_grid(lambda m, p: F.conv2d(p, m.kernel2d, padding=1, groups=p.shape[1]))),
    "shift": ((), lambda m, h: F.pad(h, (0, 0, 1, -1))),
    "shift_circular": ((), lambda m, h: F.pad(h.transpose(1, 2), (1, -1), mode="constant", value=0.5).transpose(1, 2)),
    "replicate": ((), lambda m, h: F.pad(h.transpose(1, 2), (1, 1), mode="replicate").transpose(1, 2)[:, 2:]),
    "circular": ((), lambda m, h: F.pad(h.transpose(1, 2), (1, 0), mode="circular").transpose(1, 2)[:, :-1]),
    "before": ((), lambda m, h: torch.cat([h[:, :1], h[:, :-1]], 1)),
    "strided": ((), _strided),
    "swap": ((), lambda m, h: torch.cat([h[:, h.shape[1] // 2 :], h[:, : h.shape[1] // 2]], 1)),
    "tokens": (("square",), lambda m, h: F.linear(h.transpose(1, 2), m.square).transpose(1, 2)),
    "tokens_matmul": (("square",), lambda m, h: m.square @ h),
    "lower": (("square",), lambda m, h: m.square.tril() @ h),
    "token_norm": ((), lambda m, h: F.layer_norm(h.transpose(1, 2), h.shape[1:2]).transpose(1, 2)),
    "instance": ((), lambda m, h: F.instance_norm(h.transpose(1, 2)).transpose(1, 2)),
    "grouped": ((), lambda m, h: F.group_norm(h.transpose(1, 2), 2).transpose(1, 2)),
    "whole_norm": ((), lambda m, h: F.layer_norm(h, h.shape[1:])),
    "variance": ((), lambda m, h: h / (1 + h.var(1, keepdim=True))),
    "length": ((), lambda m, h: h / (1 + h.norm(dim=1, keepdim=True))),
    "pairs": ((), _pairs),
    "assign": ((), _assign),
    "pooled": ((), _pooled),
    "unbound": ((), lambda m, h: torch.stack(h.unbind(1)[::-1], 1)),
    "spectrum": ((), lambda m, h: torch.fft.fft(h.float(), dim=1).real.to(h.dtype) * 0.3),
    "attends": ((), _attends),
    "misread": ((), _misread),
    "product": ((), lambda m, h: h * h[:, -1:]),
    "difference": ((), lambda m, h: torch.diff(h, dim=1, prepend=h[:, :1])),
    "all_mean": ((), lambda m, h: h - h.mean()),
    "median": ((), lambda m, h: h - h.median(1, keepdim=True).values),
    "max_pool": ((), lambda m, h: F.max_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2)),
    "unfolded": ((), _on_grid(lambda m, p: F.unfold(p, 3, padding=1).reshape(p.shape[0], p.shape[1], 9, *p.shape[2:]).mean(2))),
    "transposed": ((), lambda m, h: h.transpose(0, 1).reshape(h.shape)),
    # across the batch
    "batch_mean": ((), lambda m, h: h - h.mean(0, keepdim=True)),
    "batch_roll": ((), lambda m, h: h.roll(1, 0)),
    "batch_flip": ((), lambda m, h: h.flip(0)),
    "batch_first": ((), lambda m, h: h + h[:1]),
    "batch_softmax": ((), lambda m, h: h.softmax(0)),
}  # fmt: skip

TOKENWISE = frozenset(list(TABLE)[: list(TABLE).index("roll")])
