"""Anchors: a forecast that is a weighted sum of the last full steps' values, h(s) = Σ wᵢ · hᵢ.

The values are kept as they are, in a ring; the weights are host numbers of the step, worked out from the steps' real
distances. So one compiled variant serves every rule for the weights, and gaps may be uneven. Weights that follow from
the values themselves lie beside the ring as a table, of which each step reads a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, ClassVar

import torch

from toca_compile.errors import PolicyError
from toca_compile.ir.actions import Action, Keep
from toca_compile.ir.fields import DeviceName, Dtype, Family, Whole
from toca_compile.ir.fields import Number as NumberField
from toca_compile.ir.history import CacheSpec, History, Numbers, Past
from toca_compile.ir.registry import register
from toca_compile.ir.signature import Move, Signature
from toca_compile.ir.state import Number
from toca_compile.ir.types import Site, StepKind

ONE = 1 << 32
"""Weights are handed over as whole multiples of 2⁻³²: a whole number may change without a recompile."""
MAX_ANCHORS = 32
_PARABOLA = 3  # values that it goes through
AHEAD = 64
"""For how many steps after a full one there are weights that follow from the values."""


def lagrange(full: Sequence[int], step: int) -> list[float]:
    """How much the values at some steps count in the polynomial through them."""
    found = []
    for i, own in enumerate(full):
        weight = 1.0
        for j, other in enumerate(full):
            weight *= (step - other) / (own - other) if i != j else 1.0
        found.append(weight)
    return found


@dataclass(frozen=True)
class Weights(Family):
    """How much each anchor counts at a step; one class a published predictor (``policies/anchors.py``).

    Attributes:
        steered: whether the last two count as a gate measures at run time (``Gate.share``), where one does.
    """

    steered: ClassVar[bool] = False

    def weights(self, full: Sequence[int], step: int) -> list[float]:
        """One number for each of the full steps ``full``, oldest first, at a later ``step``."""
        raise NotImplementedError

    def by_group(self) -> "tuple[Weights, ...]":
        """The rule of each group of channels."""
        return (self,)

    def channels(self) -> tuple[int, ...]:
        """Of each channel, the last dimension, its group; none where all are one."""
        return ()

    def for_run(self, num_steps: int) -> "Weights":
        """The same in a run of so many steps."""
        return self

    def form(self) -> "Weights | None":
        """What of it a graph depends on."""
        return None


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

    def form(self) -> Weights:
        return self

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
    correct: float = field(default=0.0, kw_only=True)
    moved: tuple[float, ...] = field(default=(), kw_only=True)

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
    def corrects(self) -> bool:
        return self.correct > 0

    @property
    def by_value(self) -> frozenset[Number]:
        return frozenset([Number.MOVE] if self.measured is None else [])

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
        rules = self.by.by_group() if self.by is not None else ()
        count = 2 * self.kept + 1 if self.corrects else self.kept * max(len(rules), 1)
        numbers |= {(Number.MOVE, i): 0 for i in range(count)}
        if not past.full:
            return numbers
        for group, rule in enumerate(rules):
            numbers |= self._placed(past, rule.weights(past.full[-self.kept :], step), group)
        if self.corrects:
            *old, new = self._correction(past.full[-self.kept :], step, rules[0])
            numbers |= self._placed(past, old, 1)
            numbers[Number.MOVE, 2 * self.kept] = round(new * ONE)
        return numbers

    def _correction(self, full: Sequence[int], step: int, rule: Weights) -> list[float]:
        """How much of each kept value, and last of the new one, a step that computes it adds to it: what it is known to
        have been at the steps since the last, by the parabola through the new value and two before, less what was told
        of it then, by as much as the sampler moved the picture at that step for each bit that it moves it now."""
        found = [0.0] * (len(full) + 1)
        near, own = [*full, step][-_PARABOLA:], self.moved[step] if self.moved else 1.0
        if not own:  # the picture stands still, whatever is told
            return found
        for between in range(full[-1] + 1, step):
            known = [0.0] * (len(found) - len(near)) + lagrange(near, between)
            told = [*rule.weights(full, between), 0.0]
            share = self.correct * (self.moved[between] / own if self.moved else 1.0)
            found = [f + share * (k - t) for f, k, t in zip(found, known, told, strict=True)]
        return found

    def steered(self, past: Past, share: float) -> Numbers:
        if self.by is None or not self.by.steered or min(len(past.full), self.kept) < 2:
            return {}
        return self._placed(past, [1 - share, share])

    def _placed(self, past: Past, weights: Sequence[float], group: int = 0) -> Numbers:
        """Weights of the last values, oldest first, by where these lie."""
        places = [1 + (past.times - 1 - back) % (self.kept - 1) if back else 0 for back in range(len(weights))]
        start = group * self.kept
        return {(Number.MOVE, start + p): round(w * ONE) for p, w in zip(places, reversed(weights), strict=True)}

    @property
    def channels(self) -> tuple[int, ...]:
        """The group of each channel that has a rule of its own; none where all have one."""
        return self.by.channels() if self.by is not None else ()

    def refused(self, like: torch.Tensor) -> str | None:
        count = len(self.channels)
        last = like.shape[-1] if like.dim() else 1
        return f"has {last} channels, and rules are told for {count}" if count not in (0, last) else None

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
        by = self.by.form() if self.by is not None and self.kept > 1 else None
        return replace(self, by=by, correct=float(self.corrects), moved=())


@dataclass(frozen=True)
class BandRing(Ring):
    """The same, from which is told what is high in frequency over the token grid, beyond ``cutoff`` of an axis's
    highest; the rest is that of the last value."""

    cutoff: float = 0.0

    @property
    def over_grid(self) -> bool:
        return True


@register
@dataclass(frozen=True)
class Anchors(Action):
    """A forecast from the values of the last ``kept`` full steps, or as many as there are, weighted as ``by`` says.

    Args:
        by: the rule.
        kept: how many values.
        correct: of blocks that are skipped as one, and which steps is planned beforehand: a computed step makes up for
            this share of what the forecasts since the one before it are then known to have been wrong by. 0: it does
            not, and is the model's own.
        moves: by how much of what the model predicts the sampler moves the picture at each step, up to a common factor:
            what was wrong at a step counts by it. None are needed in a pipeline, or where ``opt.begin(scheduler)``
            says them; where nobody does, all steps count alike.
    """

    by: Weights | None = None
    kept: Annotated[int, Whole(1, MAX_ANCHORS)] = 3
    correct: Annotated[float, NumberField(0, 1)] = field(default=0.0, kw_only=True)
    moves: tuple[Move, ...] = field(default=(), kw_only=True)

    kind = StepKind.FORECAST
    word = "forecast"
    endless = False

    def check(self) -> None:
        if type(self.by) is Weights:
            raise PolicyError("by must be a rule for the weights, such as Polynomial()")
        if self.correct and (self.kept < 2 or isinstance(self.by, Measured) or (self.by and self.by.channels())):
            raise PolicyError("correct needs two values or more, and one rule for all channels, of the steps alone")
        if self.moves and not self.correct:
            raise PolicyError("moves say how much a correction counts: they need correct=…")
        if any(a * b < 0 for a, b in pairwise(self.moves)):
            raise PolicyError("moves must not turn back: all are 0 or more, or all 0 or less")

    def needs(self, defaults: CacheSpec) -> Keep:
        if self.by is None:
            raise PolicyError("Anchors needs a rule for the weights: Anchors(by=Polynomial())")
        return Keep(Ring(self.kept, defaults.dtype, self.by, defaults.device, correct=self.correct, moved=self.moves))

    def refused(self, site: Site) -> str | None:
        if self.correct:
            return "is corrected with all that stands beside it: SkipBlocks(do=Anchors(…, correct=…))"
        return Ring(self.kept, by=self.by).refused(site.output.meta["val"])

    def for_run(self, num_steps: int) -> Action:
        return replace(self, by=self.by.for_run(num_steps)) if self.by is not None else self

    def for_call(self, call: Signature) -> Action:
        return replace(self, moves=call.moves) if self.correct and call.moves and not self.moves else self

    def unfit(self, num_steps: int) -> str | None:
        if len(self.moves) in (0, num_steps):
            return None
        return f"moves must be {num_steps}, one a step, not {len(self.moves)}"

    def form(self) -> Action:
        return replace(self, by=None, kept=1, correct=0.0, moves=())

    def __str__(self) -> str:
        return "forecast by anchors"
