"""Gates: what a test at run time measures, to say whether a step computes the blocks that it may skip."""

from dataclasses import dataclass
from functools import reduce
from typing import Annotated, ClassVar

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import Factor, Family, Fraction, Number
from toca_compile.ir.history import Numbers
from toca_compile.ir.registry import register
from toca_compile.ir.state import Number as HostNumber


@dataclass(frozen=True)
class Gate(Family):
    """One measure. A value of the graph is held against what was kept of it: mean |difference| / mean |kept|, one
    number for the whole batch, and the one read of a device value in a step.

    Attributes:
        first: whether it is measured on the blocks before those to skip, of which there must be one.
        adds_up: the value is kept at every step, and what it changes from step to step adds up since the last computed
            one; else it is kept at computed steps.
    """

    first: ClassVar[bool]
    adds_up: ClassVar[bool] = False

    def rescaled(self, distance: float) -> float:
        """What a distance counts."""
        return distance

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

    def rescaled(self, distance: float) -> float:
        return reduce(lambda total, c: total * distance + c, self.rescale, 0.0)


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
