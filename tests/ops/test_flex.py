"""Flex attention under a name."""

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from toca_compile.ops import flex


def places() -> list[Tensor]:
    """The indices of one score."""
    return [torch.tensor(0) for _ in range(4)]


def call(far: int) -> tuple[list[Tensor], str]:
    """One with a table that its mask reads, the same in every way but for a constant."""
    from torch.nn.attention.flex_attention import create_block_mask

    table = torch.arange(8)

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor, frames: Tensor) -> Tensor:
        return frames[q] - frames[k] < far

    blocks: Any = create_block_mask(lambda b, h, q, k: mask(b, h, q, k, table), None, None, 8, 8, device="cpu")
    score: Any = make_fx(lambda s, b, h, q, k: s * 1)(torch.tensor(0.0), *places())
    traced: Any = make_fx(lambda b, h, q, k, t: t.select(0, 0) + far > q - k)(*places(), table)
    return flex.named([score, (*blocks.as_tuple()[:-1], traced), 0.5, {"BACKEND": "AUTO"}, (), (table,)])


def test_a_name_tells_what_the_call_does() -> None:
    tensors, name = call(3)
    assert call(3)[1] == name != call(4)[1]
    known = flex.KNOWN[name]
    assert (set(known.reads), known.whole, known.blocks) == ({"q", "k"}, False, len(tensors) - 1)


def test_some_queries_read_what_they_read_among_all() -> None:
    others, name = call(3)
    q, k, v = torch.randn(2, 2, 8, 16), torch.randn(2, 1, 8, 16), torch.randn(2, 1, 8, 16)
    whole = torch.ops.toca.flex_attention(q, k, v, others, name)
    index = torch.tensor([[7, 0, 3], [1, 1, 6]])
    rows = torch.stack([q[b, :, index[b]] for b in range(2)])
    made = torch.ops.toca.flex_attention_rows(rows, k, v, others, name, index)
    torch.testing.assert_close(made, torch.stack([whole[b, :, index[b]] for b in range(2)]))
