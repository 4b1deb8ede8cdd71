"""EasyCache: values and decisions of its loop."""

from typing import Any

from tests.oracles.gated import STEPS, EasyLoop, decide, same_loop
from toca_compile.policies import Adaptive, Composition, EasyCache, Rate, Rule, SkipBlocks


def test_equal_to_its_loop(dit: tuple[Any, Any]) -> None:
    loops = []
    for threshold, warmup, limit in ((0.1, 1, None), (0.3, 2, None), (0.3, 3, 1), (0.8, 2, 4)):
        policy = EasyCache(STEPS, threshold, warmup, limit)
        make = lambda model, t=threshold, w=warmup, k=limit: EasyLoop(model, STEPS, threshold=t, warmup=w, limit=k)  # noqa: E731
        loops.append(same_loop(dit, policy, make))
    decide(loops)


def test_it_is_its_parts() -> None:
    when = Adaptive(0.05, 5, None, Rate(), ends_full=True)
    assert EasyCache(28).composition() == Composition(28, when, (Rule(SkipBlocks()),))
