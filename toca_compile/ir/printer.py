"""A short, stable text form of a graph, for golden tests and for reading."""

import operator
from typing import Any

import torch
from torch import fx


def print_graph(graph: fx.Graph) -> str:
    """One line a node: ``name = op(arguments)  # shape``, values numbered as they are in the graph."""
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name} = input{_shape(node)}")
        elif node.op == "output":
            lines.append(f"return {_arg(node.args[0])}")
        else:
            parts = [_arg(a) for a in node.args] + [f"{k}={_arg(v)}" for k, v in node.kwargs.items()]
            lines.append(f"{node.name} = {_target(node)}({', '.join(parts)}){_shape(node)}")
    return "\n".join(lines)


def _target(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    name = str(node.target)
    return (
        name.removeprefix("aten.").removesuffix(".default") if isinstance(node.target, torch._ops.OpOverload) else name
    )


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"  # {list(value.shape)}" if isinstance(value, torch.Tensor) else ""


def _arg(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return arg.name
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_arg(a) for a in arg) + "]"
    return str(arg)
