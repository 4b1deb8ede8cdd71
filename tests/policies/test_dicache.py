"""DiCache: values and decisions of its loop."""

from typing import Any

from tests.oracles.gated import STEPS, DiLoop, decide, same_loop
from toca_compile.policies import Along, DiCache


def test_equal_to_its_loop(dit: tuple[Any, Any]) -> None:
    loops: list[Any] = []
    for threshold, probe, retention in ((0.1, 1, 0.2), (0.3, 2, 0.0), (0.6, 1, 0.1), (0.4, 3, 0.3)):
        policy = DiCache(STEPS, threshold, probe, retention)
        warmup = max(int(retention * STEPS), 1)
        make = lambda model, t=threshold, m=probe, w=warmup: DiLoop(model, STEPS, threshold=t, probe=m, warmup=w)  # noqa: E731
        loops.append(same_loop(dit, policy, make))
    decide(loops)
    assert any(1 < share < 1.5 for loop in loops for share in loop.shares)  # and not only at its limits


def test_the_share_of_first_full_steps_is_of_the_run() -> None:
    assert [DiCache().for_run(steps, False).full_steps() for steps in (3, 10, 20)] == [(0,), (0, 1), (0, 1, 2, 3)]


def test_without_a_gate_the_last_value_counts() -> None:
    assert Along().weights((0, 3), 5) == [0.0, 1.0]
