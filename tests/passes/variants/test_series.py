"""Series: what is kept beside a value's last version, and how a later step is told from it."""

import pytest
import torch

from tests.programs import REUSED, variant_of
from toca_compile.ir.actions import Compute, Forecast, Keep
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.program import Form, Program
from toca_compile.ir.state import Slot, State

toca = torch.ops.toca


@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_difference_for_each_order(program: Program, order: int) -> None:
    keep = Keep(CacheSpec(order=order))
    buffers = {Slot(State.OUTPUT, 1), *(Slot(State.HISTORY, 1, i) for i in range(1, order + 1))}
    for form, op, written in (
        (Form(Forecast(order), keep), toca.forecast.default, False),
        (Form(Compute(order), keep), toca.difference.default, True),
    ):
        variant = variant_of(program, REUSED, form)
        targets = [n.target for n in variant.module.graph.nodes]
        assert targets.count(op) == order
        assert targets.count(toca.store_.default) == (order + 1 if written else 0)
        assert {s for s in variant.slots if s.is_buffer and s.position == 1} == buffers
