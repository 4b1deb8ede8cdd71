"""Cuts: values that are cut into parts, joined of them again, or written over part by part.

A concatenation of all parts in order is the value that was cut, and what was written over all of a value is the
concatenation of what was written: with one spelling, proofs need follow no other.
"""

import operator
from typing import Any

import torch
from torch import fx

from toca_compile.errors import RuleError
from toca_compile.ir.calls import normal_dims
from toca_compile.ir.graph import operand_nodes
from toca_compile.passes.infer_axes import call_of
from toca_compile.rules.registry import RULES, Work

aten = torch.ops.aten


def whole_of(node: fx.Node) -> fx.Node | None:
    """The value that a slice of all of it is, or a concatenation of its parts in order; what is written over another
    of its kind, or, joined, over all of it part by part; None for any other op."""
    if any(user.op == "output" for user in node.users):  # a result lies in memory as what was written over
        return None
    if node.target is aten.slice_scatter.default:
        return _written(node)
    if node.target is aten.copy.default:
        before, after = (n.meta["val"] for n in operand_nodes(node))
        alike = (before.shape, before.dtype, before.device) == (after.shape, after.dtype, after.device)
        return operand_nodes(node)[1] if alike else None
    parts = operand_nodes(node) if node.target is aten.cat.default else [node]
    cuts = [_cut(part) for part in parts]
    source, at = cuts[0][0] if cuts and cuts[0] else None, 0
    for cut in cuts:
        if source is None or cut is None or cut[:3] != (source, cuts[0][1], at):  # type: ignore[index]
            return None
        at += cut[3]
    return source if source is not None and source.meta["val"].shape == node.meta["val"].shape else None


def _written(last: fx.Node) -> fx.Node | None:
    """The concatenation of the parts that were written over a value one by one, if they are all of it."""
    parts, node, size = dict[int, fx.Node](), last, 0
    along = normal_dims(call_of(last).arg(2, "dim", 0), last.meta["val"].dim())[0]
    whole = last.meta["val"].shape[along]
    while node.target is aten.slice_scatter.default and size < whole:
        call, value = call_of(node), operand_nodes(node)[1]
        start = slice(call.arg(3, "start"), None).indices(whole)[0]
        if call.arg(5, "step", 1) != 1 or normal_dims(call.arg(2, "dim", 0), len(call.operands[0]))[0] != along:
            return None
        if start in parts:
            return None
        size += value.meta["val"].shape[along]
        parts[start], node = value, operand_nodes(node)[0]
    at = 0
    for start in sorted(parts):
        if start != at:
            return None
        at += parts[start].meta["val"].shape[along]
    if at != whole or len(parts) == 1:
        return None
    with last.graph.inserting_before(last):
        joined = last.graph.call_function(aten.cat.default, ([parts[start] for start in sorted(parts)], along))
    joined.meta = dict(last.meta)
    return joined


def _cut(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """Of a slice, or one of several: of what, along which dimension, from where on, how much."""
    cut: Any = node.args[0] if node.target is operator.getitem else node
    rule = RULES.get(cut.target)
    if rule is None or rule.pointwise or rule.work is not Work.NONE:
        return None
    try:
        spec = rule.spec(call_of(cut))
    except RuleError:
        return None
    dims = spec.results[node.args[1] if cut is not node else 0]  # type: ignore[index]
    found = [(d, label) for d, dim in enumerate(dims) for label in dim if label in spec.windows]
    if len(found) != 1 or spec.windows[found[0][1]].step != 1:
        return None
    ((dim, label),) = found
    return operand_nodes(cut)[0], dim, spec.windows[label].start, spec.sizes[label]


def cut_alone(part: fx.Node) -> None:
    """One of the parts that a dimension is cut into becomes a slice: what needs tokens of its own needs those alone.
    Features stay together."""
    cut = _cut(part) if part.target is operator.getitem else None
    if cut is None or cut[1] == part.meta["val"].dim() - 1:
        return
    source, dim, start, size = cut
    part.target, part.args = aten.slice.Tensor, (source, dim, start, start + size)
