"""Bands: a forecast whose low frequencies are those of the last value."""

from dataclasses import replace

import pytest
from expecttest import assert_expected_inline

from toca_compile.errors import PolicyError
from toca_compile.ir.anchors import BandRing
from toca_compile.ir.plan import Skip
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Program
from toca_compile.passes.proof.block_range import find_range
from toca_compile.passes.variants.skip_range import skip_range


def text(program: Program, grid: tuple[int, int] | None) -> str:
    sites = tuple(replace(s, axis=replace(s.axis, grid=grid)) for s in program.sites)
    memory = BandRing(2, cutoff=0.5)
    found = find_range(replace(program, sites=sites), {2, 3}, Skip(memory=memory))
    return print_graph(skip_range(found, memory).module.graph)


def test_a_grid(program: Program) -> None:
    assert_expected_inline(
        text(program, (2, 3)),
        """\
in0_add_1 = input  # [2, 6, 4]
cache0 = input
history0_1 = input
move0 = input
move0_1 = input
select_int = select.int(history0_1, 0, 0)
weighted_default = toca.weighted(cache0, move0)
weighted_default_1 = toca.weighted(select_int, move0_1)
add_tensor = add.Tensor(weighted_default, weighted_default_1)
with_low_band_default = toca.with_low_band(add_tensor, cache0, 1, 1, [1, 2, 3], 0, 0.5)
add_tensor_1 = add.Tensor(in0_add_1, with_low_band_default)
_to_copy_default = _to_copy(add_tensor_1, dtype=torch.float32)
return [_to_copy_default]""",
    )


def test_no_grid(program: Program) -> None:
    with pytest.raises(PolicyError, match="height and width in tokens are not known"):
        text(program, None)
