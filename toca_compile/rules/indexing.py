"""Ops that pick elements by an index tensor."""

from random import Random

import torch

from toca_compile.ir.calls import Call, normal_dims
from toca_compile.ir.spec import AxisSpec, einsum
from toca_compile.rules.registry import Args, register
from toca_compile.rules.samples import dim_of, shape

aten = torch.ops.aten


def _rows(rng: Random) -> Args:
    x = shape(rng)
    dim = dim_of(rng, len(x))
    return (torch.randn(x), dim, torch.randint(x[dim], (rng.choice([x[dim], rng.randint(1, 5)]),))), {}


@register(aten.index_select.default, _rows)
def index_select(call: Call) -> AxisSpec:
    """Rows by index: the row dimension of the result is the index's."""
    names = [f"d{i}" for i in range(len(call.operands[0]))]
    dim = normal_dims(call.arg(1, "dim"), len(names))[0]
    out = " ".join("r" if d == dim else n for d, n in enumerate(names))
    return einsum(f"{' '.join(names)}, r -> {out}", call.operands, call.results)


def _elements(rng: Random) -> Args:
    x = shape(rng)
    dim = dim_of(rng, len(x))
    index = [s if rng.random() < 0.7 else rng.randint(1, s) for s in x]
    index[dim] = rng.choice([x[dim], rng.randint(1, 5)])
    return (torch.randn(x), dim, torch.randint(x[dim], index)), {}


@register(aten.gather.default, _elements)
def gather(call: Call) -> AxisSpec:
    """Elements by index along one dimension, which is read whole. Another dimension is carried where sizes agree; an
    index that has less there reads the first of them, whichever they are."""
    x, index = call.operands
    dim = normal_dims(call.arg(1, "dim"), len(x))[0]
    left, right, out = [], [], []
    for i, (a, b) in enumerate(zip(x, index, strict=True)):
        shared = i != dim and a == b
        left.append(f"d{i}" if shared else f"x{i}")
        right.append(f"d{i}" if shared else f"i{i}")
        out.append(right[-1] if shared or i == dim else f"i{i}!")
    return einsum(f"{' '.join(left)}, {' '.join(right)} -> {' '.join(out)}", call.operands, call.results)
