"""Lowerings: how a variant's graph becomes a callable. One a file, which registers it; see ``registry.Lowering``."""

from toca_compile.ir.registry import import_files
from toca_compile.lowerings.registry import (
    LOWERINGS,
    Lowering,
    find_lowering,
    is_dense,
    is_whole,
    lowering,
    of_rare_calls,
)

import_files(__name__, __path__)

__all__ = ["LOWERINGS", "Lowering", "find_lowering", "is_dense", "is_whole", "lowering", "of_rare_calls"]
