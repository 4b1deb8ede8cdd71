"""Norms, softmax and reductions: ops that read some dimensions whole."""

from collections.abc import Sequence
from random import Random
from typing import Any

import torch

from toca_compile.ir.calls import Call, normal_dims
from toca_compile.ir.spec import AxisSpec, einsum, over_dims
from toca_compile.rules.registry import Args, Sample, Work, register
from toca_compile.rules.samples import dim_of, dims_of, shape

aten = torch.ops.aten


def _rows(*, bias: bool) -> Sample:
    """The trailing dimensions normalised, with a weight, a bias, both or neither."""

    def sample(rng: Random) -> Args:
        x = shape(rng, 2, 4)
        tail = x[-rng.randint(1, len(x) - 1) :]
        values = [torch.randn(tail) if rng.random() < 0.5 else None for _ in range(1 + bias)]
        return (torch.randn(x), tail, *values), {}

    return sample


@register(aten.layer_norm.default, _rows(bias=True), trailing=True, work=Work.NORM)
@register(aten.rms_norm.default, _rows(bias=False), trailing=True, work=Work.NORM)
def normalize_last(call: Call) -> AxisSpec:
    """Normalises over the trailing dimensions; weight and bias lie along them."""
    rank, over = len(call.operands[0]), len(call.args[1])
    names = [f"d{i}" for i in range(rank)]
    tail = " ".join(names[rank - over :])
    out = " ".join(n + "!" if i >= rank - over else n for i, n in enumerate(names))
    return einsum(f"{' '.join(names)}, {tail}, {tail} -> {out}", call.operands, call.results)


def _groups(rng: Random) -> Args:
    x = shape(rng, 3, 4)
    groups = rng.choice([n for n in range(1, x[1] + 1) if x[1] % n == 0])
    values = [torch.randn(x[1]) if rng.random() < 0.5 else None for _ in range(2)]
    return (torch.randn(x), groups, *values), {}


@register(aten.group_norm.default, _groups, work=Work.NORM)
def group_norm(call: Call) -> AxisSpec:
    """Normalises over groups of channels and every position: carries the batch only."""
    rank = len(call.operands[0])
    names = [f"d{i}" for i in range(rank)]
    out = " ".join(n if i == 0 else n + "!" for i, n in enumerate(names))
    return einsum(f"{' '.join(names)}, d1, d1 -> {out}", call.operands, call.results)


def _one_dim(*extra: Any) -> Sample:
    def sample(rng: Random) -> Args:
        x = shape(rng)
        return (torch.rand(x) + 0.1, dim_of(rng, len(x)), *extra), {}

    return sample


@register([aten._softmax.default, aten._log_softmax.default], _one_dim(False), work=Work.SOFTMAX)
@register([aten.softmax.int, aten.log_softmax.int], _one_dim(), work=Work.SOFTMAX)
@register([aten.cumsum.default, aten.cumprod.default], _one_dim())
def along(call: Call) -> AxisSpec:
    """Each element reads others of one dimension: all of it, or all before it."""
    x = call.operands[0]
    return over_dims(x, normal_dims(call.arg(1, "dim"), len(x)), call.results, keep=True)


def _square(rng: Random) -> Args:
    return (torch.rand(shape(rng, 2, 4)) + 0.1, rng.randint(-2, 2)), {}


@register([aten.tril.default, aten.triu.default], _square)
def triangle(call: Call) -> AxisSpec:
    """Where an element stands in the last two dimensions decides whether it stays."""
    x = call.operands[0]
    return over_dims(x, (-2, -1), call.results, keep=True)


def _kept(rng: Random) -> Args:
    args, _ = _one_dim()(rng)
    return (*args, rng.random() < 0.5), {}


def _over(rng: Random) -> Args:
    """Some dimensions, in any order, or (none named) all of them."""
    x = shape(rng)
    return (torch.rand(x) + 0.1, dims_of(rng, len(x)) if rng.random() < 0.9 else [], rng.random() < 0.5), {}


def _over_named(rng: Random) -> Args:
    (x, dims, keep), _ = _over(rng)
    return (x, dims or [0], keep), {}


def _spread(rng: Random) -> Args:
    (x, dims, keep), _ = _over(rng)
    return (x, dims or None), {"correction": 0, "keepdim": keep}


def _spread_of(rng: Random) -> Args:
    (x, dims, keep), _ = _over(rng)
    return (x, dims or None, False, keep), {}


def _place(rng: Random) -> Args:
    (x, dim, keep), _ = _kept(rng)
    return ((x, dim, keep) if rng.random() < 0.8 else (x,)), {}


@register([aten.any.dim, aten.all.dim], _kept)
@register(aten.argmax.default, _place)
@register([aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default], _over)
@register(aten.logsumexp.default, _over_named)
@register([aten.var.correction, aten.std.correction], _spread)
@register([aten.var.dim, aten.std.dim], _spread_of)
def reduce_dims(call: Call) -> AxisSpec:
    """Reductions over named dimensions, kept as size 1 or dropped."""
    x = call.operands[0]
    return _reduced(call, normal_dims(call.arg(1, "dim"), len(x)))


@register(
    [aten.mean.default, aten.sum.default, aten.max.default, aten.min.default],
    lambda rng: ((torch.rand(shape(rng)),), {}),
)
def reduce_all(call: Call) -> AxisSpec:
    """Reductions to a scalar."""
    x = call.operands[0]
    return over_dims(x, range(len(x)), call.results, keep=False)


def _length(rng: Random) -> Args:
    (x, dims, keep), _ = _over(rng)
    return (x, rng.choice([1.0, 2.0]), dims or None, keep), {}


@register(aten.linalg_vector_norm.default, _length)
def vector_norm(call: Call) -> AxisSpec:
    """The norm over named dimensions."""
    return _reduced(call, normal_dims(call.arg(2, "dim"), len(call.operands[0])))


def _reduced(call: Call, dims: Sequence[int]) -> AxisSpec:
    x = call.operands[0]
    return over_dims(x, dims, call.results, keep=len(call.results[0]) == len(x))


def _stably(rng: Random) -> Args:
    (x, dim, descending), _ = _kept(rng)
    return (x,), {"stable": True, "descending": descending, **({"dim": dim} if rng.random() < 0.8 else {})}


@register([aten.max.dim, aten.min.dim], _kept)
@register([aten.sort.default, aten.argsort.default], _kept)
@register(aten.sort.stable, _stably)
def ordered(call: Call) -> AxisSpec:
    """Values in order along one dimension, or the first of them, with their indices."""
    return _picked(call, call.arg(1, "dim", -1))


def _largest(rng: Random) -> Args:
    x = shape(rng)
    dim = dim_of(rng, len(x)) if rng.random() < 0.7 else -1
    k = rng.choice([x[dim], rng.randint(1, x[dim])])
    return ((torch.rand(x), k) if dim == -1 else (torch.rand(x), k, dim)), {}


@register(aten.topk.default, _largest)
def topk(call: Call) -> AxisSpec:
    """The largest along one dimension."""
    return _picked(call, call.arg(2, "dim", -1))


def _picked(call: Call, along: int) -> AxisSpec:
    """A dimension of which elements are picked by their values: in the result it is a new index space, if at all."""
    names = [f"d{i}" for i in range(len(call.operands[0]))]
    dim = normal_dims(along, len(names))[0]
    stays = len(call.results[0]) == len(names)
    out = " ".join("r" if i == dim else n for i, n in enumerate(names) if stays or i != dim)
    return einsum(f"{' '.join(names)} -> {','.join([out] * len(call.results))}", call.operands, call.results)
