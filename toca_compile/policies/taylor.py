"""TaylorSeer (Liu et al., ICCV 2025): forecast a site's output from its differences between full steps."""

from dataclasses import dataclass

import torch

from toca_compile.errors import PolicyError
from toca_compile.ir.plan import Memory, Plan, Selector, SiteStep, StepPlan, step_kind
from toca_compile.ir.types import Action, Site
from toca_compile.policies.schedules import check_whole, counted_steps, spread_steps

MAX_ORDER = 4


@dataclass(frozen=True)
class TaylorSeer:
    """Full steps keep every site's output and its differences; between them each is forecast by a Taylor series.

    At a full step, d steps after the last, D⁰ = F and Dⁱ⁺¹ = (Dⁱ new − Dⁱ old) / d; x steps later the forecast is
    Σ Dⁱ·xⁱ/i! up to the order that the full steps so far allow (one more with each). Steps are counted in calls. Beyond
    order 1 that is no polynomial through the full steps; ``basis="newton"`` is: divided differences, and for xⁱ/i! the
    product of the distances to the last i full steps. It is exact on polynomials of degree ``order``.

    Args:
        num_steps: model calls of one run.
        interval: N: N − 1 forecast steps between two full ones.
        order: highest difference, 0 to 4; 0 is plain reuse.
        warmup: how many first steps are full. Differences are made from the last of them on.
        schedule: ``"counter"`` as published, or ``"spread"``: as many full steps (``num_steps`` / ``interval``), laid
            from the first to the last but one, so that no long forecast ends the run.
        bend: of ``"spread"``: 1 is even, less is denser towards the end of denoising.
        basis: ``"taylor"`` as published, or ``"newton"``.
        full: the full steps themselves as call indices, 0 among them, instead of ``interval`` and ``warmup``.
        cache_dtype: ``"bfloat16"`` or another dtype's name to keep outputs and differences in; None: the output's own.

    Raises:
        PolicyError: a number outside its range.
    """

    num_steps: int = 50
    interval: int = 4
    order: int = 2
    warmup: int = 1
    schedule: str = "counter"
    bend: float = 1.0
    basis: str = "taylor"
    full: tuple[int, ...] = ()
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "interval", "warmup"):
            check_whole(name, getattr(self, name))
        if self.order not in range(MAX_ORDER + 1):
            raise PolicyError(f"order must be 0 to {MAX_ORDER}, not {self.order!r}")
        if self.schedule not in ("counter", "spread"):
            raise PolicyError(f"schedule must be 'counter' or 'spread', not {self.schedule!r}")
        if not 0 < self.bend < 10:
            raise PolicyError(f"bend must lie between 0 and 10, not {self.bend!r}")
        if self.basis not in ("taylor", "newton"):
            raise PolicyError(f"basis must be 'taylor' or 'newton', not {self.basis!r}")
        listed = all(isinstance(i, int) for i in self.full) and list(self.full) == sorted({*self.full, 0})
        if self.full and not (listed and self.full[-1] < self.num_steps):
            raise PolicyError(f"full must rise from 0 and stay below num_steps = {self.num_steps}, not {self.full}")
        kept_dtype(self.cache_dtype)

    def full_steps(self) -> tuple[int, ...]:
        """The full steps as call indices."""
        if self.full:
            return self.full
        if self.schedule == "spread":
            return spread_steps(self.num_steps, self.interval, self.bend, self.warmup)
        return counted_steps(self.num_steps, self.interval, self.warmup)

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """All sites alike: full, or forecast as far as there are differences."""
        full, made, steps = set(self.full_steps()), 0, []
        first = 1 if self.full else max(1, self.warmup - 1)
        for call in range(self.num_steps):
            if call in full:
                made = min(self.order, made + 1) if call >= first else 0
                rows = tuple(SiteStep(Action.COMPUTE, s.axis.size, made) for s in sites)
            else:
                action = Action.FORECAST if made else Action.REUSE
                rows = tuple(SiteStep(action, 0, made) for _ in sites)
            steps.append(StepPlan(step_kind(rows), rows))
        memory = Memory(self.order, kept_dtype(self.cache_dtype), self.basis)
        return Plan(tuple(steps), Selector("none"), memory=memory)


def kept_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name.

    Raises:
        PolicyError: it is no floating-point dtype.
    """
    dtype = getattr(torch, name, None) if name is not None else None
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise PolicyError(f"cache_dtype must name a floating-point dtype such as 'bfloat16', not {name!r}")
    return dtype
