"""Ring: anchors are a weighted sum, and the value that is pushed out goes into the ring."""

import pytest
import torch

from tests.programs import REUSED, variant_of
from toca_compile.ir.actions import Compute, Keep
from toca_compile.ir.anchors import Anchors, Ring
from toca_compile.ir.program import Form, Program

toca = torch.ops.toca


@pytest.mark.parametrize("kept", [1, 3])
def test_as_many_weights_as_values(program: Program, kept: int) -> None:
    keep = Keep(Ring(kept))
    told = [n.target for n in variant_of(program, REUSED, Form(Anchors(), keep)).module.graph.nodes]
    assert told.count(toca.weighted.default) == kept
    made = [n.target for n in variant_of(program, REUSED, Form(Compute(), keep)).module.graph.nodes]
    assert made.count(toca.store_.default) == 1
    assert made.count(toca.store_at_.default) == min(kept - 1, 1)
    if kept > 1:  # before the new value is written over it
        assert made.index(toca.store_at_.default) < made.index(toca.store_.default)
