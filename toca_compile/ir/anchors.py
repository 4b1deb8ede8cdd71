"""Anchors: a forecast that is a weighted sum of the last full steps' values, h(s) = Σ wᵢ · hᵢ.

The values are kept as they are, in a ring; the weights are host numbers of the step, worked out from the steps' real
distances. So one compiled variant serves every rule for the weights, and gaps may be uneven. Weights that follow from
the values themselves lie beside the ring as a table, of which each step reads a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch

from toca_compile.errors import PolicyError
from toca_compile.ir.actions import Action, Keep
from toca_compile.ir.fields import DeviceName, Dtype, Family, Whole
from toca_compile.ir.fields import Number as NumberField
from toca_compile.ir.history import CacheSpec, History, Numbers, Past
from toca_compile.ir.registry import register
from toca_compile.ir.state import Number
from toca_compile.ir.types import StepKind

ONE = 1 << 32
"""Weights are handed over as whole multiples of 2⁻³²: a whole number may change without a recompile."""
MAX_ANCHORS = 32
AHEAD = 64
"""For how many steps after a full one there are weights that follow from the values."""


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
class Measured(Weights):
    """Weights that follow from the anchors' products with one another, for evenly spaced ones. They are worked out on
    the device at each full step, so that no value is read on the host.

    Attributes:
        op: a ``toca::`` op that makes the table ``[ahead, kept]`` of them, called as ``dmd`` in ``ops/dynamics.py``.
        ridge: ρ, relative to the largest product: what is smaller than its root is taken for noise.
    """

    op: ClassVar[str]
    ridge: Annotated[float, NumberField(0, 1, above=True)] = 1e-8

    def weights(self, full: Sequence[int], step: int) -> list[float]:
        return [0.0] * (len(full) - 1) + [1.0]  # where the last value is all that is kept


@dataclass(frozen=True)
class Ring(History):
    """The values of the last ``kept`` full steps: the last one in the output's own buffer, those before it in a ring,
    one tensor ``[kept − 1, …]``; and a float32 table ``[AHEAD, kept]`` of ``measured`` weights."""

    kept: int
    dtype: Annotated[torch.dtype, Dtype()] | None = None
    by: Weights | None = None
    device: DeviceName | None = None

    @property
    def numbers_kept(self) -> frozenset[int]:
        return frozenset([2]) if self.measured else frozenset()

    @property
    def depth(self) -> int:
        return self.kept - 1

    @property
    def moves(self) -> bool:
        return True

    @property
    def by_sample(self) -> bool:
        return self.measured is None

    def turned(self, past: Past) -> tuple[int, int]:
        places = max(self.kept - 1, 1)
        return past.times % places, places

    @property
    def measured(self) -> Measured | None:
        """The rule, if it needs the values."""
        return self.by if isinstance(self.by, Measured) and self.kept > 1 else None

    def why_not_by_token(self) -> str | None:
        return "a forecast by differences"

    def buffers(self, like: torch.Tensor) -> list[torch.Tensor]:
        ring = [like.new_empty([self.kept - 1, *like.shape])] if self.kept > 1 else []
        return [*ring, like.new_empty([AHEAD, self.kept], dtype=torch.float32)] if self.measured else ring

    def written(self, like: torch.Tensor, made: int) -> int:
        return len(self.buffers(like))

    def numbers(self, past: Past, step: int, used: int) -> Numbers:
        slots = self.kept - 1
        # Where the value goes that this step, if it computes all, pushes out of the output's buffer.
        numbers: Numbers = {(Number.KEEP, 0): (past.times - 1) % slots if slots else 0}
        if self.measured is not None:
            return numbers | self._spacing(past, step)
        numbers |= {(Number.MOVE, i): 0 for i in range(self.kept)}
        if self.by is None or not past.full:
            return numbers
        full = past.full[-self.kept :]
        for back, weight in enumerate(reversed(self.by.weights(full, step))):
            place = 1 + (past.times - 1 - back) % slots if back else 0
            numbers[Number.MOVE, place] = round(weight * ONE)
        return numbers

    def _spacing(self, past: Past, step: int) -> Numbers:
        """How many of the last values are evenly spaced if this step computes all, and how far; else which row of the
        table it reads."""
        full = [*past.full, step][-self.kept :]
        gap, even = full[-1] - full[-2] if len(full) > 1 else 1, 1
        while even < len(full) and full[-even] - full[-even - 1] == gap:
            even += 1
        # One value alone is repeated, as is the last row of the table.
        alone = gap > AHEAD // 2
        return {
            (Number.KEEP, 1): 1 if alone else even,
            (Number.KEEP, 2): 1 if alone else gap,
            (Number.MOVE, 0): max(0, min(step - past.since, AHEAD) - 1),
        }

    def joined(self, other: History) -> History:
        if isinstance(other, Ring) and other.by != self.by:
            raise PolicyError("a site is forecast by two rules for its anchors' weights: choose one")
        return super().joined(other)

    def form(self) -> History:
        return self if self.measured else replace(self, by=None)


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
        return Keep(Ring(self.kept, defaults.dtype, self.by, defaults.device))

    def for_run(self, num_steps: int) -> Action:
        return replace(self, by=self.by.for_run(num_steps)) if self.by is not None else self

    def form(self) -> Action:
        return replace(self, by=None, kept=1)

    def __str__(self) -> str:
        return "forecast by anchors"
