"""Eager: the rewritten graph as it is, op by op."""

from collections.abc import Callable, Sequence
from typing import Any

from toca_compile.ir.graph import written_out
from toca_compile.ir.program import Variant
from toca_compile.lowerings.registry import lowering


@lowering("eager")
def lower(variant: Variant, examples: Sequence[Any]) -> Callable[..., Sequence[Any]]:
    """The graph's own generated Python."""
    return written_out(variant.module)
