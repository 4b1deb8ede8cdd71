"""Contractions: linear layers, matrix products, convolutions, embeddings."""

import itertools
from collections.abc import Sequence
from random import Random

import torch

from toca_compile.ir.calls import Call
from toca_compile.ir.spec import AxisSpec, einsum
from toca_compile.rules.registry import Args, Sample, Work, register
from toca_compile.rules.samples import broadcast, shape, sizes

aten = torch.ops.aten


def _linear(rng: Random) -> Args:
    i, o = sizes(rng, 2)
    bias = (torch.randn(o),) if rng.random() < 0.5 else ()
    return (torch.randn(*shape(rng, 0), i), torch.randn(o, i), *bias), {}


@register(aten.linear.default, _linear, trailing=True, work=Work.CONTRACT)
def linear(call: Call) -> AxisSpec:
    """``y = x Wᵀ + b``: mixes the features of each row, nothing else."""
    return einsum("... i, o i, o -> ... o", call.operands, call.results)


def _product(batch: bool) -> Sample:
    def sample(rng: Random) -> Args:
        b, i, k, j = sizes(rng, 4)
        lead = [b] if batch else []
        return (torch.randn(*lead, i, k), torch.randn(*lead, k, j)), {}

    return sample


def _product_and_bias(batch: bool) -> Sample:
    def sample(rng: Random) -> Args:
        left, right = _product(batch)(rng)[0]
        bias = torch.randn(broadcast(rng, [*left.shape[:-1], right.shape[-1]]))
        return (bias, left, right), {name: rng.choice([0, 1, 0.5]) for name in ("beta", "alpha") if rng.random() < 0.3}

    return sample


def _integers(rng: Random) -> Args:
    """A product of int8 matrices."""
    i, k, j = sizes(rng, 3)
    return tuple(torch.randint(-8, 8, at, dtype=torch.int8) for at in ((i, k), (k, j))), {}


@register(aten.mm.default, _product(False), work=Work.CONTRACT)
@register(aten._int_mm.default, _integers, work=Work.CONTRACT)
def mm(call: Call) -> AxisSpec:
    """A matrix product."""
    return einsum("i k, k j -> i j", call.operands, call.results)


def _int8_weight(rng: Random) -> Args:
    """Rows, an int8 weight and a scale for each of its outputs."""
    i, k, j = sizes(rng, 3)
    return (torch.randn(i, k), torch.randint(-8, 8, (j, k), dtype=torch.int8), torch.rand(j)), {}


@register(aten._weight_int8pack_mm.default, _int8_weight, work=Work.CONTRACT)
def scaled_mm(call: Call) -> AxisSpec:
    """A product with an int8 weight whose outputs have a scale each."""
    return einsum("i k, j k, j -> i j", call.operands, call.results)


@register(aten.outer.default, lambda rng: (tuple(torch.randn(n) for n in sizes(rng, 2)), {}))
def outer(call: Call) -> AxisSpec:
    """Every pair of elements of two vectors."""
    return einsum("i, j -> i j", call.operands, call.results)


@register(aten.bmm.default, _product(True), work=Work.CONTRACT)
def bmm(call: Call) -> AxisSpec:
    """A batch of matrix products."""
    return einsum("b i k, b k j -> b i j", call.operands, call.results)


@register(aten.addmm.default, _product_and_bias(False), work=Work.CONTRACT)
def addmm(call: Call) -> AxisSpec:
    """A matrix product with a bias that broadcasts."""
    bias = " ".join(["i", "j"][2 - len(call.operands[0]) :])
    return einsum(f"{bias}, i k, k j -> i j", call.operands, call.results)


@register(aten.baddbmm.default, _product_and_bias(True), work=Work.CONTRACT)
def baddbmm(call: Call) -> AxisSpec:
    """A batch of matrix products with a bias."""
    bias = " ".join(["b", "i", "j"][3 - len(call.operands[0]) :])
    return einsum(f"{bias}, b i k, b k j -> b i j", call.operands, call.results)


def _matrices(rng: Random) -> Args:
    """Matrices, batches of them that broadcast, and vectors."""
    i, k, j = sizes(rng, 3)
    lead = shape(rng)
    left, right = ([*(broadcast(rng, lead) if rng.random() < 0.6 else []), *ends] for ends in ((i, k), (k, j)))
    drop = rng.choice(["", "", "", "left", "right", "both"])
    left = [k] if drop in ("left", "both") else left
    right = [k] if drop in ("right", "both") else right
    return (torch.randn(left), torch.randn(right)), {}


@register(aten.matmul.default, _matrices, work=Work.CONTRACT)
def matmul(call: Call) -> AxisSpec:
    """A product over the last dimension of the first and the last but one of the second operand."""
    a, b = (len(s) for s in call.operands)
    left = "k" if a == 1 else "... i k"
    right = "k" if b == 1 else "... k j"
    out = ("... " if max(a, b) > 2 else "") + ("i " if a > 1 else "") + ("j" if b > 1 else "")
    if a > 1 and max(a, b) <= 2:
        left = "i k"
    if b > 1 and max(a, b) <= 2:
        right = "k j"
    return einsum(f"{left}, {right} -> {out}", call.operands, call.results)


