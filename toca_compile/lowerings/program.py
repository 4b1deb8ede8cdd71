"""Program: a whole step as one graph, with the caches and the plan inside, op by op."""

from collections.abc import Callable, Sequence
from typing import Any

from toca_compile.ir.program import Variant
from toca_compile.lowerings.registry import lowering


@lowering("program", whole=True)
def lower(variant: Variant, examples: Sequence[Any]) -> Callable[..., Sequence[Any]]:
    """The program itself."""
    return variant.module
