"""Needed: what a variant computes for all tokens, and the buffers it must write."""

from tests.programs import REUSED, ROWS
from toca_compile.ir.actions import Compute, Keep
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.program import Form, Program
from toca_compile.ir.state import Slot, State
from toca_compile.passes.variants.needed import kept_slots, needed_nodes

WHOLE = Form(Compute(order=1), Keep(CacheSpec(order=1)))


def names(program: Program, *forms: Form, dense: bool = False) -> set[str]:
    segment = next(s for s in program.segments if s.sites)
    sites = [program.sites[i] for i in segment.sites]
    return {n.name for n in needed_nodes(segment, sites, forms, dense=dense)}


def test_a_branch_that_is_not_computed_needs_nothing_of_its_own(program: Program) -> None:
    around = {"squeeze", "add", "linear_2", "mul", "add_1"}  # where a buffer stands for a branch, and what reads it
    mlp = {"linear_1", "relu"}
    assert names(program, REUSED, REUSED) == around
    assert names(program, REUSED, ROWS) == around  # its rows are computed from the gathered input
    assert names(program, REUSED, ROWS, dense=True) == around | mlp
    assert names(program, REUSED, WHOLE) == around | mlp
    assert names(program, WHOLE, WHOLE) == {n.name for s in program.segments if s.sites == (0, 1) for n in s.nodes}


def test_what_is_computed_is_written_with_its_history(program: Program) -> None:
    sites = program.sites[:2]
    assert kept_slots(sites, (REUSED, WHOLE)) == {Slot(State.OUTPUT, 1), Slot(State.HISTORY, 1, 1)}
    assert kept_slots(sites, (REUSED, ROWS)) == {Slot(State.OUTPUT, 1)}
    assert not kept_slots(sites, (REUSED, REUSED))
