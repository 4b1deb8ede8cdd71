"""HyCa: each group of channels is forecast by a rule of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from toca_compile.errors import PolicyError
from toca_compile.ir.anchors import Measured, Weights
from toca_compile.ir.fields import Natural
from toca_compile.ir.registry import register
from toca_compile.policies.anchors import Polynomial


@register
@dataclass(frozen=True)
class ByChannel(Weights):
    """Rules for groups of channels (HyCa, arXiv 2510.04188): channels move alike in groups, smoothly here and stiffly
    there, and each group is best forecast by another solver of one differential equation. The groups are the model's,
    and are found once: see ``toca_compile.quality.calibration.channel_rules``. How they are told apart, how many there
    are and which rules they choose from is our choice. For ``Anchors(by=…)`` of sites or of all blocks.

    Args:
        rules: one a group.
        groups: of each channel (the last dimension of what is kept), which rule is its.

    Raises:
        PolicyError: a channel's rule is not there, or a rule does not follow from the steps alone.
    """

    rules: tuple[Weights, ...] = (Polynomial(1),)
    groups: tuple[Natural, ...] = (0,)

    def check(self) -> None:
        for rule in self.rules:
            if isinstance(rule, Measured | ByChannel) or type(rule) is Weights or rule.steered:
                raise PolicyError(f"rules must give weights from the steps alone, not {rule!r}")
        if not self.groups or max(self.groups) >= len(self.rules):
            raise PolicyError(f"groups must number one of {len(self.rules)} rules for each channel")

    def weights(self, full: Sequence[int], step: int) -> list[float]:
        return self.rules[0].weights(full, step)

    def by_group(self) -> tuple[Weights, ...]:
        return self.rules

    def channels(self) -> tuple[int, ...]:
        return self.groups

    def for_run(self, num_steps: int) -> "ByChannel":
        return replace(self, rules=tuple(rule.for_run(num_steps) for rule in self.rules))

    def form(self) -> "ByChannel":
        return replace(self, rules=(Polynomial(1),) * len(self.rules))
