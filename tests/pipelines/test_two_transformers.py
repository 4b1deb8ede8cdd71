"""Pipelines whose steps are shared by two transformers, and such that denoise something beside the picture."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import toca_compile
from tests.pipelines import run
from tests.pipelines.builders import follow, kinds, made
from toca_compile import DuCa, Fora, FullCompute, TaylorSeer
from toca_compile.ir.plan import Policy

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def boundary(pipe: Any, ratio: float) -> None:
    """The share of the noise from which on the first transformer is asked."""
    pipe.register_to_config(boundary_ratio=ratio)


@pytest.mark.parametrize("name", ["Wan 2.2", "Wan 2.2 I2V"])
def test_each_is_planned_for_its_own_part(name: str) -> None:
    """Wherever the boundary lies: the second's first step is full, its plan ends with the sampling, and no matter how
    often the boundary moves, nothing is kept from a call before."""
    pipe, call = made(name)
    ratios = (0.9, 0.6, 0.35, 0.0, 1.1)
    plain = []
    for ratio in ratios:
        boundary(pipe, ratio)
        plain.append(run(pipe, call, 6))
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    first: dict[float, torch.Tensor] = {}
    for policy in (FullCompute(), Fora(50, 3)):
        follow(pipe, policy)
        for ratio, wanted in [*zip(ratios, plain, strict=True), (ratios[0], plain[0])]:
            boundary(pipe, ratio)
            made_now = run(pipe, call, 6)
            if isinstance(policy, FullCompute):
                assert torch.equal(made_now, wanted)
                continue
            assert torch.equal(first.setdefault(ratio, made_now), made_now)
            early = sum(1 for t in pipe.scheduler.timesteps if t >= 1000 * ratio)
            planned = [("frrfrr"[:early]), ("frrfrr"[: 6 - early])]
            asked = [[p, p] for p in planned]
            got = [runs if p else [] for p, runs in zip(planned, kinds(pipe), strict=True)]
            assert got == [a if p else [] for p, a in zip(planned, asked, strict=True)], ratio


def test_the_second_is_not_traced_again() -> None:
    """Both are of one class, and Dynamo follows its Python once, or not at all, where it did before."""
    pipe, call = made("Wan 2.2")
    toca_compile.optimize(pipe, Fora(50, 3), lowering="eager")
    before = counters["stats"]["unique_graphs"]
    run(pipe, call, 6)
    assert counters["stats"]["unique_graphs"] - before <= 1
    assert [len(runs) for runs in kinds(pipe)] == [2, 2]


class Spread:
    """A policy of the user's own, which says of what length it was asked."""

    def __init__(self, asked: list[int], inner: Policy) -> None:
        self.asked, self.inner = asked, inner

    def plan(self, sites: Any) -> Any:
        """As the inner one's."""
        return self.inner.plan(sites)

    def for_run(self, num_steps: int, guided: bool) -> Policy:
        """Note the length."""
        self.asked.append(num_steps)
        return TaylorSeer(num_steps, 3, 1, schedule="spread")


def test_the_lengths_that_they_are_planned_for() -> None:
    pipe, call = made("Wan 2.2")  # three steps each
    asked: list[int] = []
    toca_compile.optimize(pipe, Spread(asked, DuCa(6)), lowering="eager")
    run(pipe, call, 6)
    assert asked == [3, 3]
    assert [len(k) for runs in kinds(pipe) for k in runs] == [3] * 4


def test_the_first_keeps_nothing_while_the_second_works() -> None:
    pipe, call = made("Wan 2.2")
    toca_compile.optimize(pipe, Fora(50, 3), lowering="eager")
    held: list[tuple[bool, bool]] = []

    def look(pipe: Any, index: int, _: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        held.append((pipe.transformer.cache_bytes > 0, pipe.transformer_2.cache_bytes > 0))
        return kwargs

    run(pipe, call, 6, callback_on_step_end=look)
    # Nor does either after the last of its steps.
    assert held == [(True, False)] * 2 + [(False, False)] + [(False, True)] * 2 + [(False, False)]


@pytest.mark.parametrize("ratio", [0.9, 0.35, 0.0, 1.1])
def test_a_level_is_meant_for_the_steps_of_each(ratio: float) -> None:
    """As long as its part, with the moves and times of that; where one makes all steps it has all."""
    pipe, call = made("Wan 2.2")
    boundary(pipe, ratio)
    toca_compile.optimize(pipe, "balanced", lowering="eager")
    run(pipe, call, 20)
    early = sum(1 for t in pipe.scheduler.timesteps if t >= 1000 * ratio)
    lengths = [n for n in (early, 20 - early) if n]
    reports = [r for r in toca_compile.explain(pipe).transformers.values() if r.compiled]
    assert [len(report.data[0].steps) for report in reports] == lengths
    assert [len(runs[0]) for runs in kinds(pipe) if runs] == lengths
    assert all(runs[0].startswith("ff") for runs in kinds(pipe) if runs)
