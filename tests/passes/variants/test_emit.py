"""Emit: the graph of a variant while it is built."""

import pytest
import torch

from toca_compile.ir.program import Program
from toca_compile.ir.state import Number, Slot, State
from toca_compile.passes.variants.emit import Builder, Emissions


def test_a_buffer_is_one_input_and_what_nothing_reads_is_none(program: Program) -> None:
    first, second = program.segments[0].outputs[0], program.sites[0].add
    builder = Builder([first, second, first])
    cache = builder.slot(State.OUTPUT, 0)
    assert builder.slot(State.OUTPUT, 0) is cache
    builder.slot(Number.K, 0)
    total = builder.call(torch.ops.aten.add.Tensor, builder.env[second], cache)
    variant = builder.finish([total])
    assert variant.values == (1,)
    assert variant.slots == (Slot(State.OUTPUT, 0),)
    assert [n.name for n in variant.module.graph.nodes if n.op == "placeholder"] == ["in1_add", "cache0"]


def test_an_emission_is_found_by_class_or_base() -> None:
    table: Emissions[str] = Emissions()
    table.of(int)("number")
    assert table.find(True) == "number"  # a bool is an int
    with pytest.raises(KeyError, match="nothing emits str"):
        table.find("text")
