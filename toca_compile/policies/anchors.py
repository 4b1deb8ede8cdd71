"""Rules for the weights of anchors: the published predictors, each a sum over the values of the last full steps::

    Composition(50, when=Every(5), rules=(Rule(SkipBlocks(do=Anchors(Polynomial(), 3))),))

A predictor is linear in those values if its formula is; what it does to the unit vectors is its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import factorial
from typing import Annotated

from toca_compile.errors import PolicyError
from toca_compile.ir.anchors import MAX_ANCHORS, Anchors, Measured, Weights, lagrange
from toca_compile.ir.fields import Factor, Fraction, Number, Steps, Whole, told
from toca_compile.ir.registry import register

Vector = list[float]  # a value, as what each anchor adds to it


@register
@dataclass(frozen=True)
class Polynomial(Weights):
    """The polynomial through all anchors, or the last few (Newton's, by Lagrange's formula): exact on polynomials of a
    degree below their number, however they are spaced. ``last``: through how many; None: all."""

    last: Annotated[int, Whole(1, MAX_ANCHORS)] | None = None

    def weights(self, full: Sequence[int], step: int) -> Vector:
        if self.last is not None and self.last < len(full):
            return [0.0] * (len(full) - self.last) + lagrange(full[-self.last :], step)
        return lagrange(full, step)


@register
@dataclass(frozen=True)
class Taylor(Weights):
    """TaylorSeer (arXiv 2503.06923, section 3.2): repeated slopes between neighbouring full steps, as the coefficients
    of a Taylor series. Up to two anchors it is ``Polynomial``."""

    def weights(self, full: Sequence[int], step: int) -> Vector:
        x = step - full[-1]
        return _sum([(d, x**i / factorial(i)) for i, d in enumerate(_slopes(full))])


@register
@dataclass(frozen=True)
class Hermite(Weights):
    """HiCache (arXiv 2508.16984): Σ Δⁱ/i! · σⁱ·Hᵢ(σ·x) in place of a Taylor series, with Hermite's polynomials
    H₀ = 1, H₁ = 2x, Hᵢ₊₁ = 2x·Hᵢ − 2i·Hᵢ₋₁, x steps after the last full one. The scale σ is used twice, so that the
    first-order term is that of a Taylor series at σ² = ½."""

    scale: Annotated[float, Number(0, 1, above=True)] = 0.5

    def weights(self, full: Sequence[int], step: int) -> Vector:
        x = self.scale * (step - full[-1])
        values = [1.0, 2 * x]
        for i in range(1, len(full)):
            values.append(2 * x * values[i] - 2 * i * values[i - 1])
        slopes = enumerate(_slopes(full))
        return _sum([(d, self.scale**i * values[i] / factorial(i)) for i, d in slopes])


@register
@dataclass(frozen=True)
class Foca(Weights):
    """FoCa (arXiv 2508.16211): Heun's step from the last full value, with the slope there and the last change, which
    may be one between forecasts::

        F + e/2 · ((F − F′)/d + (Fₖ − Fₖ₋₁))

    e steps after F and d steps after the full value F′ before it; Fₖ is the value of the step before, Fₖ₋₁ of that
    before it. The recursion begins at the oldest anchor but one, whose slope stands for the first change.
    """

    def weights(self, full: Sequence[int], step: int) -> Vector:
        unit = [[float(i == j) for j in range(len(full))] for i in range(len(full))]
        if len(full) < 2:
            return unit[0]
        first, last_change = full[1], None
        before, now = unit[0], unit[1]
        for at in range(first + 1, step + 1):
            done = sum(f < at for f in full)  # anchors behind this step
            base, earlier = unit[done - 1], unit[done - 2]
            slope = _sum([(base, 1.0), (earlier, -1.0)])
            slope = [s / (full[done - 1] - full[done - 2]) for s in slope]
            change = _sum([(now, 1.0), (before, -1.0)]) if last_change is not None else slope
            e = at - full[done - 1]
            moved = _sum([(base, 1.0), (slope, e / 2), (change, e / 2)])
            computed = at in full and at != step
            before, now, last_change = now, (unit[full.index(at)] if computed else moved), at
        return now


@register
@dataclass(frozen=True)
class Chebyshev(Weights):
    """Spectrum (arXiv 2603.01623): ridge regression of the anchors on Chebyshev polynomials of the time
    τ = 2·step/T − 1 up to ``degree``: the forecast is x(τ)·(XᵀX + λI)⁻¹·Xᵀ·h.

    Args:
        degree: M, 4 as published.
        ridge: λ, 0.1 as published.
        num_steps: T.
        local: share of a line through the last two anchors in the forecast (0 as first published, later 0.5 to 1).
    """

    degree: Annotated[int, Whole(0, 16)] = 4
    ridge: Annotated[float, Number(0, 1e6, above=True)] = 0.1
    num_steps: Steps = 50
    local: Fraction = 0.0

    def weights(self, full: Sequence[int], step: int) -> Vector:
        rows = [self._row(at) for at in full]
        size = self.degree + 1
        square = [
            [sum(r[i] * r[j] for r in rows) + (self.ridge if i == j else 0.0) for j in range(size)] for i in range(size)
        ]
        solved = _solved(square, self._row(step))
        found = [sum(a * b for a, b in zip(row, solved, strict=True)) for row in rows]
        if self.local and len(full) > 1:
            line = [0.0] * (len(full) - 2) + Polynomial().weights(full[-2:], step)
            return _sum([(found, 1 - self.local), (line, self.local)])
        return found

    def for_run(self, num_steps: int) -> "Chebyshev":
        return replace(self, num_steps=num_steps)

    def _row(self, step: int) -> Vector:
        time = 2 * step / self.num_steps - 1
        values = [1.0, time]
        for _ in range(2, self.degree + 1):
            values.append(2 * time * values[-1] - values[-2])
        return values[: self.degree + 1]


@register
@dataclass(frozen=True)
class Mixed(Weights):
    """Several rules at once, each with its own share at each step: Σ shareᵣ · weightsᵣ. Shares may be negative; those
    of a step add up to 1, so that what does not change is forecast as it is.

    Args:
        rules: that are mixed.
        shares: a row for each step of the run, in it one for each rule.

    Raises:
        PolicyError: a row has another number of shares, or they do not add up to 1.
    """

    rules: tuple[Weights, ...] = ()
    shares: tuple[tuple[Factor, ...], ...] = ()

    def check(self) -> None:
        for rule in self.rules:
            if isinstance(rule, Measured) or type(rule) is Weights:
                raise PolicyError(f"rules must give weights from the steps alone, not {rule!r}")
        for i, row in enumerate(self.shares):
            if len(row) != len(self.rules) or abs(sum(row) - 1) > 1e-6:
                raise PolicyError(f"shares[{i}] must be {len(self.rules)} numbers that add up to 1, not {told(row)}")

    def weights(self, full: Sequence[int], step: int) -> Vector:
        row = self.shares[min(step, len(self.shares) - 1)]
        used = [(rule.weights(full, step), share) for rule, share in zip(self.rules, row, strict=True) if share]
        return _sum(used)

    def for_run(self, num_steps: int) -> "Mixed":
        if num_steps != len(self.shares):
            raise PolicyError(f"weights for {len(self.shares)} steps do not fit a run of {num_steps}")
        return replace(self, rules=tuple(rule.for_run(num_steps) for rule in self.rules))

    def row(self, place: float) -> tuple[float, ...]:
        """The shares at a place between steps."""
        i = min(int(place), len(self.shares) - 1)
        pairs = zip(self.shares[i], self.shares[min(i + 1, len(self.shares) - 1)], strict=True)
        return tuple(a + (place - i) * (b - a) for a, b in pairs)


@register
@dataclass(frozen=True)
class Given(Weights):
    """The weights themselves, step by step, as L2P learns them (arXiv 2604.26365): see
    ``toca_compile.quality.calibration.least_squares``.

    Args:
        rows: a row for each step of the run, in it a number for each full step that the forecast may use there, oldest
            first; none at full steps. Where other full steps are at hand than there are numbers (another graph of the
            model took part), the last value is repeated.
    """

    rows: tuple[tuple[Factor, ...], ...] = ()

    def weights(self, full: Sequence[int], step: int) -> Vector:
        row = self.rows[step] if step < len(self.rows) else ()
        return list(row) if len(row) == len(full) else Polynomial(1).weights(full, step)

    def for_run(self, num_steps: int) -> "Given":
        if num_steps != len(self.rows):
            raise PolicyError(f"weights for {len(self.rows)} steps do not fit a run of {num_steps}")
        return self


@register
@dataclass(frozen=True)
class Dmd(Measured):
    """Dynamic mode decomposition, as cache-dit's calibrator has it: the kept values as a sum of exponentials, each of
    which goes on. Exact where they are that, with fewer exponentials than values, of which none turns by a quarter
    circle or more from one full step to the next. The values count from the last on as far as they are evenly spaced
    (by at most 32 steps); where nothing can be told, the last is repeated. One decomposition is of the whole batch.
    """

    op = "dmd"


def _slopes(full: Sequence[int]) -> list[Vector]:
    """D⁰ … of the last anchor, Dⁱ⁺¹ = (Dⁱ − Dⁱ of the anchor before) / steps between them, as far as there are
    anchors."""
    level = [[float(i == j) for j in range(len(full))] for i in range(len(full))]
    found = [level[-1]]
    for order in range(1, len(full)):
        gaps = [full[i] - full[i - 1] for i in range(order, len(full))]
        pairs = zip(level[1:], level, gaps, strict=False)
        level = [[(a - b) / gap for a, b in zip(new, old, strict=True)] for new, old, gap in pairs]
        found.append(level[-1])
    return found


def _sum(terms: Sequence[tuple[Vector, float]]) -> Vector:
    return [sum(vector[i] * factor for vector, factor in terms) for i in range(len(terms[0][0]))]


def _solved(matrix: list[Vector], right: Vector) -> Vector:
    """The solution of a small symmetric positive system, by Gauss' elimination."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(size):
            factor = rows[r][i] / rows[i][i] if r != i else 0.0
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


__all__ = ["Anchors", "Chebyshev", "Dmd", "Foca", "Given", "Hermite", "Mixed", "Polynomial", "Taylor"]
