"""What is sized by values (the places of a mask's ones, and what is gathered there) as one op.

torch traces such values with sizes that are unknown, and no pass can follow these. Here all that has one stands under
a name, between values whose sizes are known.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from toca_compile.ops.registry import op


@dataclass(frozen=True)
class Layout:
    """How a result lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, like: Tensor) -> "Layout":
        """That of a tensor, without gaps and overlaps."""
        like = torch.empty_like(like)
        return cls(tuple(like.shape), like.stride(), like.dtype, like.device)

    def empty(self) -> Tensor:
        """A tensor that lies so."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Part:
    """``graph``: what is computed, of given tensors, which it may change; ``results``: how what it gives lies;
    ``casting``: arguments of ``torch.autocast`` under which it stands."""

    graph: fx.GraphModule
    results: tuple[Layout, ...]
    casting: tuple[Any, ...] | None = None

    def __call__(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The results, in memory of their own."""
        cast = contextlib.nullcontext() if self.casting is None else torch.autocast(*self.casting)
        with cast:
            made = self.graph(*given)
        return [layout.empty().copy_(value) for layout, value in zip(self.results, made, strict=True)]


KNOWN: dict[str, Part] = {}
"""By name."""


def named(part: Part) -> str:
    """The name under which the op finds a part."""
    text = repr((part.graph.print_readable(print_output=False), part.results, part.casting))
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    KNOWN.setdefault(name, part)
    return name


def _fake(given: list[Tensor], name: str) -> list[Tensor]:
    return [layout.empty() for layout in KNOWN[name].results]


@op("sized_by_values(Tensor[] given, str name) -> Tensor[]", fake=_fake)
def sized_by_values(given: list[Tensor], name: str) -> list[Tensor]:
    """The results of the part ``name`` of ``KNOWN``.

    Args:
        given: the tensors that it reads.
    """
    return KNOWN[name](given)


OP = torch.ops.toca.sized_by_values.default
