"""The policies that are compositions under a name of their own."""

from dataclasses import dataclass, replace
from typing import TypeVar

from toca_compile.ir.fields import Steps
from toca_compile.ir.plan import Plan
from toca_compile.ir.types import Site
from toca_compile.policies.base import CachingPolicy
from toca_compile.policies.composition import Composition

P = TypeVar("P", bound="Composed")


@dataclass(frozen=True)
class Composed(CachingPolicy):
    """Base of a policy that is told by few numbers and made of the parts that ``composition`` names.

    Args:
        num_steps: model calls of one run.
    """

    num_steps: Steps = 50

    def check(self) -> None:
        self.composition()  # parts that contradict each other are refused

    def composition(self) -> Composition:
        """Its parts."""
        raise NotImplementedError

    def full_steps(self, kind: str = "") -> tuple[int, ...]:
        """The full steps of a kind of site (or of those without a period of their own) as call indices, 0 first."""
        return self.composition().full_steps(kind)

    def for_run(self: P, num_steps: int, guided: bool) -> P:
        return replace(self, num_steps=num_steps)

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        return self.composition().plan(sites)
