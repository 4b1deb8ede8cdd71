"""Wrapper tensors at the boundary of a graph: a quantised weight is a tensor around plain ones (integers, scales), and
says itself what an op on it does with those. The graph is given the plain ones, and puts the weight together again, so
that what is captured of it is arithmetic on plain tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True)
class Wrapper:
    """How a tensor is made of others: its class, their names and what each is made of (None: a plain one), and what
    ``__tensor_unflatten__`` takes beside them."""

    cls: Any
    parts: tuple[tuple[str, "Wrapper | None"], ...]
    context: Any
    size: Any
    stride: Any

    @classmethod
    def of(cls, value: Any) -> "Wrapper | None":
        """That of a value; None where it is no wrapper."""
        if not isinstance(value, torch.Tensor) or not is_traceable_wrapper_subclass(value):
            return None
        names, context = value.__tensor_flatten__()
        parts = tuple((name, cls.of(getattr(value, name))) for name in names)
        return cls(type(value), parts, context, value.size(), value.stride())

    def flat(self, value: Any) -> list[torch.Tensor]:
        """The plain tensors inside."""
        inner = [(getattr(value, name), wrapper) for name, wrapper in self.parts]
        return [plain for part, wrapper in inner for plain in ([part] if wrapper is None else wrapper.flat(part))]

    def names(self) -> list[str]:
        """And what each is called."""
        return [
            f"{name}.{inner}" if inner else name
            for name, wrapper in self.parts
            for inner in ([""] if wrapper is None else wrapper.names())
        ]

    def rebuilt(self, *plain: torch.Tensor) -> Any:
        """The tensor around these."""
        rest, inner = list(plain), {}
        for name, wrapper in self.parts:
            count = 1 if wrapper is None else len(wrapper.names())
            given, rest = rest[:count], rest[count:]
            inner[name] = given[0] if wrapper is None else wrapper.rebuilt(*given)
        return self.cls.__tensor_unflatten__(inner, self.context, self.size, self.stride)


def flattener(inputs: Sequence[Any]) -> Callable[[Sequence[Any]], list[Any]] | None:
    """What takes the wrappers among a graph's inputs apart; None where there are none."""
    wrappers = [Wrapper.of(value) for value in inputs]
    if not any(wrappers):
        return None

    def flat(values: Sequence[Any]) -> list[Any]:
        pairs = zip(values, wrappers, strict=True)
        return [plain for v, wrapper in pairs for plain in ([v] if wrapper is None else wrapper.flat(v))]

    return flat


def unwrapped(
    gm: fx.GraphModule, static_inputs: Sequence[bool], inputs: Sequence[Any]
) -> tuple[fx.GraphModule, tuple[bool, ...]]:
    """The graph with the plain tensors as inputs, and which of those are parameters or buffers."""
    graph = fx.Graph()
    graph.set_codegen(gm.graph._codegen)
    env: dict[fx.Node, fx.Node] = {}
    fixed: list[bool] = []
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    rebuild: list[tuple[fx.Node, Wrapper, list[fx.Node]]] = []
    for node, static, value in zip(placeholders, static_inputs, inputs, strict=True):
        wrapper = Wrapper.of(value)
        if wrapper is None:
            env[node] = graph.node_copy(node)
            fixed.append(static)
            continue
        parts = []
        for name, plain in zip(wrapper.names(), wrapper.flat(value), strict=True):
            part = graph.placeholder(f"{node.name}_{name.replace('.', '_')}")
            part.meta = {k: v for k, v in node.meta.items() if k != "grapharg"} | {"example_value": plain}
            parts.append(part)
            fixed.append(static)
        rebuild.append((node, wrapper, parts))
    for node, wrapper, parts in rebuild:
        env[node] = graph.call_function(wrapper.rebuilt, tuple(parts))
        env[node].meta = {k: v for k, v in node.meta.items() if k != "grapharg"}
    for node in gm.graph.nodes:
        if node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    return fx.GraphModule(gm, graph), tuple(fixed)
