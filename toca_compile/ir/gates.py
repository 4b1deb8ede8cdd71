"""Gates: what a test at run time measures, to say whether a step computes the blocks that it may skip."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from typing import Annotated, ClassVar, TypeVar

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import Factor, Family, Fraction, Natural, Number
from toca_compile.ir.history import Numbers
from toca_compile.ir.registry import register
from toca_compile.ir.state import Number as HostNumber

T = TypeVar("T")


def value_at(polynomial: Sequence[float], x: float) -> float:
    """Of a polynomial by its coefficients, from the highest power to the constant."""
    return reduce(lambda total, c: total * x + c, polynomial, 0.0)


@dataclass(frozen=True)
class Gate(Family):
    """One measure. A value of the graph is held against what was kept of it: mean |difference| / mean |kept|, one
    number for the whole batch, and the one read of a device value in a step.

    Attributes:
        first: whether it is measured on the blocks before those to skip, of which there must be one.
        behind: whether it is measured on the blocks behind them, of which there must be one, once these were computed
            from what stands in for the others; a step that then turns full begins again before the blocks to skip.
        adds_up: the value is kept at every step, and what it changes from step to step adds up since the last computed
            one; else it is kept at computed steps.
        asks: how many computed steps there must be before it can tell anything.
    """

    first: ClassVar[bool]
    behind: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False
    asks: ClassVar[int] = 1

    @property
    def polynomial(self) -> tuple[float, ...]:
        """The coefficients, from the highest power to the constant, of what a distance counts where it adds up."""
        return 1.0, 0.0

    @property
    def trusted(self) -> int:
        """How many steps after a computed one are skipped without being measured."""
        return 0

    @property
    def shares(self) -> tuple[float, float] | None:
        """Between which the share lies that is measured beside the distance (``share``); None where it is not."""
        return None

    def bound(self, threshold: float, step: int, steps: int) -> float:
        """What a step's distance is held against, where it does not add up."""
        return threshold

    def keeps(self, value: T, leaves: T | None) -> tuple[T | None, ...]:
        """For each thing that is kept of what it measures, a value like it; None for a number. ``leaves``: what leaves
        the blocks, where that is kept too."""
        return (value,)

    def share(self, measured: Sequence[float]) -> float | None:
        """How far what the blocks add is on its way from the last computed step but one (0) to the last (1), as far as
        what was measured beside the distance tells."""
        if self.shares is None or not isfinite(measured[0]):
            return None
        least, most = self.shares
        return min(max(measured[0], least), most)

    def numbers(self, step: int, steps: int) -> Numbers:
        """The host numbers of a step that the measuring needs."""
        return {}


@register
@dataclass(frozen=True)
class FirstBlocks(Gate):
    """What the first blocks change of the residual stream (FirstBlockCache, DBCache)."""

    first = True


@register
@dataclass(frozen=True)
class FirstInput(Gate):
    """What the first linear layer of the blocks is given: the normed and modulated stream (TeaCache, arXiv 2411.19108).

    Args:
        rescale: coefficients of the polynomial of a distance that is its weight, from the highest power to the
            constant.

    Raises:
        PolicyError: there are none.
    """

    rescale: tuple[Factor, ...] = (1.0, 0.0)

    first = False
    adds_up = True

    def check(self) -> None:
        super().check()
        if not self.rescale:
            raise PolicyError("rescale must have a coefficient at least, as (1.0, 0.0), which changes nothing")

    @property
    def polynomial(self) -> tuple[float, ...]:
        return self.rescale


@register
@dataclass(frozen=True)
class FilteredInput(FirstInput):
    """The same, of which over the token grid is kept what is picture and not noise (SeaCache, arXiv 2602.18993): a
    Wiener filter along each axis of the grid, for the share of noise σ of flow matching, x = (1 − σ)·x₀ + σ·ε, and a
    picture whose power falls with the frequency f as f⁻ᵖ.

    Args:
        power: p.
        sigmas: σ at each step of a run; none: 1 − step / steps.
    """

    power: Annotated[float, Number(0, 16, above=True)] = 2.0
    sigmas: tuple[Fraction, ...] = ()

    def numbers(self, step: int, steps: int) -> Numbers:
        sigma = self.sigmas[min(step, len(self.sigmas) - 1)] if self.sigmas else 1 - step / steps
        return {(HostNumber.SIGMA, 0): round(sigma * 2**32)}


@register
@dataclass(frozen=True)
class Rate(Gate):
    """How much what leaves the blocks must have changed since the step before, as a share of what left them at the last
    computed step: k · mean|xₜ − xₜ₋₁| / mean|v|, where the stream x enters and v leaves, and k = mean|v − v′| /
    mean|x − x′| between the last two computed steps (EasyCache, arXiv 2507.02860)."""

    first = False
    adds_up = True
    asks = 2

    def keeps(self, value: T, leaves: T | None) -> tuple[T | None, ...]:
        return value, value, leaves, None


@register
@dataclass(frozen=True)
class FirstOutput(Gate):
    """What leaves the first blocks, from step to step (DiCache, arXiv 2508.17356). Beside it is measured how far what
    they change, p, is on its way: mean|p − p₋₂| / mean|p₋₁ − p₋₂|, with p₋₁ and p₋₂ of the last two computed steps.

    Args:
        least, most: between which that lies.
    """

    least: Factor = 1.0
    most: Factor = 1.5

    first = True
    adds_up = True

    def keeps(self, value: T, leaves: T | None) -> tuple[T | None, ...]:
        return value, value, value

    @property
    def shares(self) -> tuple[float, float]:
        return self.least, self.most


@register
@dataclass(frozen=True)
class LastBlocks(Gate):
    """How wrong a forecast of what the last blocks change is, mean|forecast − computed| / mean|computed|; they are
    computed from the stream that was forecast (SpeCa, arXiv 2509.11628).

    Args:
        decay: β. The threshold of a step is that of the run times β to the power of the run's share that is done.
        floor: beneath which it does not fall.
        drafts: how many steps after a computed one are taken for good without being measured.
    """

    decay: Annotated[float, Number(0, 1, above=True)] = 1.0
    floor: Annotated[float, Number(0, 1e6)] = 0.01
    drafts: Natural = 0

    first = False
    behind = True

    def bound(self, threshold: float, step: int, steps: int) -> float:
        return max(threshold * self.decay ** (step / steps), self.floor)

    @property
    def trusted(self) -> int:
        return self.drafts
