"""Histories: what is kept of a value beside its last version, so that a later step can say where it is going.

A history is host data: how many buffers of which shape, and the numbers that a step hands to the graph that writes or
moves them. What that graph does stands in ``passes/variants``, one emission a history.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, NamedTuple

import torch

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import Basis, DeviceName, Dtype, Order
from toca_compile.ir.state import Number
from toca_compile.ir.storage import Storage


class Past(NamedTuple):
    """The steps so far that computed all of a value. ``full``: the last of them, oldest first; ``times``: how many
    there were in all; ``made``: how many differences to earlier ones the last of them made."""

    full: tuple[int, ...] = ()
    times: int = 0
    made: int = 0

    @property
    def since(self) -> int:
        """The last of them; 0 before the first."""
        return self.full[-1] if self.full else 0


Numbers = dict[tuple[Number, int], int]


@dataclass(frozen=True)
class History:
    """What is kept of a value: at least its last version."""

    @property
    def dtype(self) -> torch.dtype | None:
        """In which dtype; None: the value's own."""
        return None

    @property
    def device(self) -> str | None:
        """On which device; None: the value's own."""
        return None

    @property
    def storage(self) -> Storage:
        """How what is kept of the value lies in memory."""
        return Storage(self.dtype, self.device)

    @property
    def numbers_kept(self) -> frozenset[int]:
        """Which of the buffers beside the last version (the first is 1) hold no values but numbers about them."""
        return frozenset()

    @property
    def depth(self) -> int:
        """How many full steps before the last one it needs to know of."""
        return 0

    @property
    def moves(self) -> bool:
        """Whether a later step can be told from it, rather than repeat the last version."""
        return self.depth > 0

    @property
    def corrects(self) -> bool:
        """Whether a step that computes the value hands on another, which makes up for what was told since the last
        such step (of a range of blocks alone)."""
        return False

    @property
    def by_value(self) -> frozenset[Number]:
        """Which of its numbers multiply or divide whole values, so that each sample of a batch may have its own."""
        return frozenset()

    @property
    def by_sample(self) -> bool:
        """Whether what is kept of a sample, and told from it, is the same whatever samples stand beside it."""
        return True

    @property
    def over_grid(self) -> bool:
        """Whether what is told from it depends on where in the picture a token lies."""
        return False

    def refused(self, like: torch.Tensor) -> str | None:
        """Why a value like this cannot be told from it; None where it can."""
        return None

    def turned(self, past: Past) -> tuple[int, int]:
        """How far, and of how many, the places of its ring are turned against those of a value that was kept first
        where this one was last; of a history without a ring 0 of 1."""
        return 0, 1

    def why_not_by_token(self) -> str | None:
        """Why tokens that are computed one by one cannot have a history each; None where they can."""
        return None

    def buffers(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Fake tensors of the buffers beside the last version, which is one like ``like``."""
        return []

    def written(self, like: torch.Tensor, made: int) -> int:
        """How many of those a step that computes the value must write. ``made``: the differences that it makes."""
        return len(self.buffers(like)) if made else 0

    def numbers(self, past: Past, step: int, used: int) -> Numbers:
        """The host numbers of a step. ``used``: how far back a forecast goes (``depth`` at most)."""
        return {}

    def steered(self, past: Past, share: float) -> Numbers:
        """The numbers of a step of which is measured how far the value is on its way from the last full step but one
        (0) to the last (1), where a forecast asks for that."""
        return {}

    def joined(self, other: "History") -> "History":
        """One that serves whatever either does.

        Raises:
            PolicyError: there is none.
        """
        own, given = (self, other) if self.depth >= other.depth else (other, self)
        if given.depth and type(own) is not type(given):
            raise PolicyError("a site is forecast in two ways, which keep different things of it: choose one")
        return own

    def form(self) -> "History":
        """What the graph depends on: the history without what only changes its numbers."""
        return self


@dataclass(frozen=True)
class CacheSpec(History):
    """The last version and ``order`` differences.

    Differences are those of a ``"taylor"`` series, repeated slopes between neighbouring full steps, or the divided
    differences of ``"newton"``'s polynomial through the full steps.
    """

    order: Order = 0
    dtype: Annotated[torch.dtype, Dtype()] | None = None
    basis: Basis = "taylor"
    device: DeviceName | None = None

    @property
    def depth(self) -> int:
        return self.order

    @property
    def by_value(self) -> frozenset[Number]:
        return frozenset([Number.KEEP, Number.MOVE])

    def why_not_by_token(self) -> str | None:
        return "basis='taylor'" if self.basis == "newton" and self.order else None

    def buffers(self, like: torch.Tensor) -> list[torch.Tensor]:
        return [like] * self.order

    def numbers(self, past: Past, step: int, used: int) -> Numbers:
        numbers: Numbers = {}
        for order in range(1, self.order + 1):
            numbers[Number.KEEP, order] = self.spacing([*past.full, step], order)
            numbers[Number.MOVE, order] = self.power(past.full, step, order) if order <= used else 0
        return numbers

    def joined(self, other: History) -> History:
        if isinstance(other, CacheSpec):
            return replace(self, order=max(self.order, other.order))
        return super().joined(other)

    def spacing(self, full: Sequence[int], order: int) -> int:
        """What a difference is divided by at the last of the full steps."""
        back = order if self.basis == "newton" else 1
        return full[-1] - full[-1 - back] if len(full) > back else 1

    def power(self, full: Sequence[int], step: int, order: int) -> int:
        """What a difference is multiplied by at a later step (and ``order``! divides, in a Taylor series)."""
        if self.basis == "taylor":
            return (step - full[-1]) ** order
        return prod(step - at for at in full[-order:])


OUTPUT_ONLY = CacheSpec()
