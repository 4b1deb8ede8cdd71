"""NumericCheck: a partial variant is its dense meaning, or is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import toca_compile
from tests.models import Mixing, PlainDiT, randomize
from tests.runs import TIMES, optimized, steps
from tests.sampling import noise, sample
from toca_compile import ToCa, VerifyError
from toca_compile.ir.spec import AxisSpec, elementwise
from toca_compile.rules.registry import RULES, Rule

aten = torch.ops.aten


def test_a_wrong_rule_is_caught_by_the_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """With cumsum called pointwise the proof goes through; the numeric check then refuses the variant."""

    def wrong(call: Any) -> AxisSpec:
        return elementwise(call.operands, call.results)

    monkeypatch.setitem(RULES, aten.cumsum.default, replace(RULES[aten.cumsum.default], axes=wrong))
    opt = toca_compile.optimize(
        randomize(Mixing()), ToCa(num_steps=4, fresh_ratio=0.3, schedule="constant"), lowering="eager"
    )
    with pytest.raises(VerifyError, match="not its dense meaning"):
        sample(opt, 4, noise())


def test_the_first_partial_variant_is_verified_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is wrong on purpose: with nothing set the first partial step says so."""
    from toca_compile import VerifyError
    from toca_compile.ir.spec import elementwise
    from toca_compile.rules.registry import RULES

    class Rolled(PlainDiT):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            h, c = self.prepare(x, t, y)
            for block in self.blocks:
                h = block(h, c)
                h = h + block.mlp(h.roll(1, 1))
            return self.finish(h, c)

    roll = torch.ops.aten.roll.default
    wrong = Rule(roll, lambda call: elementwise(call.operands, call.results), ())
    monkeypatch.setitem(RULES, roll, wrong)
    for asked, caught in ((None, True), ("1", True), ("all", True), ("0", False)):
        monkeypatch.delenv("TOCA_VERIFY", raising=False)
        if asked is not None:
            monkeypatch.setenv("TOCA_VERIFY", asked)
        opt = optimized(randomize(Rolled(depth=1)))
        if caught:
            with pytest.raises(VerifyError, match="dense meaning"):
                steps(opt, noise(), TIMES)
        else:
            steps(opt, noise(), TIMES)
    monkeypatch.undo()
    monkeypatch.delenv("TOCA_VERIFY", raising=False)
    opt = optimized(randomize(PlainDiT(depth=2)))
    steps(opt, noise(), TIMES)
    assert "verified" in str(toca_compile.explain(opt))
