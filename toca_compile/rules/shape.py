"""Ops that move, merge, split, cut or join dimensions and compute nothing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch

from toca_compile.ir.calls import Call, normal_dims
from toca_compile.ir.spec import AxisSpec, Dims, Window, einsum, elementwise, over_dims, regroup
from toca_compile.rules.registry import Args, Sample, register
from toca_compile.rules.samples import dim_of, dims_of, maybe, shape, sizes

aten = torch.ops.aten


def _names(rank: int) -> list[str]:
    return [f"d{i}" for i in range(rank)]


def _merge(rng: Random) -> Args:
    b, n, h, d = sizes(rng, 4)
    return (torch.randn(b, n, h, d), rng.choice([[b, n, h * d], [b * n, h, d], [b * n, h * d], [b, 1, n, h, d]])), {}


def _split(rng: Random) -> Args:
    b, n, h, d = sizes(rng, 4)
    return (torch.randn(b * n, h * d), rng.choice([[b, n, h, d], [b, n, h * d], [b * n, h, d]])), {}


def _regrouped(rng: Random) -> Args:
    """Any two shapes of as many elements: boundaries of one may fall inside dimensions of the other."""
    parts = sizes(rng, 4)
    return (torch.randn(_grouped(rng, parts)), _grouped(rng, rng.sample(parts, 4))), {}


def _grouped(rng: Random, parts: list[int]) -> list[int]:
    out = parts[:1]
    for part in parts[1:]:
        if rng.random() < 0.4:
            out[-1] *= part
        else:
            out.append(part)
    return out


@register([aten.view.default, aten.reshape.default, aten._unsafe_view.default], _merge, _split, _regrouped, size_arg=1)
def view(call: Call) -> AxisSpec:
    """Merges and splits dimensions; elements keep their order."""
    return regroup(call.operands[0], call.results[0])


def _run(rng: Random) -> Args:
    x = shape(rng, 1, 4)
    first = rng.randint(0, len(x) - 1)
    last = rng.randint(first, len(x) - 1)
    return (torch.randn(x), rng.choice([first, first - len(x)]), rng.choice([last, last - len(x)])), {}


@register(aten.flatten.using_ints, _run)
def flatten(call: Call) -> AxisSpec:
    """Merges a run of dimensions."""
    return regroup(call.operands[0], call.results[0])


def _inserted(rng: Random) -> Args:
    x = shape(rng)
    return (torch.randn(x), dim_of(rng, len(x) + 1)), {}


@register(aten.unsqueeze.default, _inserted)
def unsqueeze(call: Call) -> AxisSpec:
    """Adds a dimension of size 1."""
    return regroup(call.operands[0], call.results[0])


def _dropped(rng: Random) -> Args:
    x = shape(rng)
    dims = dims_of(rng, len(x), 0)
    for d in dims:
        x[d] = 1 if rng.random() < 0.6 else x[d]
    return (torch.randn(x), dims), {}


def _dropped_one(rng: Random) -> Args:
    (x, dims), _ = _dropped(rng)
    return (x, [*dims, 0][0]), {}


@register(aten.squeeze.dims, _dropped)
@register(aten.squeeze.dim, _dropped_one)
def squeeze(call: Call) -> AxisSpec:
    """Drops dimensions of size 1. A named one that is longer stays, and would go where a single index of it is left."""
    (x,) = call.operands
    spec = regroup(x, call.results[0])
    named = [d % len(x) for d in _listed(call.arg(1, "dim"))]
    return replace(spec, mixed=spec.mixed | {label for d in named for label in spec.operands[0][d]})


def _order(rng: Random) -> Args:
    x = shape(rng, 1, 4)
    return (torch.randn(x), [rng.choice([d, d - len(x)]) for d in rng.sample(range(len(x)), len(x))]), {}


@register(aten.permute.default, _order)
def permute(call: Call) -> AxisSpec:
    """Reorders dimensions."""
    names = _names(len(call.operands[0]))
    return einsum(f"{' '.join(names)} -> {' '.join(names[d] for d in call.args[1])}", call.operands, call.results)


def _exchanged(rng: Random) -> Args:
    x = shape(rng)
    return (torch.randn(x), dim_of(rng, len(x)), dim_of(rng, len(x))), {}


@register(aten.transpose.int, _exchanged)
def transpose(call: Call) -> AxisSpec:
    """Exchanges two dimensions."""
    names = _names(len(call.operands[0]))
    a, b = normal_dims(call.args[1:3], len(names))
    swapped = list(names)
    swapped[a], swapped[b] = names[b], names[a]
    return einsum(f"{' '.join(names)} -> {' '.join(swapped)}", call.operands, call.results)


@register(aten.t.default, lambda rng: ((torch.randn(shape(rng, 1, 2)),), {}))
def t(call: Call) -> AxisSpec:
    """Transposes a matrix."""
    return einsum("i j -> j i" if len(call.operands[0]) == 2 else "i -> i", call.operands, call.results)


def _stretched(rng: Random) -> Args:
    x = [1 if rng.random() < 0.4 else s for s in shape(rng)]
    stated = [rng.randint(2, 3) if s == 1 and rng.random() < 0.6 else rng.choice([s, -1]) for s in x]
    return (torch.randn(x), [*shape(rng, 0, 2), *stated]), {}


@register(aten.expand.default, _stretched, size_arg=1)
def expand(call: Call) -> AxisSpec:
    """Repeats dimensions of size 1: new index spaces that carry nothing."""
    return einsum("... -> ...", call.operands, call.results)


def _tiled(rng: Random) -> Args:
    x = shape(rng)
    return (torch.randn(x), [rng.randint(1, 2) for _ in range(len(x) + rng.randint(0, 1))]), {}


@register(aten.repeat.default, _tiled)
def repeat(call: Call) -> AxisSpec:
    """Tiles a value: in a dimension that is tiled, the tiles are the major factor."""
    (x,), (y,) = call.operands, call.results
    spec, lead = elementwise(call.operands, [x]), len(y) - len(x)
    tiles = [b // a if a else 1 for a, b in zip((*[1] * lead, *x), y, strict=True)]
    named = [(f"n{i}",) if count > 1 else () for i, count in enumerate(tiles)]
    result = tuple(n + d for n, d in zip(named, (*[()] * lead, *spec.results[0]), strict=True))
    sizes = {n: count for (n,), count in ((n, c) for n, c in zip(named, tiles, strict=True) if n)}
    return AxisSpec(spec.operands, (result,), {**spec.sizes, **sizes})


def _shifted(rng: Random) -> Args:
    """Along some dimensions, or, with none named, along all elements in a row."""
    x = shape(rng)
    dims = dims_of(rng, len(x)) if rng.random() < 0.7 else []
    return (torch.randn(x), [rng.randint(-5, 5) for _ in dims or [0]], *([dims] if dims else [])), {}


@register(aten.roll.default, _shifted)
def roll(call: Call) -> AxisSpec:
    """Moves elements along dimensions, or from one row into the next where none is named. Which index needs which
    depends on the size, so that a whole turn is none on a subset; only a shift by nothing leaves a dimension be."""
    (x,), shifts, dims = call.operands, _listed(call.arg(1, "shifts")), _listed(call.arg(2, "dims", []))
    if dims:
        moved = [d for d, shift in zip(dims, shifts, strict=True) if shift]
    else:
        moved = list(range(len(x))) if any(shifts) else []
    return over_dims(x, moved, call.results, keep=True)


def _reversed(rng: Random) -> Args:
    x = shape(rng)
    return (torch.randn(x), dims_of(rng, len(x), 0)), {}


@register(aten.flip.default, _reversed)
def flip(call: Call) -> AxisSpec:
    """Reverses dimensions."""
    return over_dims(call.operands[0], _listed(call.arg(1, "dims")), call.results, keep=True)


def _listed(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _laid(rng: Random) -> Args:
    """Segments of any length: several, one, single elements, nothing at all, and the empty vector that fits any."""
    x = shape(rng)
    dim = dim_of(rng, len(x))
    parts = []
    for _ in range(rng.randint(1, 3)):
        x[dim] = rng.choice([0, 1, 2, 3, 4])
        parts.append(torch.randn(x))
    if rng.random() < 0.2:
        parts.insert(rng.randint(0, len(parts)), torch.randn(0))
    return (parts, dim), {}


@register([aten.cat.default, aten.concat.default, aten.concatenate.default], _laid)
def cat(call: Call) -> AxisSpec:
    """Lays operands end to end: that dimension of the result is the sum of theirs. What is empty adds nothing, and a
    single operand that is not is the result."""
    rank = len(call.results[0])
    dim = normal_dims(call.arg(1, "dim", 0), rank)[0]
    segments = {f"s{i}": x[dim] if len(x) == rank else 0 for i, x in enumerate(call.operands)}
    parts = [name for name, size in segments.items() if size]
    spec = einsum(" ".join(_names(rank)) + "->" + " ".join(_names(rank)), call.results, call.results)
    operands = [_with(spec.results[0], dim, name) if len(x) == rank else ((name,),)
                for name, x in zip(segments, call.operands, strict=True)]  # fmt: skip
    sizes = {label: size for label, size in spec.sizes.items() if label != f"d{dim}"} | segments
    if len(parts) == 1:
        return AxisSpec(tuple(operands), (_with(spec.results[0], dim, parts[0]),), sizes)
    result = _with(spec.results[0], dim, "sum")
    return AxisSpec(
        tuple(operands),
        (result,),
        sizes | {"sum": sum(segments.values())},
        concat={"sum": tuple(parts)} if parts else {},
    )


def _with(dims: Dims, at: int, label: str) -> Dims:
    """Dimensions of which one is ``label``."""
    return (*dims[:at], (label,), *dims[at + 1 :])


def _side_by_side(rng: Random) -> Args:
    x = shape(rng)
    return ([torch.randn(x) for _ in range(rng.randint(1, 4))], dim_of(rng, len(x) + 1)), {}


@register(aten.stack.default, _side_by_side)
def stack(call: Call) -> AxisSpec:
    """Lays operands side by side along a new dimension."""
    rank = len(call.results[0])
    dim = normal_dims(call.arg(1, "dim", 0), rank)[0]
    names = _names(rank - 1)
    right = [*names[:dim], "new", *names[dim:]]
    return einsum(
        ",".join([" ".join(names)] * len(call.operands)) + "->" + " ".join(right), call.operands, call.results
    )


def _crossed(rng: Random) -> Args:
    vectors = [torch.randn(n) for n in sizes(rng, rng.randint(1, 3))]
    return (vectors,), {"indexing": rng.choice(["ij", "xy"])}


@register(aten.meshgrid.indexing, _crossed)
@register(aten.meshgrid.default, lambda rng: ((_crossed(rng)[0][0],), {}))
def meshgrid(call: Call) -> AxisSpec:
    """Each vector along a dimension of its own; by ``xy`` the first two of them change places."""
    names = _names(len(call.operands))
    out = [*names[:2][::-1], *names[2:]] if call.arg(1, "indexing") == "xy" else names
    return einsum(f"{','.join(names)} -> {','.join([' '.join(out)] * len(names))}", call.operands, call.results)


def _cut(arg: Callable[[Random, int], Any]) -> Sample:
    def sample(rng: Random) -> Args:
        x = shape(rng)
        dim = dim_of(rng, len(x))
        x[dim] = rng.randint(1, 7)
        return (torch.randn(x), arg(rng, x[dim]), dim), {}

    return sample


def _summands(rng: Random, whole: int) -> list[int]:
    parts: list[int] = []
    while sum(parts) < whole:
        parts.append(rng.randint(1, whole - sum(parts)))
    return parts


@register(aten.split.Tensor, _cut(lambda rng, n: rng.randint(1, n + 1)))
@register(aten.chunk.default, _cut(lambda rng, n: rng.randint(1, 4)))
@register(aten.split_with_sizes.default, _cut(_summands))
def split(call: Call) -> AxisSpec:
    """Cuts a dimension into windows."""
    x = call.operands[0]
    dim = normal_dims(call.arg(2, "dim", 0), len(x))[0]
    starts, at = [], 0
    for part in call.results:
        starts.append(at)
        at += part[dim]
    return _windows(x, dim, call.results, starts, 1)


def _window(rng: Random) -> Args:
    """Start and end from either end, far outside, or left out; a step."""
    x = shape(rng)
    dim = dim_of(rng, len(x))
    x[dim] = rng.randint(1, 7)
    start, end = rng.choice([None, *range(-9, 9)]), rng.choice([None, 2**63 - 1, *range(-9, 9)])
    if not range(x[dim])[slice(start, end)]:
        start = end = None
    return (torch.randn(x), dim, *maybe(rng, start, end, rng.randint(1, 3))), {}


@register(aten.slice.Tensor, _window)
def slice_rule(call: Call) -> AxisSpec:
    """One window of a dimension."""
    x = call.operands[0]
    dim = normal_dims(call.arg(1, "dim", 0), len(x))[0]
    return _windows(x, dim, call.results, [_start(call.arg(2, "start"), x[dim])], int(call.arg(4, "step", 1)))


def _narrowed(rng: Random) -> Args:
    x = shape(rng)
    dim = dim_of(rng, len(x))
    x[dim] = rng.randint(1, 7)
    start = rng.randint(0, x[dim] - 1)
    return (torch.randn(x), dim, rng.choice([start, start - x[dim]]), rng.randint(1, x[dim] - start)), {}


@register(aten.narrow.default, _narrowed)
def narrow(call: Call) -> AxisSpec:
    """One window of a dimension, from a start that may be counted from the end."""
    x, start = call.operands[0], int(call.args[2])
    dim = normal_dims(call.args[1], len(x))[0]
    return _windows(x, dim, call.results, [start + x[dim] if start < 0 else start], 1)


def _windows(x: tuple[int, ...], dim: int, results: list[tuple[int, ...]], starts: list[int], step: int) -> AxisSpec:
    names = _names(len(x))
    right = [" ".join(f"w{i}" if d == dim else n for d, n in enumerate(names)) for i in range(len(results))]
    spec = einsum(" ".join(names) + "->" + ",".join(right), [x], results)
    windows = {f"w{i}": Window(f"d{dim}", s, step) for i, s in enumerate(starts) if f"w{i}" in spec.sizes}
    return AxisSpec(spec.operands, spec.results, spec.sizes, windows=windows if x[dim] > 1 else {})


def _chosen(rng: Random) -> Args:
    x = shape(rng)
    dim = dim_of(rng, len(x))
    return (torch.randn(x), dim, dim_of(rng, x[dim])), {}


@register(aten.select.int, _chosen)
def select(call: Call) -> AxisSpec:
    """One index of a dimension, which then is gone."""
    names = _names(len(call.operands[0]))
    dim = normal_dims(call.args[1], len(names))[0]
    return einsum(
        f"{' '.join(names)} -> {' '.join(n for d, n in enumerate(names) if d != dim)}", call.operands, call.results
    )


def _along(rng: Random) -> Args:
    x = shape(rng)
    return (torch.randn(x), dim_of(rng, len(x))), {}


@register(aten.unbind.int, _along)
def unbind(call: Call) -> AxisSpec:
    """Every index of a dimension, as a value each."""
    names = _names(len(call.operands[0]))
    dim = normal_dims(call.arg(1, "dim", 0), len(names))[0]
    rest = " ".join(n for d, n in enumerate(names) if d != dim)
    return einsum(f"{' '.join(names)} -> {','.join([rest] * len(call.results))}", call.operands, call.results)


def _index_over(rng: Random) -> Args:
    (x, *where), _ = _chosen(rng)
    return (x, torch.randn_like(x.select(*where)), *where), {}


@register(aten.select_scatter.default, _index_over)
def overwrite(call: Call) -> AxisSpec:
    """A value with one index of a dimension overwritten; which element comes from where depends on its index."""
    x, _ = call.operands
    names = _names(len(x))
    dim = normal_dims(call.arg(2, "dim", 0), len(x))[0]
    out = [n + "!" if d == dim else n for d, n in enumerate(names)]
    inner = [n for d, n in enumerate(names) if d != dim]
    return einsum(f"{' '.join(names)}, {' '.join(inner)} -> {' '.join(out)}", call.operands, call.results)


def _window_over(rng: Random) -> Args:
    (x, *where), _ = _window(rng)
    return (x, torch.randn_like(aten.slice.Tensor(x, *where)), *where), {}


@register(aten.slice_scatter.default, _window_over)
def overwrite_window(call: Call) -> AxisSpec:
    """A value with a window of one dimension overwritten: what stood before the window, the new part, what stood after
    it, end to end. With a step between the new elements, which comes from where depends on its index."""
    x, part = call.operands
    names = _names(len(x))
    dim = normal_dims(call.arg(2, "dim", 0), len(x))[0]
    if int(call.arg(5, "step", 1)) != 1 and part[dim] > 1:
        inner, out = (" ".join(name if d == dim else n for d, n in enumerate(names)) for name in ("w", f"d{dim}!"))
        return einsum(f"{' '.join(names)}, {inner} -> {out}", call.operands, call.results)
    start = _start(call.arg(3, "start"), x[dim])
    end = start + part[dim]
    spec = einsum(" ".join(names) + "->" + " ".join(names), [x], call.results)
    operands = (_with(spec.operands[0], dim, "old"), _with(spec.operands[0], dim, "new"))
    sizes = {n: s for n, s in spec.sizes.items() if n != f"d{dim}"} | {"old": x[dim], "new": part[dim]}
    pieces = {"before": start, "new": part[dim], "after": x[dim] - end}
    windows = {name: Window("old", at) for name, at in (("before", 0), ("after", end)) if pieces[name]}
    parts = tuple(name for name, size in pieces.items() if size)
    if "new" not in parts:  # nothing is written
        return AxisSpec(operands, (_with(spec.operands[0], dim, "old"),), sizes)
    return AxisSpec(
        operands,
        (_with(spec.operands[0], dim, "sum"),),
        sizes | {"sum": x[dim], **pieces},
        concat={"sum": parts},
        windows=windows,
    )


def _start(start: int | None, size: int) -> int:
    """Where a slice begins that may be counted from the end, lie outside, or be left out."""
    at = int(start or 0)
    return max(at + size, 0) if at < 0 else min(at, size)


def _interleaved(rng: Random) -> Args:
    x = shape(rng)
    return (torch.randn(x), rng.randint(1, 3), *maybe(rng, rng.choice([None, dim_of(rng, len(x))]))), {}


@register(aten.repeat_interleave.self_int, _interleaved)
def repeat_interleave(call: Call) -> AxisSpec:
    """Each index of one dimension, or each element, several times: which time is the minor factor."""
    (x,), times, dim = call.operands, call.args[1], call.arg(2, "dim")
    spec = elementwise(call.operands, [x])
    again = ("again",) if times > 1 else ()
    dims = spec.results[0]
    if dim is None:
        dims = (tuple(label for d in dims for label in d) + again,)
    else:
        dims = tuple(d + again if i == dim % len(x) else d for i, d in enumerate(dims))
    return AxisSpec(spec.operands, (dims,), {**spec.sizes, **dict.fromkeys(again, times)})


def _halves(rng: Random) -> Args:
    x = shape(rng)
    dim = dim_of(rng, len(x)) if rng.random() < 0.7 else -1
    x[dim] = 2 * rng.randint(1, 2)
    return (torch.randn(x), *([] if dim == -1 else [dim])), {}


@register(aten.glu.default, _halves)
def glu(call: Call) -> AxisSpec:
    """One half of a dimension gates the other."""
    names = _names(len(call.operands[0]))
    dim = normal_dims(call.arg(1, "dim", -1), len(names))[0]
    right = ["half" if d == dim else n for d, n in enumerate(names)]
    return einsum(f"{' '.join(names)} -> {' '.join(right)}", call.operands, call.results)


def _shuffled(rng: Random) -> Args:
    factor, (b, c, h, w) = rng.randint(1, 2), sizes(rng, 4)
    return (torch.randn(*[b, b][: rng.randint(0, 2)], c * factor**2, h, w), factor), {}


def _unshuffled(rng: Random) -> Args:
    factor, (b, c, h, w) = rng.randint(1, 2), sizes(rng, 4)
    return (torch.randn(*[b, b][: rng.randint(0, 2)], c, h * factor, w * factor), factor), {}


def _pooled(rng: Random) -> Args:
    """Windows that shrink the picture, or keep its size: of one element, or padded."""
    b, c = sizes(rng, 2)
    x = torch.randn(*[b][: rng.randint(0, 1)], c, 4, 4)
    return (x, *rng.choice([([2, 2],), ([1, 1],), ([3, 3], [1, 1], [1, 1]), ([2, 2], [1, 1])])), {}


def _scaled(rng: Random) -> Args:
    return (torch.randn(*sizes(rng, 4)), None, rng.choice([[2.0, 2.0], [1.0, 1.0], [1.0, 2.0]])), {}


@register(aten.pixel_shuffle.default, _shuffled)
@register(aten.pixel_unshuffle.default, _unshuffled)
@register(aten.avg_pool2d.default, _pooled)
@register(aten.avg_pool3d.default, lambda rng: ((torch.randn(*sizes(rng, 2), 4, 4, 4), [2, 2, 2]), {}))
@register(aten.max_pool2d.default, _pooled)
@register(aten.upsample_nearest2d.vec, _scaled)
def resample(call: Call) -> AxisSpec:
    """Pictures to pictures of another size: only the batch is sure to pass through."""
    left, right = (" ".join(f"{letter}{i}" for i in range(1, len(call.operands[0]))) for letter in "xy")
    return einsum(f"b {left} -> b {right}", call.operands, call.results)


def _padded(rng: Random) -> Args:
    """Widths of either sign, in pairs from the last dimension on; often such that the size stays."""
    x = [s + 1 for s in shape(rng)]
    widths: list[int] = []
    for size in x[::-1][: rng.randint(1, len(x))]:
        before = rng.randint(1 - size, 2)
        widths += [before, -before if rng.random() < 0.6 and -before > -size else rng.randint(0, 2)]
    return (torch.randn(x), widths, *maybe(rng, 0.5)), {}


def _filled(rng: Random) -> Args:
    (x, widths, *value), _ = _padded(rng)
    return (x, widths, "constant", *value), {}


def _wrapped(rng: Random) -> Args:
    """The modes that fill in from the value itself, along its last dimensions."""
    spatial = rng.randint(1, 2)
    x = [s + 1 for s in sizes(rng, 2 + spatial)]
    widths: list[int] = []
    for _ in range(spatial):
        before = rng.randint(-1, 1)
        widths += [before, rng.choice([-before, rng.randint(0, 1)])]
    return (torch.randn(x), widths, rng.choice(["reflect", "replicate", "circular"])), {}


@register(aten.constant_pad_nd.default, _padded)
@register(aten.pad.default, _filled, _wrapped)
def pad(call: Call) -> AxisSpec:
    """Padded dimensions are new index spaces, of the old size too (one row cut off, one added, is a shift); those with
    no padding are carried."""
    (x,), widths = call.operands, list(call.arg(1, "pad"))
    padded = {len(x) - 1 - i // 2 for i, width in enumerate(widths) if width}
    names = _names(len(x))
    right = [f"p{d}" if d in padded else n for d, n in enumerate(names)]
    return einsum(f"{' '.join(names)} -> {' '.join(right)}", call.operands, call.results)


@register(aten.view_as_complex.default, lambda rng: ((torch.randn(*shape(rng), 2),), {}))
def view_as_complex(call: Call) -> AxisSpec:
    """The last dimension, real and imaginary part, becomes one element."""
    names = _names(len(call.operands[0]))
    return einsum(f"{' '.join(names)} -> {' '.join(names[:-1])}", call.operands, call.results)
