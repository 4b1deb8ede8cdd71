"""Dense: the plain meaning, in which partial branches are computed for all tokens and blended by mask. For tests."""

from collections.abc import Callable, Sequence
from typing import Any

from toca_compile.ir.program import Variant
from toca_compile.lowerings import eager
from toca_compile.lowerings.registry import lowering


@lowering("dense", dense=True)
def lower(variant: Variant, examples: Sequence[Any]) -> Callable[..., Sequence[Any]]:
    """Op by op."""
    return eager.lower(variant, examples)
