"""Ops that move, merge, split, cut or join dimensions and compute nothing."""

from random import Random

import torch

from toca_compile.ir.calls import Call, normal_dims
from toca_compile.ir.spec import AxisSpec, Dim, Window, einsum, over_dims, regroup
from toca_compile.rules.registry import Args, register

aten = torch.ops.aten


def _names(rank: int) -> list[str]:
    return [f"d{i}" for i in range(rank)]


def _merge(rng: Random) -> Args:
    b, n, h, d = (rng.randint(2, 4) for _ in range(4))
    return (torch.randn(b, n, h, d), rng.choice([[b, n, h * d], [b * n, h, d], [b * n, h * d], [b, 1, n, h, d]])), {}


def _split(rng: Random) -> Args:
    b, n, h, d = (rng.randint(2, 4) for _ in range(4))
    return (torch.randn(b * n, h * d), rng.choice([[b, n, h, d], [b, n, h * d], [b * n, h, d]])), {}


@register([aten.view.default, aten.reshape.default, aten._unsafe_view.default], _merge, _split, size_arg=1)
def view(call: Call) -> AxisSpec:
    """Merges and splits dimensions; elements keep their order."""
    return regroup(call.operands[0], call.results[0])


@register(aten.flatten.using_ints, lambda rng: ((torch.randn(2, 3, 4), 1, 2), {}))
def flatten(call: Call) -> AxisSpec:
    """Merges a run of dimensions."""
    return regroup(call.operands[0], call.results[0])


@register(
    [aten.unsqueeze.default, aten.squeeze.dim],
    lambda rng: ((torch.randn(2, 1, 4), 1), {}),
)
def unit_dims(call: Call) -> AxisSpec:
    """Adds or drops dimensions of size 1."""
    return regroup(call.operands[0], call.results[0])


@register(aten.squeeze.dims, lambda rng: ((torch.randn(2, 1, 4, 1), [1, 3]), {}))
def squeeze_dims(call: Call) -> AxisSpec:
    """Drops dimensions of size 1."""
    return regroup(call.operands[0], call.results[0])


@register(aten.permute.default, lambda rng: ((torch.randn(2, 3, 4), rng.sample(range(3), 3)), {}))
def permute(call: Call) -> AxisSpec:
    """Reorders dimensions."""
    names = _names(len(call.operands[0]))
    return einsum(f"{' '.join(names)} -> {' '.join(names[d] for d in call.args[1])}", call.operands, call.results)


@register(aten.transpose.int, lambda rng: ((torch.randn(2, 3, 4), rng.randint(0, 2), -1), {}))
def transpose(call: Call) -> AxisSpec:
    """Exchanges two dimensions."""
    names = _names(len(call.operands[0]))
    a, b = normal_dims(call.args[1:3], len(names))
    swapped = list(names)
    swapped[a], swapped[b] = names[b], names[a]
    return einsum(f"{' '.join(names)} -> {' '.join(swapped)}", call.operands, call.results)


@register(aten.t.default, lambda rng: ((torch.randn(3, 4),), {}))
def t(call: Call) -> AxisSpec:
    """Transposes a matrix."""
    return einsum("i j -> j i" if len(call.operands[0]) == 2 else "i -> i", call.operands, call.results)


@register(aten.expand.default, lambda rng: ((torch.randn(2, 1, 4), [3, 2, 5, -1]), {}), size_arg=1)
def expand(call: Call) -> AxisSpec:
    """Repeats dimensions of size 1: new index spaces that carry nothing."""
    return einsum("... -> ...", call.operands, call.results)


@register(aten.repeat.default, lambda rng: ((torch.randn(2, 3), [2, 1, 1]), {}))
def repeat(call: Call) -> AxisSpec:
    """Tiles a value. A dimension that is tiled is a new index space: which rows repeat is not tracked."""
    (x,), (y,) = call.operands, call.results
    lead = len(y) - len(x)
    left = [f"d{i}" for i in range(len(x))]
    right = [f"n{i}" for i in range(lead)]
    right += [n if y[lead + i] == x[i] else f"r{i}" for i, n in enumerate(left)]
    return einsum(f"{' '.join(left)} -> {' '.join(right)}", call.operands, call.results)


@register(
    [aten.roll.default, aten.flip.default],
    lambda rng: ((torch.randn(2, 3, 4), [1], [1]), {}),
)
def displace(call: Call) -> AxisSpec:
    """Moves elements along dimensions: which index needs which changes, so those dimensions are mixed."""
    x = call.operands[0]
    dims = normal_dims(call.args[2] if len(call.args) > 2 else call.args[1], len(x))
    return over_dims(x, dims, call.results, keep=True)


