"""Questions that passes ask of FX graphs."""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from toca_compile.ir.calls import tensors

TORCH = f"{Path(torch.__file__).parent}/"  # where torch's own files lie
_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior,
}  # fmt: skip
CAPTURED_AS = "toca_name"  # in a node's meta: its name in the captured graph, which copies of it keep


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """A graph without weights as a module, whose Python is written when it is first run: what is compiled never is."""
    return _LazyGraphModule({}, graph)


def written_out(module: fx.GraphModule) -> Callable[..., Any]:
    """The Python of a module's graph."""
    _LazyGraphModule.force_recompile(module)
    return module.forward


def value_of(node: fx.Node) -> Any:
    """The value a node was traced with: a fake tensor, a tuple of them, or a scalar."""
    return node.meta.get("val")


def operand_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors are a call's operands, in the order of its arguments."""
    found: list[fx.Node] = []

    def visit(arg: fx.Node) -> fx.Node:
        if isinstance(value_of(arg), torch.Tensor):
            found.append(arg)
        return arg

    fx.node.map_arg((node.args, node.kwargs), visit)
    return found


def uncast(node: fx.Node) -> fx.Node | None:
    """What a cast casts; None of other nodes. Models in half precision add to the stream in float32, and cast back."""
    return operand_nodes(node)[0] if node.target is torch.ops.aten._to_copy.default else None


def group_of(node: fx.Node) -> str | None:
    """The name of the processes that a collective is of, its last argument; None of other nodes."""
    is_collective = getattr(node.target, "namespace", None) == "_c10d_functional"
    given = (*node.args, *node.kwargs.values())
    return given[-1] if is_collective and isinstance(given[-1], str) else None


def in_order(needs: Sequence[AbstractSet[int]]) -> list[int] | None:
    """The numbers from 0 on so that each follows those that it ``needs``, else the least first; None where two need
    each other."""
    found: list[int] = []
    while len(found) < len(needs):
        ready = next((i for i, own in enumerate(needs) if i not in found and own <= set(found)), None)
        if ready is None:
            return None
        found.append(ready)
    return found


def ancestors(
    roots: Iterable[fx.Node], stop: Iterable[fx.Node] = (), within: Callable[[fx.Node], Any] | None = None
) -> set[fx.Node]:
    """``roots`` and all nodes that they depend on, not going past ``stop`` nor out of ``within`` (neither included)."""
    halt, seen, todo = set(stop), set(), list(roots)
    while todo:
        node = todo.pop()
        if node not in seen and node not in halt and (within is None or within(node)):
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return seen


def outer_inputs(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """What ``nodes``, in order, read from outside, each once."""
    body = dict.fromkeys(nodes)
    return tuple(dict.fromkeys(i for n in body for i in n.all_input_nodes if i not in body))


def writes(node: fx.Node, value: fx.Node) -> bool:
    """Whether a call of Dynamo's graph changes its first argument, and that is ``value``."""
    name = str(getattr(node.target, "__name__", node.target))
    of_python = getattr(node.target, "__module__", "") == "_operator"  # where and_ is a name like any other
    in_place = node.target in _IN_PLACE or (not of_python and name.endswith("_"))
    return in_place and node.args[:1] == (value,)


def is_mutable(node: fx.Node) -> bool:
    """Whether a call of ATen's or our own changes what it is given, its first argument."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def is_view(node: fx.Node) -> bool:
    """Whether a call's result may be its first operand's memory."""
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(told.alias_info is not None for told in returns) and not is_mutable(node)


def viewed(node: fx.Node) -> fx.Node:
    """What a value may be a view of."""
    while (is_view(node) or node.target is operator.getitem) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def source_line(node: fx.Node) -> str:
    """``file.py:line`` of the user's code that a node came from, or its name where that is not known."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    lines = [line for line in lines if TORCH not in line] or lines
    if not lines:
        return f"node {node.name}"
    path, number = lines[-1].split('"')[1], lines[-1].split("line ")[1].split(",")[0]
    return f"{path.rsplit('/', 1)[-1]}:{number}"


# How a traced frame reaches a module before any of its own names: the variable, and what stands between (a closure, a
# bound method, the arguments of a wrapper). Not part of the user's names.
_ROOT = re.compile(
    r"^[LG]\[\"?'?\w+\"?'?\](?:(?<='args'\])\[\d+\]|\.__self__|\.__closure__|\.__wrapped__|\.func\b|\.forward(?=\.__self__)|\[\d+\]\.cell_contents)*"
)
_INNER = {"_modules", "__dict__", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def module_path(node: fx.Node) -> list[str]:
    """The path of the module that a node came from, outermost name first, as the user named it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return []
    path = _ROOT.sub("", str(list(stack.values())[-1][0]))
    return [part for part in re.findall(r"\w+", path) if part not in _INNER]


def input_name(node: fx.Node) -> str:
    """What the caller of a traced frame calls an input of its graph: ``hidden_states``, or ``0`` for a first argument
    without a name; empty where nobody calls it by one."""
    name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    path = re.findall(r"\w+", str(name() if callable(name) else name))
    return path[-1] if path[:1] in (["L"], ["G"]) else ""


def common_module(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that all nodes came from, as the user named it; empty where there is none."""
    common: list[str] = []
    for parts in zip(*(module_path(node) for node in nodes), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def signature(node: fx.Node) -> tuple[Any, ...]:
    """What must agree for two nodes to be the same op on the same kind of operands: target, constants, shapes."""

    def opaque(arg: fx.Node) -> str:
        return "·"

    kinds = tuple((tuple(v.shape), v.dtype, v.device.type) for v in tensors(value_of(node)))
    constants = repr(fx.node.map_arg((node.args, node.kwargs), opaque))
    return (node.op if node.op != "call_function" else str(node.target), constants, kinds)
