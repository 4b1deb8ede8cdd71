"""Ops that pick elements by an index tensor."""

import torch

from toca_compile.ir.calls import Call, normal_dims
from toca_compile.ir.spec import AxisSpec, einsum
from toca_compile.rules.registry import register

aten = torch.ops.aten


@register(aten.index_select.default, lambda rng: ((torch.randn(4, 3), 0, torch.tensor([2, 0])), {}))
def index_select(call: Call) -> AxisSpec:
    """Rows by index: the row dimension of the result is the index's."""
    names = [f"d{i}" for i in range(len(call.operands[0]))]
    dim = normal_dims(call.args[1], len(names))[0]
    out = " ".join("r" if d == dim else n for d, n in enumerate(names))
    return einsum(f"{' '.join(names)}, r -> {out}", call.operands, call.results)


@register(
    aten.gather.default,
    lambda rng: ((torch.randn(2, 4, 3), 1, torch.randint(0, 4, (2, 2, 3))), {}),
)
def gather(call: Call) -> AxisSpec:
    """Elements by index along one dimension, which is read whole; the others are carried where sizes agree."""
    x, index = call.operands
    dim = normal_dims(call.args[1], len(x))[0]
    left = [f"d{i}" if i != dim and a == b else f"x{i}" for i, (a, b) in enumerate(zip(x, index, strict=True))]
    right = [f"d{i}" if i != dim and a == b else f"i{i}" for i, (a, b) in enumerate(zip(x, index, strict=True))]
    return einsum(f"{' '.join(left)}, {' '.join(right)} -> {' '.join(right)}", call.operands, call.results)
