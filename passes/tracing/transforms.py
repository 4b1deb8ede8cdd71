"""Transforms: ``torch.vmap``, spelled out in ops.

Dynamo spells it as calls that begin and end it, with the mapped function's ops between them. Those run on tensors that
hide a dimension, which tracing before dispatch cannot see; below that it sees what each op does to the whole::

    begin; row = add_batch_dim(x); y = row.sum(); remove_batch_dim(y); end        →        sum(x, [1])

So the stretch from a begin to its end is traced there by itself, and its graph stands for it. A table that a mask is
made of is the case in point.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._C._functorch import get_dynamic_layer_stack_depth, pop_dynamic_layer_stack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from toca_compile.errors import UnsupportedGraphError
from toca_compile.ir.graph import source_line

_PREPARES = "lazy_load_decompositions"  # says nothing about values


def begins(node: fx.Node) -> bool:
    """Whether a call of Dynamo's graph begins a transform of functions, or prepares for one."""
    return _name(node).endswith("_increment_nesting") or _name(node) == _PREPARES


def spelled_out(begin: fx.Node, env: dict[fx.Node, Any]) -> tuple[fx.GraphModule | None, list[fx.Node], list[fx.Node]]:
    """The graph of what stands between the beginning of a transform and its end.

    Args:
        env: the values before it, by node.

    Returns:
        The graph (None where there is nothing to compute), the nodes whose values it takes, and those that it stands
        for: first those whose values it gives, as many as it has outputs.

    Raises:
        UnsupportedGraphError: it cannot be traced.
    """
    if _name(begin) == _PREPARES:
        return None, [], [begin]
    inside = _stretch(begin)
    taken = [
        n
        for n in dict.fromkeys(i for node in inside for i in node.all_input_nodes)
        if n not in inside and isinstance(env[n], torch.Tensor)
    ]
    given = [n for n in inside if any(user not in inside for user in n.users)]
    graph = fx.Graph()
    copies = {n: graph.placeholder(n.name) for n in taken}
    for node in inside:
        copies[node] = graph.node_copy(node, lambda n: copies[n] if n in copies else env[n])
    graph.output(tuple(copies[n] for n in given))
    stretch = fx.GraphModule(begin.graph.owning_module or {}, graph)
    depth = get_dynamic_layer_stack_depth()
    try:
        traced = run_traced(stretch, [env[n] for n in taken])
    except Exception as error:
        while get_dynamic_layer_stack_depth() > depth:  # one by one: 2.11 cannot undo a stack of one
            pop_dynamic_layer_stack()
        raise UnsupportedGraphError(
            f"the model uses torch.vmap, or another transform of functions, which cannot be traced here "
            f"({source_line(begin)}): make what it makes (a block mask, say) outside of forward, or without it"
        ) from error
    return traced, taken, [*given, *(n for n in inside if n not in given)]


def _stretch(begin: fx.Node) -> dict[fx.Node, None]:
    """The calls from a begin to its end, others begun between included."""
    inside: dict[fx.Node, None] = {}
    depth, node = 0, begin
    while True:
        inside[node] = None
        depth += _name(node).endswith("_increment_nesting")
        depth -= _name(node).endswith("_decrement_nesting")
        if depth == 0 or node.next.op in ("output", "root"):
            return inside
        node = node.next


def run_traced(stretch: fx.GraphModule, values: Sequence[torch.Tensor]) -> fx.GraphModule:
    """Its graph below dispatch, on values like these."""
    with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(fx.Interpreter(stretch).run, tracing_mode="real")(*map(_like, values))


def _like(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
