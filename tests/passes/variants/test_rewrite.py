"""Rewrite: each node is the model's own op unless an action says otherwise, and every buffer is written."""

import pytest

from tests.programs import text_of, variant_of
from toca_compile import PassError
from toca_compile.ir.actions import Compute, Keep
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.program import Form, Program
from toca_compile.ir.state import Slot, State
from toca_compile.passes.variants import rewrite


def test_plain_is_the_model(program: Program) -> None:
    assert "toca" not in text_of(program, Form(Compute(), Keep()), Form(Compute(), Keep()))


def test_buffers_are_inputs_after_the_values(program: Program) -> None:
    variant = variant_of(program, Form(Compute(), Keep(CacheSpec())), Form(Compute(), Keep()))
    assert variant.slots == (Slot(State.OUTPUT, 0),)
    names = [n.name for n in variant.module.graph.nodes if n.op == "placeholder"]
    assert names == [*(n for n in names if n.startswith("in")), "cache0"]
    assert len(variant.values) == len(names) - 1


def test_a_buffer_that_is_not_written_is_named(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "kept_slots", lambda *_: {Slot(State.KEYS, 0, 0)})
    with pytest.raises(PassError, match=r"the rewriting of .* failed: .*does not write.*keys"):
        variant_of(program, Form(Compute(), Keep()), Form(Compute(), Keep()))
