"""Norms, softmax and reductions: ops that read some dimensions whole."""

from random import Random

import torch

from toca_compile.ir.calls import Call, normal_dims
from toca_compile.ir.spec import AxisSpec, einsum, over_dims
from toca_compile.rules.registry import Args, Work, register

aten = torch.ops.aten


def _rows(rng: Random) -> Args:
    width = rng.randint(2, 5)
    return (torch.randn(2, 3, width), [width]), {}


@register(
    [aten.layer_norm.default, aten.rms_norm.default],
    _rows,
    trailing=True,
    work=Work.NORM,
)
def normalize_last(call: Call) -> AxisSpec:
    """Normalises over the trailing dimensions; weight and bias lie along them."""
    rank, over = len(call.operands[0]), len(call.args[1])
    names = [f"d{i}" for i in range(rank)]
    tail = " ".join(names[rank - over :])
    out = " ".join(n + "!" if i >= rank - over else n for i, n in enumerate(names))
    return einsum(f"{' '.join(names)}, {tail}, {tail} -> {out}", call.operands, call.results)


@register(aten.group_norm.default, lambda rng: ((torch.randn(2, 4, 3), 2), {}), work=Work.NORM)
def group_norm(call: Call) -> AxisSpec:
    """Normalises over groups of channels and every position: carries the batch only."""
    rank = len(call.operands[0])
    names = [f"d{i}" for i in range(rank)]
    out = " ".join(n if i == 0 else n + "!" for i, n in enumerate(names))
    return einsum(f"{' '.join(names)}, d1, d1 -> {out}", call.operands, call.results)


@register(
    [aten._softmax.default, aten._log_softmax.default],
    lambda rng: ((torch.randn(2, 3, 4), rng.choice([0, 1, 2, -1]), False), {}),
    work=Work.SOFTMAX,
)
@register(
    [aten.softmax.int, aten.log_softmax.int],
    lambda rng: ((torch.randn(2, 3, 4), rng.choice([0, 1, 2, -1])), {}),
    work=Work.SOFTMAX,
)
def softmax(call: Call) -> AxisSpec:
    """Each element reads the whole of one dimension."""
    x = call.operands[0]
    return over_dims(x, normal_dims(call.arg(1, "dim"), len(x)), call.results, keep=True)


@register([aten.cumsum.default, aten.cumprod.default], lambda rng: ((torch.rand(2, 3, 4) + 0.5, 1), {}))
def scan(call: Call) -> AxisSpec:
    """Each element reads all before it."""
    x = call.operands[0]
    return over_dims(x, normal_dims(call.arg(1, "dim"), len(x)), call.results, keep=True)


@register(
    [aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
     aten.std.correction, aten.logsumexp.default, aten.any.dim, aten.all.dim, aten.argmax.default],
    lambda rng: ((torch.rand(2, 3, 4), rng.choice([0, 1, -1])), {}),
)  # fmt: skip
def reduce_dims(call: Call) -> AxisSpec:
    """Reductions over named dimensions, kept as size 1 or dropped."""
    x = call.operands[0]
    dims = normal_dims(call.arg(1, "dim"), len(x))
    return over_dims(x, dims, call.results, keep=len(call.results[0]) == len(x))


@register(
    [aten.mean.default, aten.sum.default, aten.max.default, aten.min.default], lambda rng: ((torch.rand(3, 4),), {})
)
def reduce_all(call: Call) -> AxisSpec:
    """Reductions to a scalar."""
    x = call.operands[0]
    return over_dims(x, range(len(x)), call.results, keep=False)


@register(aten.linalg_vector_norm.default, lambda rng: ((torch.rand(2, 3, 4), 2.0, [1], True), {}))
def vector_norm(call: Call) -> AxisSpec:
    """The norm over named dimensions."""
    x = call.operands[0]
    return over_dims(x, normal_dims(call.arg(2, "dim"), len(x)), call.results, keep=len(call.results[0]) == len(x))


@register(
    [aten.max.dim, aten.min.dim, aten.sort.default, aten.topk.default],
    lambda rng: ((torch.rand(2, 3, 4), 1), {}),
)
def ordered(call: Call) -> AxisSpec:
    """Values with indices along one dimension. Sizes along it may differ, so it is contracted, never carried."""
    x = call.operands[0]
    position = 2 if len(call.args) > 2 and isinstance(call.args[2], int) and not isinstance(call.args[2], bool) else 1
    dim = normal_dims(call.arg(position, "dim", -1), len(x))[0]
    names = [f"d{i}" for i in range(len(x))]
    same_rank = len(call.results[0]) == len(x)
    out = " ".join("r" if i == dim else n for i, n in enumerate(names) if same_rank or i != dim)
    return einsum(f"{' '.join(names)} -> {out}, {out}", call.operands, call.results)
