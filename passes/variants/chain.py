"""Chain: the segments of a step that computes no branch are one graph.

Where a step takes every branch from the cache, or forecasts it, what is left of a block is a line or two. One after the
other in one graph, with what stands before and behind them, they are one loop over the tokens for the compiler, and one
call for the host::

    block:  x = x + g₁·C₁; x = x + g₂·C₂   (×28, 28 calls)     ⇒      x = x + g₁·C₁ + … + g₅₆·C₅₆

What several of them make alike of the same values (an embedding of the time in each block) is made once; of what the
end cuts off, nothing is made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from toca_compile.ir.graph import is_mutable
from toca_compile.ir.program import Chain, Variant
from toca_compile.passes.variants.emit import Builder
from toca_compile.passes.variants.pull_slices import pull_slices


def chained(chain: Chain, variants: Sequence[Variant]) -> Variant:
    """The variants of a chain's parts as one, in which sites whose numbers are the same share them."""
    builder = Builder(chain.inputs)
    told: dict[Any, fx.Node] = {}  # calls of the values alone, which no write to a buffer can change
    alike = set(builder.env.values())
    first = 0
    for part, variant in zip(chain.parts, variants, strict=True):
        *nodes, end = variant.module.graph.nodes
        inside: dict[fx.Node, fx.Node] = {}
        for i, node in zip(variant.values, nodes, strict=False):
            inside[node] = builder.env[part.inputs[i]]
        for slot, node in zip(variant.slots, nodes[len(variant.values) :], strict=False):
            position = first + slot.position
            inside[node] = builder.slot(slot.kind, position if slot.is_buffer else chain.leads[position], slot.index)
            inside[node].meta.update(node.meta)
        for node in nodes[len(variant.values) + len(variant.slots) :]:
            key = _key(node, inside) if alike.issuperset(inside[i] for i in node.all_input_nodes) else None
            inside[node] = told[key] if key in told else builder.graph.node_copy(node, inside.__getitem__)
            if key is not None:
                alike.add(told.setdefault(key, inside[node]))
        made: Sequence[fx.Node] = end.args[0]
        builder.env |= {n: inside[value] for n, value in zip(part.outputs, made, strict=True)}
        first += len(part.sites)
    results = [builder.env[n] for n in chain.outputs]
    pull_slices(builder.graph, results)
    return builder.finish(results)


def _key(node: fx.Node, inside: Mapping[fx.Node, fx.Node]) -> Any:
    """What tells a call from others by what it makes; None of one that makes something else each time, or changes what
    it is given, or that the graph hands out, whose receiver may write to it."""
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if is_mutable(node) or random or any(user.op == "output" for user in node.users):
        return None
    own = fx.node.map_arg((node.args, node.kwargs), inside.__getitem__)
    return node.op, node.target, repr(own)
