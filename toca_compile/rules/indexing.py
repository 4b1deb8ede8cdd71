"""Ops that pick elements by an index tensor, and ops that write by one."""

from collections.abc import Sequence
from random import Random

import torch

from toca_compile.errors import RuleError
from toca_compile.ir.calls import Call, normal_dims
from toca_compile.ir.spec import AxisSpec, einsum
from toca_compile.rules.registry import Args, Sample, register
from toca_compile.rules.samples import broadcast, dim_of, shape

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


def _along_dim(rng: Random) -> Args:
    whole = shape(rng)
    dim = dim_of(rng, len(whole))
    x = [s if i == dim % len(whole) or rng.random() < 0.8 else 1 for i, s in enumerate(whole)]
    index = [s if rng.random() < 0.8 else 1 for s in whole]
    index[dim] = rng.randint(1, 5)
    return (torch.randn(x), torch.randint(x[dim], index), *([dim] if rng.random() < 0.9 else [])), {}


@register(aten.take_along_dim.default, _along_dim)
def take_along_dim(call: Call) -> AxisSpec:
    """As ``gather``, but value and index broadcast against each other; with no dimension, of all elements in a row."""
    x, index = call.operands
    along = call.arg(2, "dim")
    if along is None:
        left, right = (" ".join(f"{letter}{i}" for i in range(len(s))) for letter, s in (("x", x), ("i", index)))
        return einsum(f"{left}, {right} -> r", call.operands, call.results)
    dim = normal_dims(along, len(x))[0]
    left, right = (" ".join(f"{'xr'[k]}" if i == dim else f"d{i}" for i in range(len(x))) for k in range(2))
    return einsum(f"{left}, {right} -> {right}", call.operands, call.results)


def _picking(rng: Random, x: list[int]) -> list[torch.Tensor | None]:
    """Indices of some dimensions, which broadcast against each other; a missing one takes all of its dimension."""
    which = rng.sample(range(len(x)), rng.randint(1, len(x)))
    lead = shape(rng, 1, 2)
    index = [torch.randint(x[d], broadcast(rng, lead)) if d in which else None for d in range(len(x))]
    return index[: max(which) + 1]


def _picked(rng: Random) -> Args:
    x = shape(rng)
    return (torch.randn(x), _picking(rng, x)), {}


def _picked_apart(rng: Random) -> Args:
    """Dimensions that are no neighbours; with all sizes alike nothing but its place tells which is which."""
    size = rng.randint(2, 4)
    first, last = (torch.randint(size, (size,)) for _ in range(2))
    return (torch.randn(size, size, size, size), [*[None] * rng.randint(0, 1), first, None, last]), {}


@register(aten.index.Tensor, _picked, _picked_apart)
def index(call: Call) -> AxisSpec:
    """Elements by index tensors: the dimensions of those are the result's; the dimensions that they index are read
    whole. A mask picks as many as it has true elements, which no shape tells."""
    x, named, rows = _terms(call)
    out = " ".join(_placed(named, rows, [f"d{i}" for i in range(len(call.operands[0]))]))
    return einsum(f"{x} -> {out}", call.operands, call.results)


def _terms(call: Call) -> tuple[str, list[int], list[str]]:
    """The value and the index tensors as terms, the dimensions that are indexed, and those of the indices."""
    given = list(call.args[1])
    picks = [(d, t) for d, t in enumerate(given) if t is not None]
    if any(t.dtype in (torch.bool, torch.uint8) for _, t in picks):
        raise RuleError("a mask picks as many elements as are true in it")
    named, rank = [d for d, _ in picks], max(t.dim() for _, t in picks)
    rows = [f"r{i}" for i in range(rank)]
    value = " ".join(f"x{i}" if i in named else f"d{i}" for i in range(len(call.operands[0])))
    return ", ".join([value, *(" ".join(rows[rank - t.dim() :]) for _, t in picks)]), named, rows


def _placed(named: Sequence[int], rows: Sequence[str], names: Sequence[str]) -> list[str]:
    """Where the indices' dimensions stand: for those that they index, or in front if these are not neighbours."""
    kept = [(i, n) for i, n in enumerate(names) if i not in named]
    first = named[0] if named == list(range(named[0], named[-1] + 1)) else 0
    return [*(n for i, n in kept if i < first), *rows, *(n for i, n in kept if i >= first)]


def _put(rng: Random) -> Args:
    x = shape(rng)
    where = _picking(rng, x)
    values = torch.randn(
        broadcast(rng, list(torch.empty(x)[tuple(slice(None) if t is None else t for t in where)].shape))
    )
    return (torch.zeros(x), where, values, True), {}


def _masked_put(rng: Random) -> Args:
    """A mask over some of the first dimensions, and one value for all that are true, or one for each of the rest."""
    x = shape(rng)
    over = rng.randint(1, len(x))
    rest = [s if rng.random() < 0.7 else 1 for s in x[over:]]
    values = torch.randn(rest[rng.randint(0, len(rest)) :] if rng.random() < 0.5 else [1, *rest])
    return (torch.randn(x), [torch.rand(x[:over]) > 0.5], values), {}


