"""Written: a graph may go on changing an input where what it writes follows from no branch."""

import pytest
from torch import fx

from toca_compile import UnsupportedGraphError
from toca_compile.ir.program import Program
from toca_compile.passes.proof.written import check_written


def named(program: Program, name: str) -> fx.Node:
    """A node of the program."""
    return next(n for n in program.module.graph.nodes if n.name == name)


def test_what_stands_before_the_branches_may_be_written(program: Program) -> None:
    check_written(program.module.graph, program.sites, [named(program, "transpose"), program.placeholders[0]])


@pytest.mark.parametrize("name", ["linear", "relu", "add_1"])
def test_what_follows_from_a_branch_may_not(program: Program, name: str) -> None:
    with pytest.raises(UnsupportedGraphError, match="follows from a branch"):
        check_written(program.module.graph, program.sites, [named(program, name)])
