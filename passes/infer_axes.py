"""InferAxes: the type of every value, as products of factors.

Each op's rule gives a spec over labels; labels are bound to the factors of the operands, factors bound to one label are
unified, and the result's type is read off. An op without a rule, or called in a way that its rule does not cover, gets
fresh factors for its result: nothing is known to pass through it, so no proof can.
"""

import logging
import operator
from typing import Any

import torch
from torch import fx

from toca_compile.errors import RuleError
from toca_compile.ir.calls import Call, shape, tensors
from toca_compile.ir.factors import Product
from toca_compile.ir.graph import group_of, operand_nodes, source_line, value_of
from toca_compile.ir.spec import AxisSpec, Dim
from toca_compile.ir.types import AxisTypes, Type
from toca_compile.ops.sized_by_values import OP as SIZED_BY_VALUES
from toca_compile.rules.registry import RULES

log = logging.getLogger(__name__)

# What is said of ops that have no rule, and can have none.
WITHOUT_RULE: dict[Any, str] = {SIZED_BY_VALUES: "holds what has a size that only values tell"}


def infer_axes(graph: fx.Graph, types: AxisTypes) -> AxisTypes:
    """Fill ``types`` for every node of ``graph`` whose value is a tensor or a tuple of tensors."""
    for node in graph.nodes:
        if node.op == "output":
            continue
        values = tensors(value_of(node))
        if node.op in ("placeholder", "get_attr"):
            types.results[node] = tuple(_fresh(types, v) for v in values)
        elif node.target is operator.getitem:
            source, item = node.args
            position = len(tensors(value_of(source)[:item]))  # not every result need be a tensor
            types.results[node] = (types.results[source][position],) if values else ()
        else:
            _apply(node, types)
    types.groups = tuple(dict.fromkeys(name for node in graph.nodes if (name := group_of(node)) is not None))
    return types


def _fresh(types: AxisTypes, value: torch.Tensor) -> Type:
    return tuple(types.factors.new(s) for s in shape(value))


def _apply(node: fx.Node, types: AxisTypes) -> None:
    rule = RULES.get(node.target)  # type: ignore[call-overload]
    if rule is None:
        return _give_up(node, types, WITHOUT_RULE.get(node.target, "has no rule"))
    try:
        spec = rule.spec(call_of(node))
    except RuleError as error:
        log.debug("%s: %s", source_line(node), error)
        return _give_up(node, types, "has a rule that does not cover this call")
    bound: dict[str, Product] = {}
    for operand, dims in zip(operand_nodes(node), spec.operands, strict=True):
        for dim, product in zip(dims, types.results[operand][0], strict=True):
            if not _bind(types, spec, bound, dim, product):
                # The operands cannot be taken apart as the op does it (a boundary inside a concatenation, say).
                return _give_up(node, types, "regroups the tokens")
    factors = types.factors
    for label, window in spec.windows.items():
        size = spec.sizes[label]
        bound[label] = factors.window(bound[window.source], window.start, size, window.step)
    for label, parts in spec.concat.items():
        bound[label] = factors.concatenate([bound[p] for p in parts])
    for label, size in spec.sizes.items():
        if label not in bound:
            bound[label] = factors.new(size)
    types.processes.update(f for label in spec.processes for f in bound[label])
    types.specs[node] = spec
    types.labels[node] = bound
    types.results[node] = tuple(
        tuple(tuple(f for label in dim for f in bound[label]) for dim in dims) for dims in spec.results
    )


def _give_up(node: fx.Node, types: AxisTypes, why: str) -> None:
    """Nothing is known to pass through: the result is new, and the call has no spec to prove with."""
    types.unknown[node] = why
    types.results[node] = tuple(_fresh(types, v) for v in tensors(value_of(node)))


def _bind(types: AxisTypes, spec: AxisSpec, bound: dict[str, Product], dim: Dim, product: Product) -> bool:
    parts = types.factors.split(product, [spec.sizes[label] for label in dim]) if dim else ()
    if parts is None:
        return False
    return all(types.factors.unify(bound.setdefault(label, part), part) for label, part in zip(dim, parts, strict=True))


def call_of(node: fx.Node) -> Call:
    """The node's call with every argument replaced by its value."""

    def value(arg: Any) -> Any:
        return value_of(arg)

    return Call(fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value), value_of(node))
