"""Samples: does a graph compute each sample of a batch on its own?

Where it does, requests that know nothing of one another may share a call of the model: a row of each result needs the
same row of the batched inputs alone. The proof goes through every call once. Along the samples each must carry: what
reduces over them, tells them apart by their place, takes some of them or holds one against another stops it, and so
does an op of which nothing is known.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from toca_compile.ir.factors import Factor, Product
from toca_compile.ir.graph import operand_nodes
from toca_compile.ir.program import Program
from toca_compile.ir.types import AxisTypes, Type
from toca_compile.passes.proof.follow import Blocked

aten = torch.ops.aten

# Along a dimension that no operand has, these are the same whatever the place is; an arange, say, is not.
_EQUAL = {
    getattr(aten, name)
    for name in (
        "full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full", "expand",
        "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile",
    )
}  # fmt: skip


def sample_factor(program: Program, batched: Sequence[fx.Node]) -> Factor | Blocked:
    """The factor that numbers samples, if the graph computes each on its own; else the call that forbids it.

    Args:
        program: after ``infer_axes``, of more than one sample.
        batched: the inputs whose first dimension numbers samples.
    """
    types = program.types
    assert types is not None
    leads = {types.type_of(node)[0] for node in batched}
    if len(leads) != 1 or len(lead := leads.pop()) != 1:
        return Blocked(batched[0], "is batched otherwise than the other inputs, or regrouped")
    (factor,) = lead
    for node in program.module.graph.nodes:
        why = _blocked(node, factor, types, batched)
        if why is not None:
            return Blocked(node, why)
    return factor


def samples_in(dims: Sequence[Product], factor: Factor, types: AxisTypes) -> tuple[int, int] | None:
    """Where the samples lie in a value with such dimensions: in which, and how many places stand for one sample's next
    neighbour before it (the size of what is major to them there). None where they do not lie in it."""
    found = [(d, dim.index(factor)) for d, dim in enumerate(dims) if factor in dim]
    if len(found) != 1:
        return None
    d, at = found[0]
    return d, types.factors.size(dims[d][:at])


def _blocked(node: fx.Node, factor: Factor, types: AxisTypes, batched: Sequence[fx.Node]) -> str | None:
    if node.op in ("placeholder", "get_attr"):
        there = [_has(dims, factor, types) for dims in _types_of(node, types)]
        if node in batched:
            dims = types.type_of(node)
            return None if not _has(dims[1:], factor, types) else "has the samples in two dimensions"
        return "is one for all requests and has a row for each sample" if any(there) else None
    if node.op == "output":
        for value in node.all_input_nodes:
            for dims in _types_of(value, types):
                if _has(dims[1:], factor, types) or (dims and _has(dims[:1], factor, types) and dims[0] != (factor,)):
                    return "hands out samples in another dimension than the first"
        return None
    if _is_item(node):
        return None
    made = any(_has(dims, factor, types) for dims in _types_of(node, types))
    read = any(_has(dims, factor, types) for n in operand_nodes(node) for dims in _types_of(n, types))
    if not made and not read:
        return None
    spec = types.specs.get(node)
    if not read:
        return None if _packet(node) in _EQUAL else "tells the samples apart by their place"
    if spec is None:
        return types.unknown.get(node, "has no rule")
    labels = [x for x in types.labels[node] if _has((types.label(node, x),), factor, types)]
    if len(labels) != 1:
        return "holds one sample against another"
    (label,) = labels
    if label in spec.mixed or label in spec.placed or label in spec.concat or label in spec.windows:
        return spec.because.get(label, "mixes the samples")
    if not all(any(label in dim for dim in dims) for dims in spec.results):
        return "reduces over the samples, or takes some of them"
    return None


def _has(dims: Sequence[Product], factor: Factor, types: AxisTypes) -> bool:
    return any(factor in types.factors.atoms(dim) for dim in dims)


def _types_of(node: fx.Node, types: AxisTypes) -> tuple[Type, ...]:
    return tuple(types.type_of(node, i) for i in range(len(types.results.get(node, ()))))


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"
