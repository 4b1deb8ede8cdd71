"""FusedScores: an attention and the score that is measured of it become one op, which knows both."""

from operator import getitem
from typing import Any

import torch
from torch import fx

import toca_compile.ops  # noqa: F401  (defines the toca:: ops)

aten = torch.ops.aten
toca = torch.ops.toca


def fuse_scores(graph: fx.Graph) -> None:
    """Join each fused attention of a graph, in place, with the column sums of its map, where both are asked for."""
    attentions = {
        (*given[:2], *given[3:]): (node, given[2])
        for node in graph.nodes
        if node.target is aten.scaled_dot_product_attention.default and (given := _given(node)) is not None
    }
    for node in graph.find_nodes(op="call_function", target=toca.attention_received.default):
        query, key, mask, scale, causal, stride = node.args
        attention, value = attentions.pop((query, key, mask, causal, scale), (None, None))
        if attention is None:
            continue
        with graph.inserting_before(attention):
            both = graph.call_function(
                toca.attention_and_received.default, (query, key, value, mask, causal, scale, stride)
            )
            for i, old in enumerate((attention, node)):
                old.replace_all_uses_with(graph.call_function(getitem, (both, i)))
        graph.erase_node(node)
        graph.erase_node(attention)


def _given(node: fx.Node) -> tuple[Any, ...] | None:
    """Query, key, value, mask, causality and scale of an attention; None where it does more."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict.fromkeys(names) | {"dropout_p": 0.0, "scale": None, "enable_gqa": False}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    if given["dropout_p"] or given["enable_gqa"]:
        return None
    return *(given[name] for name in names[:4]), bool(given["is_causal"]), given["scale"]
