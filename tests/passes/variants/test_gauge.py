"""Gauge: what is kept of what a gate measures, and the distance from it."""

import pytest
from expecttest import assert_expected_inline

from toca_compile.errors import PolicyError
from toca_compile.ir.gates import FirstOutput, Gate, LastBlocks, Rate
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.plan import Skip
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Program
from toca_compile.passes.proof.block_range import find_range
from toca_compile.passes.variants.skip_range import GRAPHS


def texts(program: Program, gate: Gate, skipped: set[int], order: int = 0) -> str:
    found = find_range(program, skipped, Skip(threshold=0.1, gate=gate, memory=CacheSpec(order)))
    graphs = {name: GRAPHS[name](found, CacheSpec(order)).module.graph for name in ("keep change", "probe")}
    return "\n".join(f"-- {name}\n{print_graph(graph)}" for name, graph in graphs.items())


def test_a_rate(program: Program) -> None:
    assert_expected_inline(
        texts(program, Rate(), {2, 3}),
        """\
-- keep change
in0_add_1 = input  # [2, 6, 4]
in1_add_3 = input  # [2, 6, 4]
change0_2 = input
change0_1 = input
change0_3 = input
change0 = input
relative_rate_default = toca.relative_rate(in1_add_3, change0_2, in0_add_1, change0_1)
store__default = toca.store_(change0_3, relative_rate_default)
store__default_1 = toca.store_(change0, in0_add_1)
store__default_2 = toca.store_(change0_1, in0_add_1)
store__default_3 = toca.store_(change0_2, in1_add_3)
return []
-- probe
in0_add_1 = input  # [2, 6, 4]
change0 = input
change0_2 = input
change0_3 = input
expected_change_default = toca.expected_change(in0_add_1, change0, change0_2, change0_3)
store__default = toca.store_(change0, in0_add_1)
return [expected_change_default]""",
    )


def test_the_first_blocks_output(program: Program) -> None:
    assert_expected_inline(
        texts(program, FirstOutput(), {2, 3}),
        """\
-- keep change
in0_transpose = input  # [2, 6, 4]
in1_add_1 = input  # [2, 6, 4]
change0_1 = input
change0_2 = input
change0 = input
store__default = toca.store_(change0_2, change0_1)
sub_tensor = sub.Tensor(in1_add_1, in0_transpose)
store__default_1 = toca.store_(change0_1, sub_tensor)
store__default_2 = toca.store_(change0, in1_add_1)
return []
-- probe
in0_transpose = input  # [2, 6, 4]
in1_add_1 = input  # [2, 6, 4]
change0_1 = input
change0_2 = input
change0 = input
sub_tensor = sub.Tensor(in1_add_1, in0_transpose)
share_of_way_default = toca.share_of_way(sub_tensor, change0_1, change0_2)
relative_change_default = toca.relative_change(in1_add_1, change0)
store__default = toca.store_(change0, in1_add_1)
stack_default = stack([relative_change_default, share_of_way_default])
return [stack_default]""",
    )


def test_a_forecast_of_the_last_blocks(program: Program) -> None:
    assert_expected_inline(
        texts(program, LastBlocks(), {0, 1}, 1),
        """\
-- keep change
in0_add_1 = input  # [2, 6, 4]
in1_add_3 = input  # [2, 6, 4]
cache0 = input
history0_1 = input
keep0_1 = input
sub_tensor = sub.Tensor(in1_add_3, in0_add_1)
difference_default = toca.difference(sub_tensor, cache0, keep0_1)
store__default = toca.store_(history0_1, difference_default)
store__default_1 = toca.store_(cache0, sub_tensor)
return []
-- probe
in0_add_1 = input  # [2, 6, 4]
in1_add_3 = input  # [2, 6, 4]
cache0 = input
history0_1 = input
move0_1 = input
forecast_default = toca.forecast(cache0, history0_1, move0_1, 1)
sub_tensor = sub.Tensor(in1_add_3, in0_add_1)
relative_change_default = toca.relative_change(forecast_default, sub_tensor)
return [relative_change_default]""",
    )


def test_blocks_that_are_not_there(program: Program) -> None:
    with pytest.raises(PolicyError, match="held against the blocks behind those to skip: compute at least one"):
        texts(program, LastBlocks(), {0, 1, 2, 3})
