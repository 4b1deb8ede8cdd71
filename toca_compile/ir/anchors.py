"""Anchors: a forecast that is a weighted sum of the last full steps' values, h(s) = Σ wᵢ · hᵢ.

The values are kept as they are, in a ring; the weights are host numbers of the step, worked out from the steps' real
distances. So one compiled variant serves every rule for the weights, and gaps may be uneven.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch

from toca_compile.errors import PolicyError
from toca_compile.ir.actions import Action, Keep
from toca_compile.ir.fields import Dtype, Family, Whole
from toca_compile.ir.history import CacheSpec, History, Numbers, Past
from toca_compile.ir.registry import register
from toca_compile.ir.state import Number
from toca_compile.ir.types import StepKind

ONE = 1 << 32
"""Weights are handed over as whole multiples of 2⁻³²: a whole number may change without a recompile."""
MAX_ANCHORS = 32


@dataclass(frozen=True)
class Weights(Family):
    """How much each anchor counts at a step; one class a published predictor (``policies/anchors.py``)."""

    def weights(self, full: Sequence[int], step: int) -> list[float]:
        """One number for each of the full steps ``full``, oldest first, at a later ``step``."""
        raise NotImplementedError

    def for_run(self, num_steps: int) -> "Weights":
        """The same in a run of so many steps."""
        return self


@dataclass(frozen=True)
class Ring(History):
    """The values of the last ``kept`` full steps: the last one in the output's own buffer, those before it in a ring,
    one tensor ``[kept − 1, …]``."""

    kept: int
    dtype: Annotated[torch.dtype, Dtype()] | None = None
    by: Weights | None = None

    @property
    def depth(self) -> int:
        return self.kept - 1

    @property
    def moves(self) -> bool:
        return True

    def why_not_by_token(self) -> str | None:
        return "a forecast by differences"

    def buffers(self, like: torch.Tensor) -> list[torch.Tensor]:
        return [like.new_empty([self.kept - 1, *like.shape])] if self.kept > 1 else []

    def written(self, like: torch.Tensor, made: int) -> int:
        return len(self.buffers(like))

    def numbers(self, past: Past, step: int, used: int) -> Numbers:
        slots = self.kept - 1
        # Where the value goes that this step, if it computes all, pushes out of the output's buffer.
        numbers: Numbers = {(Number.KEEP, 0): (past.times - 1) % slots if slots else 0}
        numbers |= {(Number.MOVE, i): 0 for i in range(self.kept)}
        if self.by is None or not past.full:
            return numbers
        full = past.full[-self.kept :]
        for back, weight in enumerate(reversed(self.by.weights(full, step))):
            place = 1 + (past.times - 1 - back) % slots if back else 0
            numbers[Number.MOVE, place] = round(weight * ONE)
        return numbers

    def joined(self, other: History) -> History:
        if isinstance(other, Ring) and other.by != self.by:
            raise PolicyError("a site is forecast by two rules for its anchors' weights: choose one")
        return super().joined(other)

    def form(self) -> History:
        return replace(self, by=None)


@register
@dataclass(frozen=True)
class Anchors(Action):
    """A forecast from the values of the last ``kept`` full steps, or as many as there are, weighted as ``by`` says."""

    by: Weights | None = None
    kept: Annotated[int, Whole(1, MAX_ANCHORS)] = 3

    kind = StepKind.FORECAST
    word = "forecast"
    endless = False

    def check(self) -> None:
        if type(self.by) is Weights:
            raise PolicyError("by must be a rule for the weights, such as Polynomial()")

    def needs(self, defaults: CacheSpec) -> Keep:
        if self.by is None:
            raise PolicyError("Anchors needs a rule for the weights: Anchors(by=Polynomial())")
        return Keep(Ring(self.kept, defaults.dtype, self.by))

    def for_run(self, num_steps: int) -> Action:
        return replace(self, by=self.by.for_run(num_steps)) if self.by is not None else self

    def form(self) -> Action:
        return replace(self, by=None, kept=1)

    def __str__(self) -> str:
        return "forecast by anchors"
