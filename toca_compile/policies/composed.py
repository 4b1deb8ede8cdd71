"""The policies that are compositions under a name of their own."""

from dataclasses import dataclass, field, replace
from typing import TypeVar

from toca_compile.ir.fields import DeviceName, DtypeName, Steps
from toca_compile.ir.plan import Plan
from toca_compile.ir.types import Site
from toca_compile.policies.base import CachingPolicy
from toca_compile.policies.composition import Composition

P = TypeVar("P", bound="Composed")


@dataclass(frozen=True)
class Composed(CachingPolicy):
    """Base of a policy that is told by few numbers and made of parts: a class of it names them in ``parts``.

    Args:
        num_steps: model calls of one run.
        cache_dtype, cache_device: by name, how ``Composition`` keeps what it keeps.
    """

    num_steps: Steps = 50
    cache_dtype: DtypeName | None = field(default=None, kw_only=True)
    cache_device: DeviceName | None = field(default=None, kw_only=True)

    def check(self) -> None:
        self.composition()  # parts that contradict each other are refused

    def parts(self) -> Composition:
        """What it is made of, but for how that is kept."""
        raise NotImplementedError

    def composition(self) -> Composition:
        """The same policy by its parts."""
        return replace(self.parts(), cache_dtype=self.cache_dtype, cache_device=self.cache_device)

    def full_steps(self, kind: str = "") -> tuple[int, ...]:
        """The full steps of a kind of site (or of those without a period of their own) as call indices, 0 first."""
        return self.composition().full_steps(kind)

    def for_run(self: P, num_steps: int, guided: bool) -> P:
        return replace(self, num_steps=num_steps)

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        return self.composition().plan(sites)
