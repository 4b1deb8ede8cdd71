"""Fused attention."""

from dataclasses import replace
from random import Random
from typing import Any

import torch

from toca_compile.ir.calls import Call
from toca_compile.ir.spec import AxisSpec, einsum
from toca_compile.rules.registry import Args, Work, register
from toca_compile.rules.samples import sizes

aten = torch.ops.aten


def _attention(rng: Random) -> Args:
    """Plain, masked, causal; with heads that share keys, and with samples that do."""
    b, h, q, k, d = sizes(rng, 5)
    causal, grouped = rng.random() < 0.3, rng.random() < 0.3
    if causal and rng.random() < 0.5:
        k = q
    heads_of_keys = rng.choice([h, 1, 2]) if grouped else h
    h = h * heads_of_keys if grouped and h % heads_of_keys else h
    lead, lead_of_keys = ([b, h], [b, heads_of_keys]) if grouped or rng.random() < 0.8 else ([h], [h])
    args: list[Any] = [torch.randn(*lead, q, d), torch.randn(*lead_of_keys, k, d), torch.randn(*lead_of_keys, k, d)]
    if not grouped and rng.random() < 0.3:
        one = rng.randint(0, 2)
        args[one] = args[one][:1]
    if causal:
        args += [None, 0.0, True]
    elif rng.random() < 0.5:
        mask = torch.randn([1 if rng.random() < 0.3 else s for s in [*lead, q, k]][rng.randint(0, len(lead)) :])
        args.append(mask if rng.random() < 0.7 else mask > -1)
    return tuple(args), {"enable_gqa": True} if grouped else {}


@register(aten.scaled_dot_product_attention.default, _attention, work=Work.ATTENTION)
def attention(call: Call) -> AxisSpec:
    """Every query reads all keys and values; queries do not read each other.

    A causal mask ties a query to its place among the keys, so its axis is then mixed. With grouped heads
    (``enable_gqa``) the heads of keys and values are a coarser index space, and a query's head has its place in it.
    Where weights are dropped at random, what is drawn depends on all sizes.
    """
    heads, heads_of_keys = (s[-3] if len(s) > 2 else 1 for s in call.operands[:2])
    grouped = call.kwargs.get("enable_gqa", False) and heads_of_keys not in (1, heads)
    q, h, g = "q!" if call.arg(5, "is_causal", False) else "q", "h!" if grouped else "h", "g" if grouped else "h"
    terms = [f"... {h} {q} d", f"... {g} k d", f"... {g} k e"]
    mask = call.arg(3, "attn_mask")
    if mask is not None:
        rank = len(mask.shape)
        terms.append("... h q k" if rank > 3 else " ".join(["h", "q", "k"][3 - rank :]))
    spec = einsum(",".join(terms) + "-> ... h q e", call.operands, call.results)
    if q == "q!":
        spec = replace(spec, because={"q": "is causal by is_causal=True, not by a mask, and counts the queries"})
    return replace(spec, mixed=frozenset(spec.sizes)) if call.arg(4, "dropout_p", 0.0) else spec
