"""Fused attention."""

from random import Random

import torch

from toca_compile.ir.calls import Call
from toca_compile.ir.spec import AxisSpec, einsum
from toca_compile.rules.registry import Args, Work, register

aten = torch.ops.aten


def _attention(rng: Random) -> Args:
    b, h, d = rng.randint(1, 2), rng.randint(1, 3), 4
    q, k = rng.randint(2, 5), rng.randint(2, 5)
    return (torch.randn(b, h, q, d), torch.randn(b, h, k, d), torch.randn(b, h, k, d)), {}


def _masked(rng: Random) -> Args:
    q, k = rng.randint(2, 5), rng.randint(2, 5)
    mask = torch.randn(rng.choice([1, 2]), 1, rng.choice([1, q]), k)
    return (torch.randn(2, 3, q, 4), torch.randn(2, 3, k, 4), torch.randn(2, 3, k, 4), mask), {}


def _causal(rng: Random) -> Args:
    n = rng.randint(2, 5)
    return (torch.randn(1, 2, n, 4), torch.randn(1, 2, n, 4), torch.randn(1, 2, n, 4)), {"is_causal": True}


@register(aten.scaled_dot_product_attention.default, _attention, _masked, _causal, work=Work.ATTENTION)
def attention(call: Call) -> AxisSpec:
    """Every query reads all keys and values; queries do not read each other.

    A causal mask ties a query to its place among the keys, so its axis is then mixed. With grouped heads
    (``enable_gqa``) the heads of keys and values are a coarser index space of their own.
    """
    query = "q!" if call.arg(5, "is_causal", False) else "q"
    kv_head = "g" if call.arg(7, "enable_gqa", False) else "h"
    terms = [f"... h {query} d", f"... {kv_head} k d", f"... {kv_head} k e"]
    mask = call.arg(3, "attn_mask")
    if mask is not None:
        rank = len(mask.shape)
        terms.append(
            " ".join(
                (["...", "h", "q", "k"] if rank > 3 else ["h", "q", "k"])[-rank:]
                if rank <= 3
                else ["...", "h", "q", "k"]
            )
        )
    return einsum(",".join(terms) + "-> ... h q e", call.operands, call.results)