def _equation(rng: Random) -> Args:
    """One or two operands over a few letters: contractions, broadcasts, diagonals, an ellipsis, no right side."""
    size_of = dict(zip("abcDE", sizes(rng, 5), strict=True))
    lead = shape(rng, 1, 2)
    terms, operands = [], []
    for _ in range(rng.randint(1, 2)):
        letters = [rng.choice("abcDE") for _ in range(rng.randint(1, 4))]
        before = broadcast(rng, lead) if rng.random() < 0.4 else []
        terms.append(("..." if before else "") + "".join(letters))
        ones = {x for x in letters if rng.random() < 0.1}
        operands.append(torch.randn(*before, *(1 if x in ones else size_of[x] for x in letters)))
    out = rng.sample(sorted({x for t in terms for x in t if x != "."}), 1)
    out += [x for x in "abcDE" if x not in out and any(x in t for t in terms) and rng.random() < 0.7]
    dots = "..." if any("..." in t for t in terms) else ""
    right = rng.choice([f"->{dots}{''.join(out)}", f" -> {''.join(out)}{dots}", ""])
    return (",".join(terms) + right, operands), {}


@register(
    aten.einsum.default,
    _equation,
    lambda rng: (("bqd,bkd->bqk", [torch.randn(2, 3, 4), torch.randn(2, 5, 4)]), {}),
    lambda rng: (("nhwpqc->nchpwq", [torch.randn(2, 3, 4, 2, 2, 3)]), {}),
    work=Work.CONTRACT,
)
def einsum_rule(call: Call) -> AxisSpec:
    """An einsum is its own spec. A letter that an operand has twice is its diagonal: of either dimension alone, no
    subset of it is a subset of the other."""
    equation = call.args[0].replace(" ", "")
    left, _, right = equation.partition("->")
    if not right:
        letters = [c for c in sorted(set(left)) if c.isalpha() and left.count(c) == 1]
        right = ("..." if "..." in left else "") + "".join(letters)
    diagonal = {c for term in left.split(",") for c in term if c.isalpha() and term.count(c) > 1}
    count = itertools.count()

    def spaced(term: str) -> str:
        names = term.replace("...", "…")
        return " ".join("..." if c == "…" else f"{c}{next(count)}" if c in diagonal else c for c in names)

    pattern = ",".join(spaced(t) for t in left.split(",")) + "->" + spaced(right)
    return einsum(pattern, call.operands, call.results)


def conv(call: Call) -> AxisSpec:
    """A convolution carries the batch only: positions of the result are a new index space (the patch grid). One of
    single positions is a linear layer at each."""
    return _convolution(call, "o j", pointwise=_each_alone(call))


def conv_transpose(call: Call) -> AxisSpec:
    """As a convolution, with the weight's channels exchanged."""
    return _convolution(call, "j o")


def _each_alone(call: Call) -> bool:
    """Whether a convolution reads, for each position, that position alone."""
    padding = call.arg(4, "padding", 0)
    around = () if padding in ("same", "valid") else _each(padding)
    return not any(around) and {*call.operands[1][2:], *_each(call.arg(3, "stride", 1))} == {1}


def _each(value: int | Sequence[int]) -> Sequence[int]:
    return (value,) if isinstance(value, int) else value


def _convolution(call: Call, channels: str, *, pointwise: bool = False) -> AxisSpec:
    """In groups, which channels of the input an output channel reads depends on its place."""
    space = range(len(call.operands[0]) - 2)
    inside, taps, outside = (" ".join(f"{letter}{i}" for i in space) for letter in "stg")
    outside = inside if pointwise else outside
    out = "o"
    if call.arg(6, "groups", 1) != 1:
        channels, out = channels.replace("o", "c"), "o!"
    return einsum(f"b i {inside}, {channels} {taps}, o -> b {out} {outside}", call.operands, call.results)


def _images(space: int, transposed: bool = False, padding: Sequence[str] = ()) -> Sample:
    def sample(rng: Random) -> Args:
        b, channels, taps = sizes(rng, 3)
        groups, each = rng.choice([(1, channels), (channels, 1), (2, 2)])
        out = groups * rng.randint(1, 3)
        weight = [groups * each, out // groups] if transposed else [out, each]
        bias = torch.randn(out) if rng.random() < 0.5 else None
        args = [torch.randn(b, groups * each, *[5] * space), torch.randn(*weight, *[min(taps, 3)] * space), bias]
        if padding:
            return (*args, [1] * space, rng.choice(padding), [1] * space, groups), {}
        stride = [rng.choice([1, 1, 2])] * space
        around = [rng.choice([0, 0, 1])] * space
        more = ([0] * space, groups) if transposed else ([1] * space, groups)
        return (*args, stride, around, *more), {}

    return sample


register(aten.conv1d.default, _images(1), work=Work.CONTRACT)(conv)
register(aten.conv2d.default, _images(2), work=Work.CONTRACT)(conv)
register(aten.conv2d.padding, _images(2, padding=("same", "valid")), work=Work.CONTRACT)(conv)
register(aten.conv3d.default, _images(3), work=Work.CONTRACT)(conv)
register(aten.conv_transpose1d.default, _images(1, True), work=Work.CONTRACT)(conv_transpose)
register(aten.conv_transpose2d.input, _images(2, True), work=Work.CONTRACT)(conv_transpose)


def _table(rng: Random) -> Args:
    rows, width = sizes(rng, 2)
    padding = (rng.choice([-1, 0]),) if rng.random() < 0.5 else ()
    return (torch.randn(rows, width), torch.randint(rows, shape(rng, 0)), *padding), {}


@register(aten.embedding.default, _table)
def embedding(call: Call) -> AxisSpec:
    """A table looked up by index: each index yields its own row; the table is read whole."""
    return einsum("v c, ... -> ... c", call.operands, call.results)
