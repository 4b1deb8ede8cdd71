"""The identity policy."""

from dataclasses import dataclass

from toca_compile.ir.actions import Compute
from toca_compile.ir.fields import Checked
from toca_compile.ir.plan import Plan, StepPlan
from toca_compile.ir.types import Site, StepKind


@dataclass(frozen=True)
class FullCompute(Checked):
    """Compute everything at every step: the plain model through the same path, for any number of steps."""

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """One full step, repeated."""
        step = StepPlan(StepKind.FULL, (Compute(),) * len(sites))
        return Plan((step,), endless=True)
