"""Proved: a program after all passes, made once for each graph that Dynamo handed over.

Models of one class share what Dynamo traced of them (``traced.py``). The passes read a graph and how its inputs lie,
and no weight, so that what they prove for one model holds for the next.
"""

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from toca_compile.compiler.pass_manager import PassManager
from toca_compile.ir.program import Pass, Program
from toca_compile.rules.registry import RULES

Proved = tuple[Program, PassManager]

_KNOWN: "weakref.WeakKeyDictionary[fx.GraphModule, dict[Hashable, Proved]]" = weakref.WeakKeyDictionary()


def proved(program: Program, passes: Sequence[Pass]) -> Proved:
    """A program as Dynamo handed it over, after all passes, and who ran them.

    Raises:
        PassError, UnsupportedGraphError: as ``PassManager.run`` does; nothing is kept then.
    """
    known = _KNOWN.setdefault(program.module, {})
    key = _key(program, passes)
    if key not in known:
        manager = PassManager(passes)
        known[key] = manager.run(program), manager
    return known[key]


def _key(program: Program, passes: Sequence[Pass]) -> Hashable:
    """All that the passes read beside the graph itself."""
    told = program.static_inputs, program.grid, program.known, program.fragment, program.layouts
    by = tuple(p.run for p in passes), frozenset(RULES.values())
    memories: dict[int, int] = {}
    return told, by, tuple(_lies(value, memories) for value in program.inputs)


def _lies(value: Any, memories: dict[int, int]) -> Hashable:
    """How an input lies, and which of those before it share its memory."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return object()  # nothing is like it
    memory = memories.setdefault(value.untyped_storage()._cdata, len(memories))
    kind = type(value), value.dtype, value.device, value.is_conj(), value.is_neg()
    flags = value.requires_grad, value.is_inference()
    return *kind, *flags, value.shape, value.stride(), value.storage_offset(), memory
