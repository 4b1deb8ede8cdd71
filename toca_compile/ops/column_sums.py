"""The attention score by kernels: column sums of a map that is not kept. Compiled code alone gets them
(``lowerings/fused_scores``).

On a GPU an attention kernel knows each row's log-sum-exp, so that a second pass over queries and keys, in Triton, has
the map's columns at once: half of an attention's products, no memory but the sums. On a CPU a block of whole rows of
the map fits the cache of a core, where an attention in C++ adds it up on the way.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from toca_compile import kernels
from toca_compile.kernels.attention import attention, load, runs_on
from toca_compile.ops.registry import op
from toca_compile.ops.scores import attention_received

aten = torch.ops.aten
toca = torch.ops.toca

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
    # Torch lets samples and heads be one for all; kernels are given each.
    plain = mask is None and not causal and query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if plain and _is_by_rows(query, key, value):
        load()  # what has to be compiled is, before the first step
        return toca.attention_by_rows(query, key, value, factor, stride)
    if plain and _is_flash(query, key, value, scale):
        out, total, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, scale=factor)
        rows = slice(0, query.shape[-2], stride)
        return out, column_sums(query[..., rows, :], key, total[..., rows], factor)
    out = scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale)
    return out, attention_received(query, key, mask, scale, causal, stride)


def _fake_by_rows(query: Tensor, key: Tensor, value: Tensor, scale: float, stride: int) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, key.shape[-2])


@op(
    "attention_by_rows(Tensor query, Tensor key, Tensor value, float scale, int stride) -> (Tensor, Tensor)",
    fake=_fake_by_rows,
)
def attention_by_rows(query: Tensor, key: Tensor, value: Tensor, scale: float, stride: int) -> tuple[Tensor, Tensor]:
    """``kernels.attention.attention``."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return attention(query, key, value, scale, stride)


def _is_by_rows(*tensors: Tensor) -> bool:
    """Whether the kernel that makes whole rows takes them."""
    return all(runs_on(x.device) and x.dtype == torch.float32 and 0 not in x.shape for x in tensors)


def _is_flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> bool:
    """Whether torch takes the kernel that tells each row's log-sum-exp, and ours can follow it."""
    sizes = query.shape[-2], key.shape[-2], query.shape[-1]
    if not kernels.run_on(query.device) or not all(isinstance(size, int) for size in sizes):
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
