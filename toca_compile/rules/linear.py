"""Contractions: linear layers, matrix products, convolutions, embeddings."""

from random import Random

import torch

from toca_compile.ir.calls import Call
from toca_compile.ir.spec import AxisSpec, einsum
from toca_compile.rules.registry import Args, Sample, Work, register

aten = torch.ops.aten


def _linear(rng: Random) -> Args:
    i, o = rng.randint(2, 4), rng.randint(2, 4)
    bias = (torch.randn(o),) if rng.random() < 0.5 else ()
    return (torch.randn(2, rng.randint(2, 4), i), torch.randn(o, i), *bias), {}


@register(
    aten.linear.default, _linear, lambda rng: ((torch.randn(3, 4), torch.randn(5, 4)), {}),
    trailing=True, work=Work.CONTRACT,
)  # fmt: skip
def linear(call: Call) -> AxisSpec:
    """``y = x Wᵀ + b``: mixes the features of each row, nothing else."""
    return einsum("... i, o i, o -> ... o", call.operands, call.results)


@register(aten.mm.default, lambda rng: ((torch.randn(3, 4), torch.randn(4, 2)), {}), work=Work.CONTRACT)
def mm(call: Call) -> AxisSpec:
    """A matrix product."""
    return einsum("i k, k j -> i j", call.operands, call.results)


@register(aten.outer.default, lambda rng: ((torch.randn(3), torch.randn(4)), {}))
def outer(call: Call) -> AxisSpec:
    """Every pair of elements of two vectors."""
    return einsum("i, j -> i j", call.operands, call.results)


@register(aten.bmm.default, lambda rng: ((torch.randn(2, 3, 4), torch.randn(2, 4, 5)), {}), work=Work.CONTRACT)
def bmm(call: Call) -> AxisSpec:
    """A batch of matrix products."""
    return einsum("b i k, b k j -> b i j", call.operands, call.results)


@register(
    aten.addmm.default,
    lambda rng: ((torch.randn(5), torch.randn(3, 4), torch.randn(4, 5)), {}),
    lambda rng: ((torch.randn(3, 5), torch.randn(3, 4), torch.randn(4, 5)), {}),
    work=Work.CONTRACT,
)
def addmm(call: Call) -> AxisSpec:
    """A matrix product with a bias that broadcasts."""
    bias = " ".join(["i", "j"][2 - len(call.operands[0]) :])
    return einsum(f"{bias}, i k, k j -> i j", call.operands, call.results)


@register(
    aten.baddbmm.default,
    lambda rng: ((torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5)), {}),
    work=Work.CONTRACT,
)
def baddbmm(call: Call) -> AxisSpec:
    """A batch of matrix products with a bias."""
    bias = " ".join(["b", "i", "j"][3 - len(call.operands[0]) :])
    return einsum(f"{bias}, b i k, b k j -> b i j", call.operands, call.results)


@register(
    aten.matmul.default,
    lambda rng: ((torch.randn(2, 3, 4), torch.randn(4, 5)), {}),
    lambda rng: ((torch.randn(2, 3, 4, 5), torch.randn(2, 1, 5, 6)), {}),
    lambda rng: ((torch.randn(4, 5), torch.randn(5)), {}),
    work=Work.CONTRACT,
)
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


@register(
    aten.einsum.default,
    lambda rng: (("bqd,bkd->bqk", [torch.randn(2, 3, 4), torch.randn(2, 5, 4)]), {}),
    lambda rng: (("nhwpqc->nchpwq", [torch.randn(2, 3, 4, 2, 2, 3)]), {}),
    work=Work.CONTRACT,
)
def einsum_rule(call: Call) -> AxisSpec:
    """An einsum is its own spec."""
    equation = call.args[0].replace(" ", "")
    left, _, right = equation.partition("->")
    if not right:
        letters = [c for c in sorted(set(left)) if c.isalpha() and left.count(c) == 1]
        right = ("..." if "..." in left else "") + "".join(letters)

    def spaced(term: str) -> str:
        return " ".join(term.replace("...", "…")).replace("…", "...")

    pattern = ",".join(spaced(t) for t in left.split(",")) + "->" + spaced(right)
    return einsum(pattern, call.operands, call.results)


def conv(call: Call) -> AxisSpec:
    """A convolution carries the batch only: positions of the result are a new index space (the patch grid)."""
    return _convolution(call, "o j")


def conv_transpose(call: Call) -> AxisSpec:
    """As a convolution, with the weight's channels exchanged."""
    return _convolution(call, "i j")


def _convolution(call: Call, weight: str) -> AxisSpec:
    space = range(len(call.operands[0]) - 2)
    inside, taps, outside = (" ".join(f"{letter}{i}" for i in space) for letter in "stg")
    return einsum(f"b i {inside}, {weight} {taps}, o -> b o {outside}", call.operands, call.results)


def _images(space: int, stride: int) -> Sample:
    def sample(rng: Random) -> Args:
        return (torch.randn(2, 3, *[4] * space), torch.randn(3, 3, *[2] * space), None, [stride] * space), {}

    return sample


register(aten.conv1d.default, _images(1, 2), work=Work.CONTRACT)(conv)
register([aten.conv2d.default, aten.conv2d.padding], _images(2, 2), work=Work.CONTRACT)(conv)
register(aten.conv3d.default, _images(3, 2), work=Work.CONTRACT)(conv)
register(aten.conv_transpose1d.default, _images(1, 2), work=Work.CONTRACT)(conv_transpose)
register(aten.conv_transpose2d.input, _images(2, 2), work=Work.CONTRACT)(conv_transpose)


@register(aten.embedding.default, lambda rng: ((torch.randn(5, 3), torch.randint(0, 5, (2, 4))), {}))
def embedding(call: Call) -> AxisSpec:
    """A table looked up by index: each index yields its own row; the table is read whole."""
    return einsum("v c, ... -> ... c", call.operands, call.results)
