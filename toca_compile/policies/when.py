"""When a step is full. Each kind of schedule gives every call a *phase*: 0 where it is full, else its place between."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from toca_compile.errors import PolicyError
from toca_compile.policies.schedules import (
    check_whole,
    counted,
    counted_steps,
    periodic_steps,
    spread_steps,
    toca_phases,
)


@dataclass(frozen=True)
class Every:
    """The first ``warmup`` steps, then one full step after every ``interval`` − 1 others."""

    interval: int = 3
    warmup: int = 1

    def __post_init__(self) -> None:
        check_whole("interval", self.interval)
        check_whole("warmup", self.warmup)

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the last full step."""
        return _since(counted_steps(num_steps, self.interval, self.warmup), num_steps)


@dataclass(frozen=True)
class Periodic:
    """The first ``warmup`` steps and the multiples of the interval, which ``periods`` may set for a kind of site."""

    interval: int = 3
    warmup: int = 1
    periods: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole("interval", self.interval)
        check_whole("warmup", self.warmup)
        for kind, period in self.periods.items():
            check_whole(f"periods[{kind!r}]", period)

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the last full step of that kind."""
        return _since(periodic_steps(num_steps, self.periods.get(kind, self.interval), self.warmup), num_steps)


@dataclass(frozen=True)
class IntervalFunction:
    """ToCa's interval function (section 3.3): ``interval`` bent by ``slope``, and another one in a sensitive range of
    s/T. ``count``: whether s runs ``"down"`` from T − 1 or ``"up"`` from 0."""

    interval: int = 3
    slope: float = 0.4
    sensitive: tuple[float, float] = (0.2, 0.4)
    sensitive_interval: int = 2
    count: str = "down"
    warmup: int = 1

    def __post_init__(self) -> None:
        for name in ("interval", "sensitive_interval", "warmup"):
            check_whole(name, getattr(self, name))
        if self.count not in ("down", "up"):
            raise PolicyError(f"count must be 'down' or 'up', not {self.count!r}")
        if not 0 <= self.sensitive[0] <= self.sensitive[1] <= 1:
            raise PolicyError(f"sensitive must be an increasing range within [0, 1], not {self.sensitive}")
        if not 0 <= self.slope < 1:
            raise PolicyError(f"slope must lie in [0, 1), not {self.slope}")

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """s modulo the interval in force."""
        by_counter = toca_phases(
            num_steps, self.interval, self.slope, self.sensitive, self.sensitive_interval, self.count
        )  # fmt: skip
        calls = [by_counter[counted(call, num_steps, self.count)] for call in range(num_steps)]
        return tuple(0 if call < self.warmup else phase for call, phase in enumerate(calls))


@dataclass(frozen=True)
class Spread:
    """As many full steps as every ``interval``-th would be, from the first to the last but one, so that no long gap
    ends the run; ``bend`` 1 lays them evenly, less makes them denser towards the end of denoising."""

    interval: int = 3
    bend: float = 1.0
    warmup: int = 1

    def __post_init__(self) -> None:
        check_whole("interval", self.interval)
        check_whole("warmup", self.warmup)
        if not 0 < self.bend < 10:
            raise PolicyError(f"bend must lie between 0 and 10, not {self.bend!r}")

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the last full step."""
        return _since(spread_steps(num_steps, self.interval, self.bend, self.warmup), num_steps)


@dataclass(frozen=True)
class Listed:
    """The full steps themselves, as rising call indices with 0 among them."""

    full: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(i, int) for i in self.full) or list(self.full) != sorted({*self.full, 0}):
            raise PolicyError(f"full must rise from 0, not {self.full}")

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the last full step.

        Raises:
            PolicyError: a listed step lies behind the run's end.
        """
        if self.full[-1] >= num_steps:
            raise PolicyError(f"full must stay below num_steps = {num_steps}, not {self.full}")
        return _since(self.full, num_steps)


@dataclass(frozen=True)
class Adaptive:
    """After the ``warmup``, a step is full where a test at run time says so: the change that the first blocks make
    differs from what it was at the last full step by more than ``threshold`` (FirstBlockCache, DBCache). ``limit``: of
    other steps in a row."""

    threshold: float = 0.1
    warmup: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        check_whole("warmup", self.warmup)
        if self.limit is not None:
            check_whole("limit", self.limit)
        if not self.threshold > 0:
            raise PolicyError(f"threshold must be above 0, not {self.threshold!r}")

    def phases(self, num_steps: int, kind: str) -> tuple[int, ...]:
        """Calls since the warm-up: those that need not be full."""
        return _since(range(min(self.warmup, num_steps)), num_steps)


When = Every | Periodic | IntervalFunction | Spread | Listed | Adaptive


def _since(full: Iterable[int], num_steps: int) -> tuple[int, ...]:
    steps, last, phases = set(full), 0, []
    for call in range(num_steps):
        last = call if call in steps else last
        phases.append(call - last)
    return tuple(phases)
