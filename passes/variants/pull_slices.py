"""PullSlices: where one window of a value is read, the rest of it is not computed.

A model that joins text and picture for its last blocks cuts the text off before its head. In a step that computes no
branch nothing but elementwise lines lies between the two; with the cut in front of them, all that was only for the text
has no reader left::

    x = cat(text, image) + g·C; y = norm(x[:, n:])      ⇒      y = norm(image + g·C[:, n:])
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from toca_compile.ir.graph import CAPTURED_AS, value_of

aten = torch.ops.aten

# Elementwise ops whose result at a place is the same to the last bit whatever is computed beside it.
_EXACT = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten._to_copy.default,
})  # fmt: skip


def pull_slices(graph: fx.Graph, results: Collection[fx.Node]) -> None:
    """Move each slice in front of what it alone reads, in place.

    Args:
        graph: it has no output yet; its nodes tell their values (``node.meta["val"]``).
        results: what it will hand out, which stays as it is: a slice may become what the graph was given.
    """
    todo = list(graph.find_nodes(op="call_function", target=aten.slice.Tensor))
    while todo:
        cut = todo.pop()
        source = cut.args[0]
        assert isinstance(source, fx.Node)
        if len(source.users) > 1 or source in results or cut in results:
            continue
        made = _in_front(source, cut)
        if made is not None:
            cut.replace_all_uses_with(made)
            graph.erase_node(cut)
            graph.erase_node(source)
            todo += [n for n in (made, *made.all_input_nodes) if n.target is aten.slice.Tensor]


def _in_front(source: fx.Node, cut: fx.Node) -> fx.Node | None:
    """What ``cut`` takes of ``source``, made of slices of what that is made of; None where that is not the same."""
    window = _window(cut)
    if window is None:
        return None
    with source.graph.inserting_before(source):
        if source.target in _EXACT:
            return _elementwise(source, cut, *window)
        return _piece(source, cut, *window) if source.target is aten.cat.default else None


def _window(cut: fx.Node) -> tuple[int, int, int] | None:
    """The dimension that a slice cuts, counted from the last, and from where to where; None of one that leaves nothing
    out, or takes what does not lie side by side."""
    value: Tensor = value_of(cut.args[0])  # type: ignore[arg-type]
    numbers: Any = (*cut.args[1:], *(0, None, None, 1)[len(cut.args) - 1 :])
    dim, start, stop, step = numbers
    if cut.kwargs or step != 1 or not all(isinstance(n, int | None) for n in (*numbers, *value.shape)):
        return None
    size = value.shape[dim]
    start, stop, _ = slice(start, stop).indices(size)
    return None if stop - start in (0, size) else (dim if dim < 0 else dim - value.dim(), start, stop)


def _elementwise(source: fx.Node, cut: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
    """A call on slices of its operands, but of those that are the same all along."""
    env = {node: node for node in source.all_input_nodes}
    for node in env:
        value = value_of(node)
        if isinstance(value, Tensor) and value.dim() >= -dim and value.shape[dim] != 1:
            env[node] = _slice(node, cut, dim, start, stop)
    return _told(source.graph.node_copy(source, env.__getitem__), cut)


def _piece(source: fx.Node, cut: fx.Node, dim: int, start: int, stop: int) -> fx.Node | None:
    """A slice of the one value of those joined in which it lies."""
    pieces: Any = source.args[0]
    along: Any = source.args[1] if len(source.args) > 1 else 0
    whole = value_of(source)
    alike = all((value_of(p).dim(), value_of(p).dtype) == (whole.dim(), whole.dtype) for p in pieces)
    if not alike or (along if along < 0 else along - whole.dim()) != dim:
        return None
    for piece in pieces:
        size = value_of(piece).shape[dim]
        if start < size:
            if stop > size:
                return None
            return piece if (start, stop) == (0, size) else _slice(piece, cut, dim, start, stop)
        start, stop = start - size, stop - size
    return None


def _slice(node: fx.Node, cut: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
    return _told(node.graph.call_function(aten.slice.Tensor, (node, dim, start, stop)), cut)


def _told(call: fx.Node, cut: fx.Node) -> fx.Node:
    """A call with its value, which is what ``cut`` is called where it has the same shape."""
    args, kwargs = fx.node.map_arg((call.args, call.kwargs), value_of)
    call.meta["val"] = call.target(*args, **kwargs)  # type: ignore[operator]
    call.meta.pop(CAPTURED_AS, None)
    if CAPTURED_AS in cut.meta and value_of(call).shape == value_of(cut).shape:
        call.meta[CAPTURED_AS] = cut.meta[CAPTURED_AS]
    return call
