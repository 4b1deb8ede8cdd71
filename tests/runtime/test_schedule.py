"""Schedule: which segments each step runs and what their sites do, laid out before the first step."""

import pytest

from tests.programs import tiny_program
from toca_compile import BlockCache, ToCa
from toca_compile.compiler.check_plan import check_plan
from toca_compile.ir.plan import Policy
from toca_compile.ir.program import Program, StandIn
from toca_compile.ir.state import State
from toca_compile.runtime.schedule import Calls, Schedule


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny_program()


def laid_out(program: Program, policy: Policy) -> Schedule:
    return Schedule(program, check_plan(policy, program, print))


def told(calls: Calls) -> list[str]:
    """The stand-ins by what they do, the other segments by their sites."""
    return [c.segment.does if isinstance(c.segment, StandIn) else str(list(c.segment.sites)) for c in calls]


def test_a_step_that_skips_blocks_runs_one_segment_instead(program: Program) -> None:
    schedule = laid_out(program, BlockCache(6, first=1, interval=3))
    assert told(schedule.calls[0]) == ["[]", "[0, 1]", "[2, 3]", "keep"]
    assert told(schedule.calls[1]) == ["[]", "[0, 1]", "skip"]
    assert schedule.probe is None
    assert [calls is schedule.calls[0] for calls in schedule.calls] == [True, False, False] * 2
    assert schedule.calls[1] is schedule.calls[2]
    assert [calls is schedule.calls[0] for calls in schedule.uncut] == [True] * 6


def test_with_a_threshold_either_is_at_hand(program: Program) -> None:
    schedule = laid_out(program, BlockCache(4, first=1, threshold=0.1))
    assert told(schedule.calls[1]) == ["[]", "[0, 1]", "skip"]
    assert told(schedule.uncut[1]) == ["[]", "[0, 1]", "keep change", "[2, 3]", "keep"]
    assert schedule.probe is not None
    assert told(schedule.calls[1][: schedule.probe.at]) == told(schedule.uncut[1][: schedule.probe.at])
    assert told((schedule.probe,)) == ["probe"]


def test_what_leaves_skipped_blocks_has_buffers_as_sites_have(program: Program) -> None:
    schedule = laid_out(program, BlockCache(6, first=1, interval=3, order=2))
    (stream,) = schedule.owners[len(program.sites) :]
    assert schedule.kept() == [(State.OUTPUT, 0, stream), (State.HISTORY, 1, stream), (State.HISTORY, 2, stream)]
    kinds = [kind for kind, _, _ in laid_out(program, BlockCache(4, first=1, threshold=0.1)).kept()]
    assert kinds == [State.OUTPUT, State.CHANGE]


def test_steps_that_differ_in_numbers_alone_run_the_same_calls(program: Program) -> None:
    schedule = laid_out(program, ToCa(50, 3, 0.5))
    forms = {tuple(call.variant for call in calls) for calls in schedule.calls}
    assert len({id(calls) for calls in schedule.calls}) == len(forms)
    assert len(forms) < len(set(schedule.rows))  # tokens change from step to step


def test_a_graph_that_comes_late_keeps_what_it_computes_first(program: Program) -> None:
    planned = check_plan(BlockCache(8, first=1, interval=4), program, print)
    late = Schedule(program, planned, start=2)
    assert told(late.calls[2]) == ["[]", "[0, 1]", "[2, 3]", "keep"]
    assert told(late.calls[3]) == ["[]", "[0, 1]", "skip"]
