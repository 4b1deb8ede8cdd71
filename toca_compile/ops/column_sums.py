"""The attention score on a GPU: column sums of the map by one Triton kernel, which makes no map.

An attention kernel knows each row's log-sum-exp, so that a second pass over queries and keys has the map's columns at
once: half of an attention's products, no memory but the sums. Compiled code alone gets it (``lowerings/fused_scores``).
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from toca_compile import kernels
from toca_compile.ops.registry import op
from toca_compile.ops.scores import attention_received

aten = torch.ops.aten

_TILE = 64  # queries, and keys, at a time
_LARGEST = 256  # features of a head that fit a tile


@op(
    "attention_and_received(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float? scale, "
    "int stride) -> (Tensor, Tensor)"
)
def attention_and_received(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, stride: int
) -> tuple[Tensor, Tensor]:
    """An attention, and what each of its keys receives by ``attention_received``.

    Args:
        query, key, value: as ``scaled_dot_product_attention`` takes them, of as many heads.
    """
    if not _is_flash(query, key, value, mask, causal, scale):
        attention = scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale)
        return attention, attention_received(query, key, mask, scale, causal, stride)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attention, total, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, scale=scale)
    rows = slice(0, query.shape[-2], stride)
    return attention, column_sums(query[..., rows, :], key, total[..., rows], scale)


def _is_flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> bool:
    """Whether torch takes the kernel that tells each row's log-sum-exp, and ours can follow it."""
    plain = mask is None and not causal and query.dim() == 4 and key.shape[-3] == query.shape[-3]
    sizes = query.shape[-2], key.shape[-2], query.shape[-1]
    if not kernels.run_on(query.device) or not plain or not all(isinstance(size, int) for size in sizes):
        return False
    if query.shape[-1] % 8 or query.shape[-1] > _LARGEST:
        return False
    return bool(torch._fused_sdp_choice(query, key, value, scale=scale) == SDPBackend.FLASH_ATTENTION.value)


def column_sums(query: Tensor, key: Tensor, total: Tensor, scale: float) -> Tensor:
    """Σ over queries of exp(scale·q·k − total).

    Args:
        query: ``[batch, heads, queries, d]``.
        key: ``[batch, heads, keys, d]``.
        total: each query's log-sum-exp over the keys, float32 ``[batch, heads, queries]``.

    Returns:
        float32 ``[batch, heads, keys]``.
    """
    from toca_compile.kernels.column_sums import column_sums_kernel

    (batch, heads, queries, size), keys = query.shape, key.shape[-2]
    # The kernel steps through rows and takes features side by side.
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=query.device)
    torch.library.wrap_triton(column_sums_kernel)[(-(-keys // _TILE), batch * heads)](
        query, key, total, out, *query.stride()[:3], *key.stride()[:3], *total.stride(), heads, queries, keys,
        SCALE=scale, SIZE=size, WIDTH=max(16, 1 << (size - 1).bit_length()), TILE=_TILE,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return out