@register(aten.index_put.default, _put, _masked_put)
def index_put(call: Call) -> AxisSpec:
    """A value with elements written, or added, by index: which element comes from where depends on its index. By a
    mask, and the same for all that are true in it, each element decides for itself."""
    masks = [t for t in call.args[1] if t is not None and t.dtype == torch.bool]
    if masks and len(call.args[1]) == 1:
        return _put_by_mask(call, masks[0].dim())
    x, named, rows = _terms(call)
    names = [f"d{i}" for i in range(len(call.operands[0]))]
    taken = _placed(named, rows, names)
    values = taken[len(taken) - len(call.operands[-1]) :]
    out = " ".join(f"x{i}!" if i in named else n for i, n in enumerate(names))
    return einsum(f"{x}, {' '.join(values)} -> {out}", call.operands, call.results)


def _put_by_mask(call: Call, over: int) -> AxisSpec:
    names = [f"d{i}" for i in range(len(call.operands[0]))]
    shape = call.operands[-1]
    values = ["true", *names[over:]][len(names) - over + 1 - len(shape) :]
    if values[:1] == ["true"] and shape[0] != 1:
        raise RuleError("each element that is true in the mask gets a value of its own")
    return einsum(
        f"{' '.join(names)}, {' '.join(names[:over])}, {' '.join(values)} -> {' '.join(names)}",
        call.operands, call.results,
    )  # fmt: skip


def _written(*extra: object, value: bool = False) -> Sample:
    """A source as large as the index, or larger; an index as large as the value, or smaller."""

    def sample(rng: Random) -> Args:
        x = shape(rng)
        dim = dim_of(rng, len(x))
        index = [s if rng.random() < 0.8 else rng.randint(1, s) for s in x]
        index[dim] = rng.randint(1, x[dim])
        # Each element is written once at most: the order of writes is not the op's to say.
        where = torch.stack([torch.randperm(x[dim]) for _ in range(torch.Size(index).numel() // index[dim])])
        places = where[:, : index[dim]].reshape(*(s for i, s in enumerate(index) if i != dim % len(x)), index[dim])
        source = torch.rand([s if rng.random() < 0.8 else s + 1 for s in index])
        return (torch.rand(x), dim, places.movedim(-1, dim), 0.5 if value else source, *extra), {}

    return sample


@register([aten.scatter.src, aten.scatter_add.default], _written())
@register(aten.scatter.value, _written(value=True))
@register(aten.scatter_reduce.two, _written("sum"), _written("amax"))
def scatter(call: Call) -> AxisSpec:
    """Elements written along one dimension by index, which depends on where they stand in it. Another dimension is
    carried where all have the same size; what is larger is written to, or read, at its first elements."""
    dim, rank = normal_dims(call.arg(1, "dim"), len(call.operands[0]))[0], len(call.operands[0])
    value, index, *source = call.operands
    same = [i != dim and len({s[i] for s in call.operands}) == 1 for i in range(rank)]
    terms = [
        " ".join(f"d{i}" if same[i] else f"{letter}{i}" for i in range(rank))
        for letter, _ in zip("xis", (value, index, *source), strict=False)
    ]
    out = " ".join(f"d{i}" if same[i] else f"x{i}!" for i in range(rank))
    if source and source[0][dim] == index[dim]:
        terms[2] = " ".join(f"i{i}" if i == dim else n for i, n in enumerate(terms[2].split()))
    return einsum(f"{','.join(terms)} -> {out}", call.operands, call.results)


def _rows_written(rng: Random) -> Args:
    x = shape(rng)
    dim = dim_of(rng, len(x))
    index = torch.randperm(x[dim])[: rng.randint(1, x[dim])]
    source = [*x]
    source[dim] = len(index)
    return (torch.randn(x), dim, index, torch.randn(source)), {}


@register([aten.index_add.default, aten.index_copy.default], _rows_written)
@register(aten.index_fill.int_Scalar, lambda rng: ((*_rows_written(rng)[0][:3], 0.5), {}))
def write_rows(call: Call) -> AxisSpec:
    """Rows written, or added, by index along one dimension."""
    names = [f"d{i}" for i in range(len(call.operands[0]))]
    dim = normal_dims(call.arg(1, "dim"), len(names))[0]
    rows, out = (" ".join(name if i == dim else n for i, n in enumerate(names)) for name in ("r", f"d{dim}!"))
    source = f", {rows}" if len(call.operands) > 2 else ""
    return einsum(f"{' '.join(names)}, r{source} -> {out}", call.operands, call.results)


def _classes(rng: Random) -> Args:
    return (torch.randint(4, shape(rng)), rng.randint(4, 6)), {}


@register(aten.one_hot.default, _classes)
def one_hot(call: Call) -> AxisSpec:
    """A new last dimension in which the index's own place is 1."""
    if call.arg(1, "num_classes", -1) < 0:
        raise RuleError("how many classes there are depends on the values")
    names = " ".join(f"d{i}" for i in range(len(call.operands[0])))
    return einsum(f"{names} -> {names} c", call.operands, call.results)


def _sought(rng: Random) -> Args:
    return (torch.rand(shape(rng)), torch.arange(rng.randint(2, 5)) / 5), {}


@register(aten.bucketize.Tensor, _sought)
def bucketize(call: Call) -> AxisSpec:
    """Where each element stands among boundaries, which are read whole."""
    return einsum("..., k -> ...", call.operands, call.results)