@register(aten.cat.default, lambda rng: (([torch.randn(2, 3, 4), torch.randn(2, 2, 4)], 1), {}))
def cat(call: Call) -> AxisSpec:
    """Lays operands end to end: that dimension of the result is the sum of theirs."""
    kept = [s for s in call.operands if s != (0,)]
    rank = len(call.results[0])
    dim = normal_dims(call.arg(1, "dim", 0), rank)[0]
    names = _names(rank)
    left = [" ".join(f"s{i}" if d == dim else n for d, n in enumerate(names)) for i in range(len(kept))]
    spec = einsum(
        ",".join(left) + "->" + " ".join("sum" if d == dim else n for d, n in enumerate(names)), kept, call.results
    )
    parts = [f"s{i}" for i, s in enumerate(kept)]
    if len(kept) != len(call.operands) or any(s[dim] == 1 for s in kept):
        # A segment of one element has no label; the sum is then an index space of its own.
        return AxisSpec(_with_empty(call.operands, spec), spec.results, spec.sizes)
    return AxisSpec(spec.operands, spec.results, spec.sizes, concat={"sum": tuple(parts)})


def _with_empty(operands: list[tuple[int, ...]], spec: AxisSpec) -> tuple[tuple[Dim, ...], ...]:
    filled = iter(spec.operands)
    return tuple(((),) if s == (0,) else next(filled) for s in operands)


@register(aten.stack.default, lambda rng: (([torch.randn(2, 3), torch.randn(2, 3)], rng.choice([0, 1, 2, -1])), {}))
def stack(call: Call) -> AxisSpec:
    """Lays operands side by side along a new dimension."""
    rank = len(call.results[0])
    dim = normal_dims(call.arg(1, "dim", 0), rank)[0]
    names = _names(rank - 1)
    right = [*names[:dim], "new", *names[dim:]]
    return einsum(
        ",".join([" ".join(names)] * len(call.operands)) + "->" + " ".join(right), call.operands, call.results
    )


@register([aten.split.Tensor, aten.chunk.default], lambda rng: ((torch.randn(2, 6, 4), 2, 1), {}))
@register(aten.split_with_sizes.default, lambda rng: ((torch.randn(2, 6, 4), [2, 4], 1), {}))
def split(call: Call) -> AxisSpec:
    """Cuts a dimension into windows."""
    x = call.operands[0]
    dim = normal_dims(call.arg(2, "dim", 0), len(x))[0]
    starts, at = [], 0
    for part in call.results:
        starts.append(at)
        at += part[dim]
    return _windows(x, dim, call.results, starts, 1)


@register(aten.slice.Tensor, lambda rng: ((torch.randn(2, 6, 4), 1, 2, 5), {}))
def slice_rule(call: Call) -> AxisSpec:
    """One window of a dimension."""
    x = call.operands[0]
    dim = normal_dims(call.arg(1, "dim", 0), len(x))[0]
    start = call.arg(2, "start") or 0
    start = max(start + x[dim], 0) if start < 0 else min(start, x[dim])
    return _windows(x, dim, call.results, [int(start)], int(call.arg(4, "step", 1)))


@register(aten.narrow.default, lambda rng: ((torch.randn(2, 6, 4), 1, 2, 3), {}))
def narrow(call: Call) -> AxisSpec:
    """One window of a dimension."""
    dim = normal_dims(call.args[1], len(call.operands[0]))[0]
    return _windows(call.operands[0], dim, call.results, [int(call.args[2])], 1)


def _windows(x: tuple[int, ...], dim: int, results: list[tuple[int, ...]], starts: list[int], step: int) -> AxisSpec:
    names = _names(len(x))
    right = [" ".join(f"w{i}" if d == dim else n for d, n in enumerate(names)) for i in range(len(results))]
    spec = einsum(" ".join(names) + "->" + ",".join(right), [x], results)
    windows = {f"w{i}": Window(f"d{dim}", s, step) for i, s in enumerate(starts) if f"w{i}" in spec.sizes}
    return AxisSpec(spec.operands, spec.results, spec.sizes, windows=windows if x[dim] > 1 else {})


@register(aten.select.int, lambda rng: ((torch.randn(2, 3, 4), 1, 0), {}))
def select(call: Call) -> AxisSpec:
    """One index of a dimension, which then is gone."""
    names = _names(len(call.operands[0]))
    dim = normal_dims(call.args[1], len(names))[0]
    return einsum(
        f"{' '.join(names)} -> {' '.join(n for d, n in enumerate(names) if d != dim)}", call.operands, call.results
    )


