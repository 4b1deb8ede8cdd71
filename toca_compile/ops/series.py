"""What a value did from full step to full step, and where it is going."""

from collections.abc import Sequence
from math import factorial

import torch
from torch import Tensor

from toca_compile.ops.registry import op


@op("difference(Tensor new, Tensor old, SymInt steps) -> Tensor")
def difference(new: Tensor, old: Tensor, steps: int) -> Tensor:
    """(new − old) / steps in float32: the slope of a value between two full steps (TaylorSeer, section 3.2)."""
    return (new.float() - old.float()) / steps


@op("forecast(Tensor cache, Tensor difference, SymInt power, int order) -> Tensor")
def forecast(cache: Tensor, difference: Tensor, power: int, order: int) -> Tensor:
    """One more term of a series: cache + difference · power / order!. In a Taylor series ``power`` is xᵒʳᵈᵉʳ for x
    steps since the last full one; Newton's polynomial has the product of the distances to the full steps, and order
    0."""
    return cache.float() + difference.float() * power / factorial(order)


@op("weighted(Tensor value, SymInt weight) -> Tensor")
def weighted(value: Tensor, weight: int) -> Tensor:
    """value · weight · 2⁻³² in float32: a term of a sum whose weights are host numbers."""
    return value.float() * (weight * 2.0**-32)


@op("by_channel(Tensor[] parts, int[] groups) -> Tensor")
def by_channel(parts: Sequence[Tensor], groups: Sequence[int]) -> Tensor:
    """Of each channel, the last dimension, what the part of its group has."""
    own = torch.tensor(groups, device=parts[0].device)
    value = parts[0]
    for group, part in enumerate(parts[1:], 1):
        value = torch.where(own == group, part, value)
    return value


@op("store_at_(Tensor(a!) ring, SymInt place, Tensor value) -> Tensor(a!)")
def store_at_(ring: Tensor, place: int, value: Tensor) -> Tensor:
    """Copy ``value`` into ``ring[place]`` of ``[places, …]``, in place; returns ``ring``."""
    at = torch.zeros(1, dtype=torch.int64, device=ring.device) + place
    return ring.index_copy_(0, at, value.to(ring.dtype).unsqueeze(0))


@op("token_age(Tensor stamp, SymInt since, SymInt step) -> Tensor")
def token_age(stamp: Tensor, since: int, step: int) -> Tensor:
    """Steps since each token was last computed: alone (``stamp``, int32 ``[batch, tokens]``) or with all
    (``since``)."""
    return step - stamp.clamp(min=since)


@op("difference_tokens(Tensor new, Tensor old, Tensor age, int dim, int batch_dim, int span=1) -> Tensor")
def difference_tokens(new: Tensor, old: Tensor, age: Tensor, dim: int, batch_dim: int, span: int = 1) -> Tensor:
    """As ``difference``, each token over its own age ``[batch, tokens]``."""
    return (new.float() - old.float()) / _laid(age, new, dim, batch_dim, span)


@op(
    "forecast_tokens(Tensor cache, Tensor difference, Tensor age, SymInt used, int order, int dim, "
    "int batch_dim, int span=1) -> Tensor"
)
def forecast_tokens(
    cache: Tensor, difference: Tensor, age: Tensor, used: int, order: int, dim: int, batch_dim: int, span: int = 1
) -> Tensor:
    """As ``forecast`` in a Taylor series, each token from its own age; ``used`` 0 leaves the term out."""
    factor = _laid(age, cache, dim, batch_dim, span).float() ** order * used / factorial(order)
    return cache.float() + difference.float() * factor


def _laid(age: Tensor, like: Tensor, dim: int, batch_dim: int, span: int) -> Tensor:
    """``[batch, tokens]`` with the rank of ``like``, whose tokens lie in ``span`` dimensions from ``dim`` on (or, with
    its samples before them, in one)."""
    shape = [1] * like.dim()
    shape[dim : dim + span] = like.shape[dim : dim + span]
    if batch_dim >= 0:
        shape[batch_dim] = like.shape[batch_dim]
    return (age if batch_dim <= dim else age.t()).reshape(shape)


@op("relative_change(Tensor now, Tensor before) -> Tensor")
def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """mean|now − before| / mean|before|, a float32 scalar: what FirstBlockCache holds against its threshold."""
    old = before.float()
    return (now.float() - old).abs().mean() / old.abs().mean()


@op("relative_rate(Tensor out, Tensor out_before, Tensor now, Tensor before) -> Tensor")
def relative_rate(out: Tensor, out_before: Tensor, now: Tensor, before: Tensor) -> Tensor:
    """mean|out − out_before| / mean|now − before|, a float32 scalar: EasyCache's transformation rate."""
    return (out.float() - out_before.float()).abs().mean() / (now.float() - before.float()).abs().mean()


@op("expected_change(Tensor now, Tensor before, Tensor out, Tensor rate) -> Tensor")
def expected_change(now: Tensor, before: Tensor, out: Tensor, rate: Tensor) -> Tensor:
    """rate · mean|now − before| / mean|out|, a float32 scalar: the change of ``out`` that EasyCache expects."""
    return rate * (now.float() - before.float()).abs().mean() / out.float().abs().mean()


@op("share_of_way(Tensor now, Tensor last, Tensor first) -> Tensor")
def share_of_way(now: Tensor, last: Tensor, first: Tensor) -> Tensor:
    """mean|now − first| / mean|last − first|, a float32 scalar: how far DiCache takes a value to be on its way from
    ``first`` (0) to ``last`` (1)."""
    start = first.float()
    return (now.float() - start).abs().mean() / (last.float() - start).abs().mean()
