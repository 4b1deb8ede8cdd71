"""Chain: the segments of a step that computes no branch are one graph.

Where a step takes every branch from the cache, or forecasts it, what is left of a block is a line or two. One after the
other in one graph, with what stands before and behind them, they are one loop over the tokens for the compiler, and one
call for the host::

    block:  x = x + g₁·C₁; x = x + g₂·C₂   (×28, 28 calls)     ⇒      x = x + g₁·C₁ + … + g₅₆·C₅₆
"""

from collections.abc import Sequence

from torch import fx

from toca_compile.ir.program import Chain, Variant
from toca_compile.passes.variants.emit import Builder


def chained(chain: Chain, variants: Sequence[Variant]) -> Variant:
    """The variants of a chain's parts as one, in which sites whose numbers are the same share them."""
    builder = Builder(chain.inputs)
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
            inside[node] = builder.graph.node_copy(node, inside.__getitem__)
        made: Sequence[fx.Node] = end.args[0]
        builder.env |= {n: inside[value] for n, value in zip(part.outputs, made, strict=True)}
        first += len(part.sites)
    return builder.finish([builder.env[n] for n in chain.outputs])
