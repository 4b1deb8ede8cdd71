"""Fused attention."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import fx
from torch.nn.attention.flex_attention import BlockMask

from toca_compile.errors import RuleError
from toca_compile.ir.calls import Call
from toca_compile.ir.spec import AxisSpec, einsum
from toca_compile.ops.flex import ALL, KNOWN, named
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

    A causal mask ties a query to its place among the keys: it must be told that of some of them. With grouped heads
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
        why = {"q": "is causal by is_causal=True, not by a mask, and counts the queries"}
        spec = replace(spec, because=why, placed=frozenset("q"))
    return replace(spec, mixed=frozenset(spec.sizes), placed=frozenset()) if call.arg(4, "dropout_p", 0.0) else spec


def _summed(rng: Random) -> Args:
    b, h, q, k, d = sizes(rng, 5)
    return tuple(torch.randn(b, h, n, d) for n in (q, k, k)), {}


def with_log_sum(dropout: int) -> Callable[[Call], AxisSpec]:
    """The rule of an attention that tells the logarithm of each query's sum too, by which those over parts of the keys
    are joined (ring attention). Its values must be as wide as its keys, and so no part of their features. What else it
    tells is for a backward pass. ``dropout``: where that stands among its arguments, and behind it if it is causal."""

    def rule(call: Call) -> AxisSpec:
        if call.arg(dropout, "dropout_p", 0.0) or call.arg(dropout + 1, "is_causal", False) or len(call.operands) > 3:
            raise RuleError("an attention with dropout, causal or masked")
        _, total, *others = call.results
        told = [" ".join(f"x{i}_{d}" for d in range(len(shape))) for i, shape in enumerate(others)]
        results = ["b h q o", "b h q" + " one" * (len(total) - 3), *told]
        return einsum(f"b h q d, b h k d, b h k e -> {','.join(results)}", call.operands, call.results)

    return rule


register(aten._scaled_dot_product_flash_attention_for_cpu.default, _summed, work=Work.ATTENTION)(with_log_sum(3))
register(aten._scaled_dot_product_flash_attention.default, _summed, work=Work.ATTENTION)(with_log_sum(3))
register(aten._scaled_dot_product_cudnn_attention.default, _summed, work=Work.ATTENTION)(with_log_sum(5))


def _flexed(rng: Random) -> Args:
    """Every pair of a query and a key, those in order, or those of one sample or head otherwise than of the next."""
    b, h, q, k, d = sizes(rng, 5)
    of = rng.choice(["all", "causal", "by sample", "by head"])
    index = {"all": "k * 0", "causal": "k - q", "by sample": "k - b", "by head": "k - h"}[of]
    score, mask = fx.Graph(), fx.Graph()
    first = score.placeholder("score")
    for letter in "bhqk":
        score.placeholder(letter)
    score.output(first)
    places = {letter: mask.placeholder(letter) for letter in "bhqk"}
    a, sign, c = index.split()
    other = mask.call_function(aten.mul.Tensor, (places[a], 0)) if sign == "*" else places[c]
    mask.output(mask.call_function(aten.ge.Tensor, (other, places[a] if sign == "-" else other)))
    ones, none = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    mod = fx.GraphModule({}, mask)
    blocks = BlockMask.from_kv_blocks(ones, none, BLOCK_SIZE=ALL, mask_mod=mod, seq_lengths=(q, k)).as_tuple()
    others, name = named([fx.GraphModule({}, score), blocks, d**-0.5, {"BACKEND": "AUTO"}, (), ()])
    return (torch.randn(b, h, q, d), torch.randn(b, h, k, d), torch.randn(b, h, k, d), others, name), {}


@register(torch.ops.toca.flex_attention.default, _flexed, work=Work.ATTENTION)
def flexed(call: Call) -> AxisSpec:
    """Every query reads those keys that functions of indices leave: what such a function reads the index of is mixed,
    and queries whose blocks of keys are chosen for many of them at once."""
    how = KNOWN[call.args[4]]
    (_, h, *_), (_, g, *_), *_ = call.operands
    mixed = {name for name in "bhq" if name in how.reads} | ({"h"} if g not in (1, h) else set())
    mixed |= set() if how.whole else {"q"}
    heads = "h" if g in (1, h) else "g"
    terms = ["b h q d", f"b {heads} k d", f"b {heads} k e"]
    for i, x in enumerate(call.operands[3:]):
        lead = ["b", "h"] if i < how.blocks else []
        terms.append(" ".join([*lead, *(f"o{i}_{d}" for d in range(len(lead), len(x)))]))
    spec = einsum(",".join(terms) + "-> b h q e", call.operands, call.results)
    why = "tells its queries apart by their places, or in blocks"
    placed = {"q"} if how.whole or how.reads & {"q", "k"} else set()  # a block mask leaves out what the function does
    return replace(spec, mixed=frozenset(mixed & set(spec.sizes)), placed=frozenset(placed & mixed), because={"q": why})
