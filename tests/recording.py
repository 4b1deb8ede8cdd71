"""Lowerings that keep what variants do as they run: the indices of every selection, and the products."""

from typing import Any, ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from toca_compile.ir.program import Variant
from toca_compile.lowerings import LOWERINGS


class Recording(torch.fx.Interpreter):
    """Runs a variant node by node; ``chosen`` holds the sorted indices of the selections since it was cleared."""

    chosen: ClassVar[list[torch.Tensor]] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        out = super().run_node(n)
        if n.target is torch.ops.toca.select_tokens.default:
            self.chosen.append(out.sort(1).values)
        return out


def same_selections(selected: list[dict[Any, torch.Tensor]], tokens: int) -> None:
    """Our selections are the oracle's, in order; where it selects none or all there is nothing to select."""
    wanted = [v for step in selected for v in step.values() if 0 < v.shape[1] < tokens]
    assert len(Recording.chosen) == len(wanted)
    for ours, theirs in zip(Recording.chosen, wanted, strict=True):
        assert torch.equal(ours, theirs)


def counting_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make a lowering ``"counting"``; what torch counts of each variant that it runs is added to the list. (Fused
    attention is not, on a CPU.)"""
    counted: list[int] = []

    def counting(variant: Variant, examples: Any) -> Any:
        def call(*args: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                out = variant.module(*args)
            counted.append(counter.get_total_flops())
            return out

        return call

    monkeypatch.setitem(LOWERINGS, "counting", counting)
    return counted
