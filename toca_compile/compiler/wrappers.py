"""Wrapper tensors at the boundary of a graph: a quantised weight is a tensor around plain ones (integers, scales), and
says itself what an op on it does with those. The graph is given the plain ones, and puts the weight together again, so
that what is captured of it is arithmetic on plain tensors.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
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


class _Plain:
    """A tensor of a subclass as one of none: what its ``__torch_function__`` does is in the graph already. It is
    the same object as long as the tensor is the same memory, since inputs are known again by that."""

    def __init__(self) -> None:
        self.of: Any = lambda: None
        self.plain = torch.empty(0)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            if self.of() is not value or self.plain.data_ptr() != value.data_ptr():
                self.of, self.plain = weakref.ref(value), value.as_subclass(torch.Tensor)
        return self.plain


def _is_subclass(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or type(value) is torch.Tensor:
        return False
    # Parameters and buffers are tensors as any other.
    return type(value).__torch_function__ is not torch._C._disabled_torch_function_impl


class Flattener:
    """Takes the wrappers among a graph's inputs apart, and other subclasses off.

    Args:
        inputs: of the graph, as it is traced.
        owned: which are parameters or buffers of the model.
    """

    def __init__(self, inputs: Sequence[Any], owned: Sequence[bool]) -> None:
        wrappers = [Wrapper.of(value) for value in inputs]
        self._parts: list[Callable[[Any], Any] | None] = [
            wrapper.flat if wrapper is not None else _Plain() if _is_subclass(value) else None
            for wrapper, value in zip(wrappers, inputs, strict=True)
        ]
        self._first = next((i for i, own in enumerate(owned) if own), None)
        self.needed = any(self._parts)

    def __call__(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The plain tensors of a call."""
        found: list[Any] = []
        for value, part in zip(values, self._parts, strict=True):
            inner = value if part is None else part(value)
            found += inner if isinstance(inner, list) else [inner]
        return tuple(found)

    def parameter(self, values: Sequence[Any]) -> Any:
        """The first of the model's parameters, as the model has it."""
        return None if self._first is None else values[self._first]


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
