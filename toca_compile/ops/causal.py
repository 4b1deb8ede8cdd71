"""Attention that counts its queries, for some of them."""

import torch
from torch import Tensor

from toca_compile.ops.registry import op


@op("causal_attention(Tensor query, Tensor key, Tensor value, float? scale, bool enable_gqa, Tensor index) -> Tensor")
def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, enable_gqa: bool, index: Tensor
) -> Tensor:
    """Queries at the places ``index`` (int64 ``[batch, k]``, or ``[1, k]``); each reads the keys up to its own.

    Args:
        query: ``[batch, …, k, d]``, or with one sample and any leading dimensions.
        key, value: ``[batch, …, keys, d]``.
    """
    keys = torch.arange(key.shape[-2], device=key.device)
    allowed = index[..., None] >= keys
    lead = [index.shape[0], *[1] * (query.dim() - 3)] if query.dim() > 2 else []
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed.reshape(*lead, *allowed.shape[-2:]), scale=scale, enable_gqa=enable_gqa
    )
