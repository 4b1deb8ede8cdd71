"""Ops that act on each element alone, and ops that only make values."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch

from toca_compile.errors import RuleError
from toca_compile.ir.calls import Call
from toca_compile.ir.spec import AxisSpec, einsum, elementwise
from toca_compile.rules.registry import Args, Sample, Work, register
from toca_compile.rules.samples import broadcast, shape, sizes

aten = torch.ops.aten


def _one(*extra: Any, positive: bool = True, **kwargs: Any) -> Sample:
    def sample(rng: Random) -> Args:
        x = torch.rand(shape(rng)) + 0.1 if positive else torch.randn(shape(rng))
        return (x, *extra), kwargs

    return sample


def _several(count: int, *extra: Any, of: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> Sample:
    """``count`` operands that broadcast against each other."""

    def sample(rng: Random) -> Args:
        whole = shape(rng)
        return (*(of(torch.rand(broadcast(rng, whole)) + 0.1) for _ in range(count)), *extra), {}

    return sample


def _masked(*extra: Any, of: int) -> Sample:
    """A mask and ``of`` operands that broadcast against it."""

    def sample(rng: Random) -> Args:
        whole = shape(rng)
        values = [torch.rand(broadcast(rng, whole)) for _ in range(of)]
        return (torch.rand(broadcast(rng, whole)) > 0.5, *values, *extra), {}

    return sample


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x > 0.6


def elementwise_axes(call: Call) -> AxisSpec:
    """Everything broadcasts; each element of the result needs the same element of the operands."""
    return elementwise(call.operands, call.results)


UNARY = [
    aten.abs.default, aten.neg.default, aten.exp.default, aten.exp2.default, aten.expm1.default, aten.log.default,
    aten.log1p.default, aten.log2.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default,
    aten.square.default, aten.sin.default, aten.cos.default, aten.tan.default, aten.tanh.default, aten.atan.default,
    aten.sigmoid.default, aten.log_sigmoid.default, aten.relu.default, aten.relu6.default, aten.silu.default,
    aten.mish.default, aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default, aten.elu.default,
    aten.selu.default, aten.leaky_relu.default, aten.softplus.default, aten.erf.default, aten.sign.default,
    aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default, aten.isnan.default,
    aten.isinf.default, aten.logical_not.default, aten.clone.default, aten.alias.default, aten.detach.default,
    aten.contiguous.default, aten._to_copy.default, aten.zeros_like.default, aten.ones_like.default,
    aten.lift_fresh_copy.default, aten.nan_to_num.default, aten.isfinite.default, aten.celu.default, aten.log10.default,
    aten.sinh.default, aten.cosh.default, aten.asinh.default, aten.acos.default, aten.asin.default, aten.atanh.default,
    aten.erfc.default, aten.erfinv.default, aten.sinc.default, aten.frac.default, aten.sgn.default, aten.lgamma.default,
    aten.positive.default, aten.softshrink.default, aten.hardshrink.default, aten.logit.default, aten.angle.default,
]  # fmt: skip
register(UNARY, _one(), pointwise=True)(elementwise_axes)
register(aten.gelu.default, _one(positive=False), _one(approximate="tanh"), pointwise=True, work=Work.GELU)(
    elementwise_axes
)
register(aten.empty_like.default, _one(), pointwise=True)(elementwise_axes)
register(aten.pow.Scalar, lambda rng: ((2.0, torch.rand(shape(rng))), {}), pointwise=True)(elementwise_axes)


def _pair(rng: Random) -> Args:
    whole = shape(rng)
    return (torch.rand(whole), torch.rand(broadcast(rng, whole))), {}


register([aten.polar.default, aten.complex.default, aten.copy.default], _pair, pointwise=True)(elementwise_axes)
register(aten.bitwise_not.default, lambda rng: ((torch.rand(shape(rng)) > 0.5,), {}), pointwise=True)(elementwise_axes)
register(aten.clamp.default, _one(0.2, 0.8), pointwise=True)(elementwise_axes)
register(aten.clip.default, _one(0.2, 0.8), pointwise=True)(elementwise_axes)
register([aten.clamp_min.default, aten.clamp_max.default], _one(0.4), pointwise=True)(elementwise_axes)
register(aten.threshold.default, _one(0.4, 0.2), pointwise=True)(elementwise_axes)
register(aten.round.decimals, _one(decimals=1), pointwise=True)(elementwise_axes)
register([aten.full_like.default, aten.fill.Scalar], _one(3.0), pointwise=True)(elementwise_axes)
register(aten.fill.Tensor, _one(torch.tensor(2.0)))(elementwise_axes)
register([aten.to.dtype], _one(torch.float64), pointwise=True)(elementwise_axes)

WITH_SCALAR = [
    aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.rsub.Scalar, aten.pow.Tensor_Scalar,
    aten.remainder.Scalar, aten.fmod.Scalar, aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar,
    aten.gt.Scalar, aten.ge.Scalar, aten.floor_divide.Scalar, aten.float_power.Tensor_Scalar,
]  # fmt: skip
register(WITH_SCALAR, _one(1.5), pointwise=True)(elementwise_axes)

BINARY = [
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Tensor, aten.atan2.default,
    aten.maximum.default, aten.minimum.default, aten.remainder.Tensor, aten.fmod.Tensor, aten.eq.Tensor,
    aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.floor_divide.default,
    aten.true_divide.Tensor, aten.max.other, aten.min.other, aten.fmax.default, aten.fmin.default, aten.hypot.default,
    aten.copysign.Tensor, aten.logaddexp.default, aten.xlogy.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor,
    aten.heaviside.default,
]  # fmt: skip
register(BINARY, _several(2), pointwise=True)(elementwise_axes)
BITS = [
    aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default, aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor, aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor,
]  # fmt: skip
register(BITS, _several(2, of=_bits), pointwise=True)(elementwise_axes)
BITS_AND_SCALAR = [
    aten.__and__.Scalar, aten.__or__.Scalar, aten.__xor__.Scalar, aten.bitwise_and.Scalar, aten.bitwise_or.Scalar,
]  # fmt: skip
register(BITS_AND_SCALAR, lambda rng: ((torch.randint(9, shape(rng)), 3), {}), pointwise=True)(elementwise_axes)
register(aten.div.Tensor_mode, lambda rng: (_several(2)(rng)[0], {"rounding_mode": "floor"}), pointwise=True)(
    elementwise_axes
)
register(aten.div.Scalar_mode, _one(0.3, rounding_mode="floor"), pointwise=True)(elementwise_axes)
register(
    [aten.addcmul.default, aten.addcdiv.default, aten.lerp.Tensor, aten.clamp.Tensor], _several(3), pointwise=True
)(elementwise_axes)
register(aten.lerp.Scalar, _several(2, 0.3), pointwise=True)(elementwise_axes)
register(aten.where.self, _masked(of=2), pointwise=True)(elementwise_axes)
register(aten.where.ScalarOther, _masked(0.0, of=1), pointwise=True)(elementwise_axes)


def _filled(rng: Random) -> Args:
    mask, x = _masked(of=1)(rng)[0]
    return (x, mask, -1.0), {}


register(aten.masked_fill.Scalar, _filled, pointwise=True)(elementwise_axes)
# Its value must have no dimensions, so that it does not broadcast as operands of pointwise ops do.
register(aten.masked_fill.Tensor, lambda rng: ((*_filled(rng)[0][:2], torch.tensor(-1.0)), {}))(elementwise_axes)
register(aten.where.ScalarSelf, lambda rng: ((_masked(of=0)(rng)[0][0], 0.0, torch.rand(())), {}), pointwise=True)(
    elementwise_axes
)
register(aten.where.Scalar, _masked(1.0, 0.0, of=0), pointwise=True)(elementwise_axes)


@register(aten.dropout.default, _one(0.5, False), _one(0.0, True), pointwise=True)
def dropout(call: Call) -> AxisSpec:
    """Nothing at inference. One that drops draws other elements on a subset than it would on the whole."""
    if call.arg(2, "train") and call.arg(1, "p"):
        raise RuleError("elements are dropped at random")
    return elementwise(call.operands, call.results)


def _slopes(rng: Random) -> Args:
    x = sizes(rng, rng.randint(1, 4), one=False)
    return (torch.randn(x), torch.rand(x[1] if len(x) > 1 and rng.random() < 0.7 else 1)), {}


@register(aten.prelu.default, _slopes)
def prelu(call: Call) -> AxisSpec:
    """One slope for all, or one for each index of dimension 1 (the channels), whatever the rank."""
    x, slopes = call.operands
    names = " ".join(f"d{i}" for i in range(len(x)))
    return einsum(f"{names}, {'d1' if slopes else ''} -> {names}", call.operands, call.results)


@register(aten.view_as_real.default, lambda rng: ((torch.randn(shape(rng), dtype=torch.complex64),), {}))
def view_as_real(call: Call) -> AxisSpec:
    """Real and imaginary part become a last dimension."""
    spec = elementwise(call.operands, call.operands)
    return AxisSpec(spec.operands, (spec.results[0] + (("pair",),),), {**spec.sizes, "pair": 2})


def constant(call: Call) -> AxisSpec:
    """No operand: every dimension of the result is a new index space."""
    return einsum("->" + " ".join(f"d{i}" for i in range(len(call.results[0]))), [], call.results)


register(aten.arange.default, lambda rng: ((4,), {}))(constant)
register(aten.arange.start, lambda rng: ((1, 4), {}))(constant)
register(aten.arange.start_step, lambda rng: ((1, 7, 2), {}))(constant)
register(aten.linspace.default, lambda rng: ((0.0, 1.0, 5), {}))(constant)
register(aten.scalar_tensor.default, lambda rng: ((2.0,), {}))(constant)
register(aten.full.default, lambda rng: (([2, 3], 1.0), {}))(constant)
register([aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.rand.default, aten.randn.default],
         lambda rng: (([2, 3],), {}))(constant)  # fmt: skip
