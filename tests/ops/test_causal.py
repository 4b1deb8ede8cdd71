"""Causal attention for some of its queries."""

import pytest
import torch
import torch.nn.functional as F

import toca_compile.ops  # noqa: F401


@pytest.mark.parametrize("keys", [9, 12])
def test_some_queries_read_what_they_read_among_all(keys: int) -> None:
    q, k, v = torch.randn(2, 4, 9, 5), torch.randn(2, 2, keys, 5), torch.randn(2, 2, keys, 5)
    index = torch.tensor([[8, 0, 3], [1, 1, 7]])
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    rows = torch.stack([q[b, :, index[b]] for b in range(2)])
    made = torch.ops.toca.causal_attention(rows, k, v, 0.3, True, index)
    torch.testing.assert_close(made, torch.stack([whole[b, :, index[b]] for b in range(2)]))
    shared = torch.ops.toca.causal_attention(q[:, :, [8, 3]], k, v, 0.3, True, torch.tensor([[8, 3]]))
    torch.testing.assert_close(shared, whole[:, :, [8, 3]])
