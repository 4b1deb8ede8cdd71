"""The program of a step is held against what it owes: no buffer that a step writes is left out, none is written where
the write may be lost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise
from toca_compile import BlockCache, Fora, VerifyError
from toca_compile.compiler.emit_step import StepProgram, verify

aten = torch.ops.aten


@pytest.fixture
def made() -> StepProgram:
    inputs = noise(), torch.zeros(2, dtype=torch.int64), torch.arange(2)
    return toca_compile.program(randomize(PlainDiT(depth=1)), Fora(4, 2), inputs)._step_program


def copies(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is aten.copy_.default]


def not_copied(program: StepProgram) -> None:
    program.module.graph.erase_node(copies(program.module.graph)[0])


def copied_twice(program: StepProgram) -> None:
    first, second = copies(program.module.graph)[:2]
    second.args = first.args


def written_inside(program: StepProgram) -> None:
    branch: Any = program.module.get_submodule("kind1")
    cache = next(n for n in branch.graph.nodes if n.name == "cache0")
    with branch.graph.inserting_before(branch.graph.output_node()):
        branch.graph.call_function(aten.add_.Tensor, (cache, 1))


def returned_less(program: StepProgram) -> None:
    branch: Any = program.module.get_submodule("kind1")
    branch.graph.output_node().args = (branch.graph.output_node().args[0][:-1],)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (not_copied, "a step writes"),
        (copied_twice, "are copied"),
        (written_inside, "kind1 writes to its input cache0"),
        (returned_less, "branches return different numbers"),
    ],
)
def test_lost_writes(spoil: Callable[[StepProgram], None], why: str, made: StepProgram) -> None:
    verify(made)
    spoil(made)
    with pytest.raises(VerifyError, match=why):
        verify(made)


def test_what_a_branch_within_a_branch_is_given() -> None:
    """Inductor lays out what it computes as it likes: what is handed on must be contiguous, or the inner branch, compiled
    for other strides, reads something else."""
    inputs = noise(), torch.zeros(2, dtype=torch.int64), torch.arange(2)
    made = toca_compile.program(randomize(PlainDiT(depth=2)), BlockCache(4, threshold=0.3), inputs)._step_program
    outer: Any = made.module.get_submodule("kind1")
    (branch,) = outer.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
    handed = next(n for n in branch.args[3] if n.op == "call_function")
    handed.kwargs = {}
    with pytest.raises(VerifyError, match="lie in memory"):
        verify(made)


def test_numbers_that_stay_the_same_in_a_kind_stand_once(made: StepProgram) -> None:
    """Of FORA nothing but the kind changes from step to step, and no number of tokens is told."""
    assert [row[0] for row in made.plan] == [0, 1, 0, 1]
    assert {len(row) for row in made.plan} == {1}
    assert made.sizes == ((),) * 4
