"""Lowerings: how a variant's graph becomes a callable. One a file; each has the signature of ``Lowering``."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from toca_compile.errors import TocaError
from toca_compile.ir.program import Variant
from toca_compile.lowerings import eager, inductor


class Lowering(Protocol):
    """Turn a variant into a callable.

    ``examples`` are a fake tensor or a plausible host number for each of the variant's inputs, in order.
    """

    def __call__(self, variant: Variant, examples: Sequence[Any]) -> Callable[..., Sequence[Any]]: ...


LOWERINGS: dict[str, Lowering] = {
    "eager": eager.lower,
    # The plain meaning: partial branches are computed for all tokens and blended by mask. For tests.
    "dense": eager.lower,
    "inductor": inductor.lower,
}


def lowering(name: str) -> Lowering:
    """The lowering of that name.

    Raises:
        TocaError: there is none.
    """
    if name not in LOWERINGS:
        raise TocaError(f"unknown lowering {name!r}; choose one of {', '.join(LOWERINGS)}")
    return LOWERINGS[name]
