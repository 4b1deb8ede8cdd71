"""Times: what a model's inputs tell of the denoising time, as far as the host knows it, and which will be told next."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from toca_compile.runtime.host_known import HostKnown
from toca_compile.runtime.sight import on_host

_LARGEST = 4096  # numbers of a time that is looked up

Time = tuple[Any, ...]
Clocks = dict[Time, tuple[Tensor, ...]]  # the inputs that tell each time

# What pipelines give their models for a timestep of the scheduler.
_GIVEN: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000, lambda t: (1000 - t) / 1000,
)  # fmt: skip


@dataclass(frozen=True)
class Times:
    """What the host knows of a call's time.

    Attributes:
        announced: the timesteps of the sampling, as far as they are known.
        known: inputs on an accelerator whose numbers the host knows, by ``id``.
        waits: whether other numbers there are read, too.
    """

    announced: Sequence[float] = ()
    known: Mapping[int, HostKnown] = field(default_factory=dict)
    waits: bool = False

    def as_host(self, value: Any) -> Any:
        """An input, as the host knows it if it does."""
        known = self.known.get(id(value)) if self.known else None
        host = known.host if known is not None else None
        return value if host is None else host

    def time(self, clock: Sequence[Tensor]) -> Time | None:
        """The time that these inputs tell, as it is looked up; None where it is unknown or too much to compare."""
        hosts = [self.as_host(c) for c in clock]
        return time_of(hosts) if self.waits or all(map(on_host, hosts)) else None

    def ahead(self, clock: Sequence[Tensor]) -> Clocks:
        """The inputs that will tell the times announced, from this one on; nothing where they cannot be foreseen."""
        known = [self.known.get(id(c)) for c in clock]
        if all(k is None for k in known):
            return ahead(clock, self.announced)
        if not self.announced:
            return {}
        # What is no timestep (a guidance scale) stays as it is.
        columns = [
            k.ahead() if k is not None else itertools.repeat((own, own))
            for k, own in zip(known, [c.clone() for c in clock], strict=True)
        ]
        rows: Clocks = {}
        for told in zip(*columns, strict=False):
            time = time_of([host for _, host in told])
            if time is not None:
                rows[time] = tuple(value for value, _ in told)
        return rows


def time_of(clock: Sequence[Tensor]) -> Time | None:
    """The time as it is looked up; None where it is too much to compare."""
    if sum(c.numel() for c in clock) > _LARGEST:
        return None
    return tuple(x for c in clock for x in c.reshape(-1).tolist())


def ahead(clock: Sequence[Tensor], announced: Sequence[float], *, before: bool = False) -> Clocks:
    """The inputs that will tell the times announced, from this one on, if one of them can be recognised in how this one
    is told, the earliest; nothing otherwise. What tells no timestep (a guidance scale) stays as it is. A wrong guess is
    a row that nobody looks up. ``before``: also those before this one."""
    if not announced or not all(bool((c == c.reshape(-1)[:1]).all()) for c in clock):
        return {}
    ways: dict[int, Clocks] = {}
    for given, dtype in itertools.product(_GIVEN, (None, torch.float32)):
        told = [given(torch.tensor(announced).to(dtype or c.dtype)).to(c.dtype) for c in clock]
        met = [(t == c.reshape(-1)[0]).nonzero() for t, c in zip(told, clock, strict=True)]
        if any(len(at) for at in met):
            start = 0 if before else min(int(at[0]) for at in met if len(at))
            columns = [
                [torch.full_like(c, x) for x in t[start:].tolist()] if len(at) else [c.clone()] * (len(t) - start)
                for t, at, c in zip(told, met, clock, strict=True)
            ]
            rows = zip(*columns, strict=True)
            ways.setdefault(start, {}).update({time: row for row in rows if (time := time_of(row)) is not None})
    return ways[min(ways)] if ways else {}
