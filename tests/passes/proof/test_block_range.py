"""BlockRange: whole blocks in a row, and what stands in for them."""

from collections.abc import Set

import pytest

from toca_compile import PolicyError
from toca_compile.ir.plan import Skip
from toca_compile.ir.program import Program
from toca_compile.passes.proof.block_range import find_range


def test_a_block_that_is_skipped_yields_what_entered(program: Program) -> None:
    found = find_range(program, {2, 3}, Skip(threshold=0.1))
    assert [s.sites for s in program.segments[found.first : found.last]] == [(2, 3)]
    assert [n.name for n in found.outputs] == ["add_3"]
    assert [n.name for n in found.inputs] == ["add_1"]
    assert found.probe is not None
    assert [n.name for n in found.probe.given] == ["transpose", "add_1"]


@pytest.mark.parametrize(
    ("skipped", "skip", "why"),
    [
        ({3}, Skip(), "only whole blocks in a row"),
        ({0, 3}, Skip(), "only whole blocks in a row"),
        ({0, 1}, Skip(threshold=0.1), "compute at least one of them"),
    ],
)
def test_what_cannot_be_skipped(program: Program, skipped: Set[int], skip: Skip, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        find_range(program, skipped, skip)
