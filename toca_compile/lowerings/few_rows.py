"""FewRows: on a GPU, what launches more than it computes becomes what Inductor fuses.

A product of a few rows (an embedding of the time, the shifts and gates of a block) is bound by reading its weight. As a
library's call it stands alone; as a sum it takes in what stands before and behind it, and sums of one level are one
kernel, however many blocks they belong to. A convolution whose windows are patches is turned about in memory before and
behind the library's call; as a product of patches it is not::

    linear(silu(a), W₁), linear(silu(b), W₂)   ⇒   Σ W₁·silu(a), Σ W₂·silu(b)
    conv2d(x, W, stride=2)                     ⇒   linear(patches(x), W)
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

aten = torch.ops.aten

FEW = 4
"""Rows of a product that is a sum: beyond, the weight would be read more often than a cache hides."""
_CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}  # over so many dimensions


def fuse_few_rows(graph: fx.Graph) -> None:
    """Rewrite a graph in place, whose nodes tell their values (``node.meta["val"]``)."""
    for node in list(graph.nodes):
        instead: Callable[..., Tensor] | None = None
        if node.target is aten.linear.default and _is_few(node.args[0]):
            instead = linear_as_sum
        elif node.target in _CONVOLUTIONS and _of_patches(node):
            instead = convolution_of_patches
        if instead is not None:
            with graph.inserting_before(node):
                call = graph.call_function(
                    instead, node.args[:3], {k: v for k, v in node.kwargs.items() if k == "bias"}
                )
            node.replace_all_uses_with(call)
            graph.erase_node(node)


def linear_as_sum(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` of ``(…, in)`` as a sum over ``in``, in single precision at least, as a library has it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Rows innermost: those that read the same part of the weight do so one after the other.
    made = (weight.to(dtype)[:, None] * x.to(dtype).reshape(1, -1, x.shape[-1])).sum(-1)
    if bias is not None:
        made = made + bias.to(dtype)[:, None]
    return made.t().to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def convolution_of_patches(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution of ``(batch, in, *sizes)`` whose windows lie side by side, as a product of rows."""
    out, channels, *window = weight.shape
    counts = [size // side for size, side in zip(x.shape[2:], window, strict=True)]
    for dim, (count, side) in enumerate(zip(counts, window, strict=True), 2):
        x = x.narrow(dim, 0, count * side)
    n = len(window)
    split = x.reshape(len(x), channels, *(part for pair in zip(counts, window, strict=True) for part in pair))
    rows = split.permute(0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2)).reshape(len(x), prod(counts), -1)
    made = F.linear(rows, weight.reshape(out, -1), bias)
    return made.transpose(1, 2).reshape(len(x), out, *counts).contiguous()


def _is_few(x: Any) -> bool:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return all(isinstance(size, int) for size in value.shape) and 0 < prod(value.shape[:-1]) <= FEW


def _of_patches(node: fx.Node) -> bool:
    """Whether the windows of a convolution lie side by side, and each reads all channels."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= dict(zip(names, node.args, strict=False)) | node.kwargs
    values = [given[name].meta.get("val") for name in names[:2]]
    n = _CONVOLUTIONS[node.target]  # type: ignore[index]
    if not all(isinstance(v, Tensor) and v.dim() == n + 2 and all(isinstance(s, int) for s in v.shape) for v in values):
        return False
    window = list(values[1].shape[2:])

    def told(name: str) -> list[int]:
        value: int | Sequence[int] = given[name]
        numbers = [value] if isinstance(value, int) else list(value)
        return numbers * n if len(numbers) == 1 else numbers

    side_by_side = told("stride") == window and told("padding") == [0] * n and told("dilation") == [1] * n
    filled = all(size >= side for size, side in zip(values[0].shape[2:], window, strict=True))
    return side_by_side and filled and given["groups"] == 1
