"""Functional collectives: what processes that share a model's work send each other.

Each process has the same graph, and takes the same tokens (``passes/variants/select.py`` sees to that), so that a value
of another process is restricted as one's own.
"""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import torch
import torch.distributed as dist

from toca_compile.errors import RuleError
from toca_compile.ir.calls import Call
from toca_compile.ir.spec import AxisSpec, elementwise
from toca_compile.rules.registry import Args, register
from toca_compile.rules.samples import shape

_SAMPLES = "toca samples"


@cache
def _pretended() -> Any:
    """A group of two processes of which the other is not there: it is taken to have the same values."""
    c10d: Any = torch._C._distributed_c10d
    group = c10d.ProcessGroup(0, 2)
    group._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)
    there = c10d.FakeProcessGroup._create_internal(0, 2, c10d.FakeProcessGroup.Options())
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, there)
    c10d._register_process_group(_SAMPLES, group)
    return group  # which lives as long as somebody holds it


def _group() -> str:
    """Its name."""
    _pretended()
    return _SAMPLES


def _reduced(rng: Random) -> Args:
    return (torch.randn(shape(rng)), rng.choice(["sum", "max"]), _group()), {}


def _sent(rng: Random) -> Args:
    return (torch.randn(shape(rng)), 0, _group()), {}


def _gathered(rng: Random) -> Args:
    return (torch.randn(shape(rng)), 2, _group()), {}


def _scattered(rng: Random) -> Args:
    first, *rest = shape(rng)
    return (torch.randn(2 * first, *rest), "sum", 2, _group()), {}


def _exchanged(rng: Random) -> Args:
    first, *rest = shape(rng)
    return (torch.randn(2 * first, *rest), [first] * 2, [first] * 2, _group()), {}


def same_element(call: Call) -> AxisSpec:
    """Each element is made of the same element of every process."""
    _check_named(call)
    return elementwise(call.operands, call.results)


def all_gather(call: Call) -> AxisSpec:
    """The values of all processes one after the other along the first dimension, as tiles of it."""
    _check_named(call)
    (x,), (y,) = call.operands, call.results
    spec = elementwise(call.operands, [x])
    own, sizes = _ranks(y, x)
    results = ((own + spec.results[0][0], *spec.results[0][1:]),)
    return AxisSpec(spec.operands, results, {**spec.sizes, **sizes}, processes=frozenset(own))


def reduce_scatter(call: Call) -> AxisSpec:
    """The first dimension is cut into one part a process; each gets the sum of all processes' values of its own."""
    _check_named(call)
    (x,), (y,) = call.operands, call.results
    spec = elementwise([y], [y])
    own, sizes = _ranks(x, y)
    return AxisSpec(((own + spec.operands[0][0], *spec.operands[0][1:]),), spec.results, {**spec.sizes, **sizes})


def all_to_all(call: Call) -> AxisSpec:
    """The first dimension is cut into one part a process, and each gets its own part of all of them, one after the
    other: what stands where in a part stays there."""
    _check_named(call)
    (x,) = call.operands
    made, given = call.args[1:3]
    if len({*made, *given}) > 1:
        raise RuleError("processes that send each other parts of several sizes")
    part = [given[0], *x[1:]]
    spec = elementwise([part], [part])
    to, sizes = _ranks(x, part)
    own = spec.operands[0][0]
    return AxisSpec(
        ((to + own, *spec.operands[0][1:]),),
        ((tuple(f"of {label}" for label in to) + own, *spec.results[0][1:]),),
        {**spec.sizes, **sizes, **{f"of {label}": size for label, size in sizes.items()}},
        processes=frozenset(f"of {label}" for label in to),
    )


def _check_named(call: Call) -> None:
    """Processes that have no name could not be asked whether they take the same tokens."""
    given = (*call.args, *call.kwargs.values())
    if len(given) > 1 and not isinstance(given[-1], str):
        raise RuleError("a collective of a group without a name")


def _ranks(whole: Sequence[int], part: Sequence[int]) -> tuple[tuple[str, ...], dict[str, int]]:
    """A label for the processes, of which the first dimension of the whole has a part each."""
    count = whole[0] // part[0]
    return (("ranks",), {"ranks": count}) if count > 1 else ((), {})


if dist.is_available():
    collectives = torch.ops._c10d_functional
    register(collectives.all_reduce.default, _reduced)(same_element)
    register(collectives.broadcast.default, _sent)(same_element)
    register(collectives.wait_tensor.default, lambda rng: ((torch.randn(shape(rng)),), {}))(same_element)
    register(collectives.all_gather_into_tensor.default, _gathered)(all_gather)
    register(collectives.reduce_scatter_tensor.default, _scattered)(reduce_scatter)
    register(collectives.all_to_all_single.default, _exchanged, size_arg=(1, 2))(all_to_all)
