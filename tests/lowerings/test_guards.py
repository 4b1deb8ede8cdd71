"""What a compiler takes for granted of an open size, without compiling: guards that comparisons of symbols leave."""

from collections.abc import Callable
from typing import Any

import pytest

from toca_compile.errors import ExportError
from toca_compile.ir.table import OpenSizes, Told
from toca_compile.lowerings.guards import hold
from toca_compile.lowerings.inductor import symbol, symbolic_mode

SIZES = range(2, 7)
K: Told = ((1, 1, 2, 3, 3),)  # by size
NONE: Told = ((0, 1, 2, 3, 3),)


def held(compare: Callable[[Any, Any, Any], Any], *numbers: Told) -> None:
    """Hold what a comparison of the size (6), a K (3) and another size leaves."""
    mode = symbolic_mode()
    size, other, *parts = (symbol(mode, name, hint) for name, hint in zip("sopn", (6, 5, 3, 0), strict=True))
    own, *told = (one.node.expr for one in (size, *parts))
    compare(size, parts[0] - parts[1], other)
    assert mode.shape_env is not None
    hold(mode.shape_env, own, [told], OpenSizes(((),), ((),), SIZES, "batch", numbers))


@pytest.mark.parametrize(
    "compare",
    [
        lambda size, k, other: bool(size > 1),
        lambda size, k, other: bool(size * k != 0),
        lambda size, k, other: bool(k <= size),
        lambda size, k, other: bool(size * k != size),  # false of one token alone
        lambda size, k, other: bool(k == 3),  # nothing of the size
    ],
    ids=["of the size", "of both", "by size", "one token", "of the number"],
)
def test_what_is_true_of_every_size(compare: Callable[[Any, Any, Any], Any]) -> None:
    held(compare, K, ((2, 2, 3, 4, 6),))


@pytest.mark.parametrize(
    ("compare", "numbers", "why"),
    [
        (lambda size, k, other: bool(size > 2), (K,), "size that may be 2$"),
        (lambda size, k, other: int(size), (K,), r"Eq\(s\d+, 6\) for granted, where s\d+ is a size that may be 2$"),
        (lambda size, k, other: bool(size * k != 0), (K, NONE), r"size that may be 2, with numbers \[0\] of a step"),
        (lambda size, k, other: bool(k + 3 <= size), (K,), r"size that may be 2, with numbers \[1\]"),
        (lambda size, k, other: bool(2 * k <= size), (((1, 1, 2, 3, 3),),), r"may be 5, with numbers \[3\]"),
        (lambda size, k, other: bool(size * k != 0), (K, (None,)), "only a run tells"),
        (lambda size, k, other: bool(size * other > 9), (K,), "is a size from 2 to 6"),
    ],
)
def test_what_is_not_is_named(compare: Callable[[Any, Any, Any], Any], numbers: tuple[Told, ...], why: str) -> None:
    with pytest.raises(ExportError, match=f"not hold for every batch: the compiler takes .*{why}"):
        held(compare, *numbers)
