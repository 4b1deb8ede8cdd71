"""When a step is full. Each kind of schedule gives every call a *phase*: 0 where it is full, else its place between."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import Call, Count, Counting, Family, Fraction, Kind, Natural, Number, Threshold, told
from toca_compile.ir.gates import FirstBlocks, Gate
from toca_compile.ir.registry import register
from toca_compile.policies.schedules import (
    counted,
    counted_steps,
    end_aligned_steps,
    periodic_steps,
    spread_steps,
    toca_phases,
)

Slope = Annotated[float, Number(0, 1, below=True)]
Bend = Annotated[float, Number(0, 10, above=True, below=True)]


class When(Family):
    """Which steps are full."""

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """The phase of each call of a run, for one kind of site.

        Raises:
            PolicyError: the schedule does not fit so many steps.
        """
        raise NotImplementedError


@register
@dataclass(frozen=True)
class Every(When):
    """The first ``warmup`` steps, then one full step after every ``interval`` − 1 others; the first of these comes
    ``sooner`` by so many steps."""

    interval: Count = 3
    warmup: Count = 1
    sooner: Natural = 0

    def check(self) -> None:
        if self.sooner >= self.interval:
            raise PolicyError(f"sooner must stay below interval = {self.interval}, not {self.sooner}")

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the last full step."""
        return since(counted_steps(num_steps, self.interval, self.warmup, self.sooner), num_steps)


@register
@dataclass(frozen=True)
class Periodic(When):
    """The first ``warmup`` steps and the multiples of the interval, which ``periods`` may set for a kind of site."""

    interval: Count = 3
    warmup: Count = 1
    periods: Mapping[Kind, Count] = field(default_factory=dict)

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the last full step of that kind."""
        return since(periodic_steps(num_steps, self.periods.get(kind, self.interval), self.warmup), num_steps)


@register
@dataclass(frozen=True)
class IntervalFunction(When):
    """ToCa's interval function (section 3.3): ``interval`` bent by ``slope``, and another one in a sensitive range of
    s/T. ``count``: whether s runs ``"down"`` from T − 1 or ``"up"`` from 0."""

    interval: Count = 3
    slope: Slope = 0.4
    sensitive: tuple[Fraction, Fraction] = (0.2, 0.4)
    sensitive_interval: Count = 2
    count: Counting = "down"
    warmup: Count = 1

    def check(self) -> None:
        check_range("sensitive", self.sensitive)

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """s modulo the interval in force."""
        by_counter = toca_phases(
            num_steps, self.interval, self.slope, self.sensitive, self.sensitive_interval, self.count
        )  # fmt: skip
        calls = [by_counter[counted(call, num_steps, self.count)] for call in range(num_steps)]
        return tuple(0 if call < self.warmup else phase for call, phase in enumerate(calls))


@register
@dataclass(frozen=True)
class Spread(When):
    """As many full steps as every ``interval``-th would be, from the first to the last but one, so that no long gap
    ends the run; ``bend`` 1 lays them evenly, less makes them denser towards the end of denoising."""

    interval: Count = 3
    bend: Bend = 1.0
    warmup: Count = 1

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the last full step."""
        return since(spread_steps(num_steps, self.interval, self.bend, self.warmup), num_steps)


@register
@dataclass(frozen=True)
class EndAligned(When):
    """The first ``warmup`` steps, and every ``interval``-th counted back from the last but one, so that the run ends
    with one step that is not full, or with ``last`` is too. With an interval of 1, all steps."""

    interval: Count = 3
    warmup: Count = 1
    last: bool = False

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the last full step."""
        full = end_aligned_steps(num_steps, self.interval, self.warmup)
        return since(sorted({*full, num_steps - 1}) if self.last else full, num_steps)


@register
@dataclass(frozen=True)
class Listed(When):
    """The full steps themselves, as rising call indices with 0 among them."""

    full: tuple[Call, ...]

    def check(self) -> None:
        if list(self.full) != sorted({*self.full, 0}):
            raise PolicyError(f"full must rise from 0, not {told(self.full)}")

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the last full step.

        Raises:
            PolicyError: a listed step lies behind the run's end.
        """
        if self.full[-1] >= num_steps:
            raise PolicyError(f"full must stay below num_steps = {num_steps}, not {told(self.full)}")
        return since(self.full, num_steps)


@register
@dataclass(frozen=True)
class Adaptive(When):
    """After the ``warmup``, a step is full where a test at run time says so: what ``by`` measures goes beyond
    ``threshold``. ``limit``: of other steps in a row; ``ends_full``: whether the last step is full whatever it says."""

    threshold: Threshold = 0.1
    warmup: Count = 1
    limit: Count | None = None
    by: Gate = field(default_factory=FirstBlocks)
    ends_full: bool = False

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the warm-up: those that need not be full."""
        last = {num_steps - 1} if self.ends_full else set()
        return since({*range(min(self.warmup, num_steps)), *last}, num_steps)


def check_range(name: str, ends: tuple[float, float]) -> None:
    """Refuse a range that ends before it starts.

    Raises:
        PolicyError: it does.
    """
    if not ends[0] <= ends[1]:
        raise PolicyError(f"{name} must be a range that ends where it starts or later, not {ends}")


def since(full: Iterable[int], num_steps: int) -> tuple[int, ...]:
    """For each call, how many calls ago the last full one was."""
    steps, last, phases = set(full), 0, []
    for call in range(num_steps):
        last = call if call in steps else last
        phases.append(call - last)
    return tuple(phases)
