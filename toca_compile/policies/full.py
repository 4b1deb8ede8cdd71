"""The identity policy."""

from dataclasses import dataclass

from toca_compile.ir.actions import Compute
from toca_compile.ir.plan import Plan, StepPlan
from toca_compile.ir.registry import register
from toca_compile.ir.types import Site, StepKind
from toca_compile.policies.base import CachingPolicy


@register
@dataclass(frozen=True)
class FullCompute(CachingPolicy):
    """Compute everything at every step: the plain model through the same path, for any number of steps."""

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """One full step, repeated."""
        step = StepPlan(StepKind.FULL, (Compute(),) * len(sites))
        return Plan((step,), endless=True)
