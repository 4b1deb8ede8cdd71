"""What every policy of this package is."""

from typing import Any, TypeVar

from toca_compile.ir.fields import Family
from toca_compile.ir.plan import Plan
from toca_compile.ir.types import Site

P = TypeVar("P", bound="CachingPolicy")


class CachingPolicy(Family):
    """Base of the policies. Those that files may name (``save_policy``) register themselves::

    @register
    @dataclass(frozen=True)
    class Mine(CachingPolicy): ...
    """

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """What each of the sites does at each step, decided once for the whole run.

        Raises:
            PolicyError: the policy asks a site for what it cannot do.
        """
        raise NotImplementedError

    def for_run(self: P, num_steps: int, guided: bool) -> P:
        """The same policy for one run of a pipeline.

        Args:
            num_steps: model calls of the run.
            guided: whether its batches are guidance pairs; without guidance their halves are unrelated pictures.

        Raises:
            PolicyError: the policy cannot hold for so many steps.
        """
        own: Any = self
        return own