@register(aten.unbind.int, lambda rng: ((torch.randn(3, 2, 4), rng.choice([0, 1, -1])), {}))
def unbind(call: Call) -> AxisSpec:
    """Every index of a dimension, as a value each."""
    names = _names(len(call.operands[0]))
    dim = normal_dims(call.arg(1, "dim", 0), len(names))[0]
    rest = " ".join(n for d, n in enumerate(names) if d != dim)
    return einsum(f"{' '.join(names)} -> {','.join([rest] * len(call.results))}", call.operands, call.results)


@register(aten.slice_scatter.default, lambda rng: ((torch.randn(2, 6, 4), torch.randn(2, 3, 4), 1, 0, 6, 2), {}))
@register(aten.select_scatter.default, lambda rng: ((torch.randn(2, 3, 4), torch.randn(2, 4), 1, 0), {}))
def overwrite(call: Call) -> AxisSpec:
    """A value with a window of one dimension overwritten; which element comes from where depends on its index."""
    x, part = call.operands
    names = _names(len(x))
    dim = normal_dims(call.arg(2, "dim", 0), len(x))[0]
    inner = [n if d != dim else "w" for d, n in enumerate(names) if d != dim or len(part) == len(x)]
    out = [n + "!" if d == dim else n for d, n in enumerate(names)]
    return einsum(f"{' '.join(names)}, {' '.join(inner)} -> {' '.join(out)}", call.operands, call.results)


@register(aten.repeat_interleave.self_int, lambda rng: ((torch.randn(2, 3), 2, 1), {}))
def repeat_interleave(call: Call) -> AxisSpec:
    """Each index of one dimension several times: a new index space."""
    (x,), names = call.operands, _names(len(call.operands[0]))
    dim = call.arg(2, "dim")
    if dim is None:
        return einsum(f"{' '.join(names)} -> r", call.operands, call.results)
    right = ["r" if d == dim % len(x) else n for d, n in enumerate(names)]
    return einsum(f"{' '.join(names)} -> {' '.join(right)}", call.operands, call.results)


@register(aten.glu.default, lambda rng: ((torch.randn(2, 3, 4), -1), {}))
def glu(call: Call) -> AxisSpec:
    """One half of a dimension gates the other."""
    names = _names(len(call.operands[0]))
    dim = normal_dims(call.arg(1, "dim", -1), len(names))[0]
    right = ["half" if d == dim else n for d, n in enumerate(names)]
    return einsum(f"{' '.join(names)} -> {' '.join(right)}", call.operands, call.results)


@register([aten.pixel_shuffle.default], lambda rng: ((torch.randn(2, 4, 3, 3), 2), {}))
@register([aten.pixel_unshuffle.default], lambda rng: ((torch.randn(2, 1, 4, 4), 2), {}))
@register([aten.avg_pool2d.default], lambda rng: ((torch.randn(2, 2, 4, 4), [2, 2]), {}))
@register([aten.upsample_nearest2d.vec], lambda rng: ((torch.randn(2, 2, 4, 4), None, [2.0, 2.0]), {}))
def resample(call: Call) -> AxisSpec:
    """Pictures to pictures of another size: only the batch is sure to pass through."""
    left, right = (" ".join(f"{letter}{i}" for i in range(1, len(call.operands[0]))) for letter in "xy")
    return einsum(f"b {left} -> b {right}", call.operands, call.results)


@register([aten.constant_pad_nd.default, aten.pad.default], lambda rng: ((torch.randn(2, 3, 4), [1, 1]), {}))
def pad(call: Call) -> AxisSpec:
    """Padded dimensions are new index spaces; the others are carried."""
    (x,), (y,) = call.operands, call.results
    names = _names(len(x))
    right = [n if a == b else f"p{i}" for i, (n, a, b) in enumerate(zip(names, x, y, strict=True))]
    return einsum(f"{' '.join(names)} -> {' '.join(right)}", call.operands, call.results)


@register(aten.view_as_complex.default, lambda rng: ((torch.randn(2, 3, 2),), {}))
def view_as_complex(call: Call) -> AxisSpec:
    """The last dimension, real and imaginary part, becomes one element."""
    names = _names(len(call.operands[0]))
    return einsum(f"{' '.join(names)} -> {' '.join(names[:-1])}", call.operands, call.results)
