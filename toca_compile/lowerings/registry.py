"""What a lowering is, and how one becomes known."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from toca_compile.errors import TocaError
from toca_compile.ir.program import Variant


class Lowering(Protocol):
    """Turn a variant into a callable.

    ``examples`` are a fake tensor or a plausible host number for each of the variant's inputs, in order. A lowering
    with an attribute ``dense = True`` is given variants that compute partial branches for all tokens, one with
    ``compiles = True`` is not given what is computed once for many steps, and one with ``whole = True`` is given the
    program of whole steps (``compiler/step_program.py``) as one variant.
    """

    def __call__(self, variant: Variant, examples: Sequence[Any]) -> Callable[..., Sequence[Any]]: ...


L = TypeVar("L", bound=Lowering)

LOWERINGS: dict[str, Lowering] = {}


def lowering(name: str, *, dense: bool = False, compiles: bool = False, whole: bool = False) -> Callable[[L], L]:
    """A decorator: the function is the lowering of that name.

    Args:
        name: as ``optimize(..., lowering=name)`` asks for it.
        dense: whether it is given the plain meaning of a variant, in which all tokens are computed and blended by mask.
        compiles: whether it takes so long that it pays for what is computed at each step alone.
        whole: whether it is given whole steps as one graph, and not a variant after the other.

    Raises:
        TocaError: another lowering has that name.
    """

    def registered(lower: L) -> L:
        # A module that is loaded anew makes its functions anew.
        if name in LOWERINGS and LOWERINGS[name].__module__ != lower.__module__:
            raise TocaError(f"there is a lowering {name!r} already: give the other one another name")
        lower.dense, lower.compiles, lower.whole = dense, compiles, whole  # type: ignore[attr-defined]
        LOWERINGS[name] = lower
        return lower

    return registered


def find_lowering(name: str) -> Lowering:
    """The lowering of that name.

    Raises:
        TocaError: there is none.
    """
    if name not in LOWERINGS:
        raise TocaError(f"unknown lowering {name!r}; choose one of {', '.join(sorted(LOWERINGS))}")
    return LOWERINGS[name]


def of_rare_calls(lower: Lowering) -> Lowering:
    """The lowering of what is computed once for many steps."""
    return LOWERINGS["eager"] if getattr(lower, "compiles", False) else lower


def is_whole(lower: Lowering) -> bool:
    """Whether a lowering is given whole steps."""
    return getattr(lower, "whole", False)


def is_dense(lower: Lowering) -> bool:
    """Whether a lowering is given the plain meaning of variants."""
    return getattr(lower, "dense", False)
