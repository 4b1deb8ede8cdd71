"""Costs: how many requests it pays to work on at once."""

from typing import Any

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise
from toca_compile import Engine, Fora, Request
from toca_compile.runtime.clock import Clock
from toca_compile.serving.costs import _SEEN, Costs

SIZES = (1, 2, 4, 8)


class Took(Clock):
    """A clock that has taken so long, when it is said to be over."""

    def __init__(self, seconds: float, *, over: bool = True) -> None:
        self._seconds, self.over = seconds, over

    @property
    def is_over(self) -> bool:
        return self.over

    @property
    def seconds(self) -> float:
        assert self.over
        return self._seconds


def costs(of: dict[int, float], times: int = _SEEN) -> Costs:
    found = Costs()
    for size, seconds in of.items():
        for i in range(times):
            found.note(size, Took(seconds * (5 if i == 0 else 1)))  # the first compiles
    return found


@pytest.mark.parametrize(
    ("of", "wanted"),
    [
        ({}, 8),
        ({8: 8.0}, 8),  # nobody knows what one alone takes
        ({1: 1.0}, 8),
        ({1: 1.0, 8: 8.0}, 1),
        ({1: 1.0, 8: 7.5}, 1),
        ({1: 1.0, 8: 7.0}, 8),
        ({1: 1.0, 2: 1.1, 4: 2.2, 8: 4.4}, 2),
        ({1: 1.0, 2: 1.1}, 8),  # and more may be better still
        ({1: 1.0, 2: 2.0}, 1),
    ],
)
def test_so_many_are_worked_on(of: dict[int, float], wanted: int) -> None:
    assert costs(of).at_once(SIZES) == wanted


def test_few_calls_say_nothing() -> None:
    assert costs({1: 1.0, 8: 8.0}, _SEEN - 1).at_once(SIZES) == 8


def test_nobody_waits_for_a_device() -> None:
    found, running = costs({8: 8.0}), [Took(1.0, over=False) for _ in range(_SEEN)]
    for clock in running:
        found.note(1, clock)
    assert found.at_once(SIZES) == 8
    for clock in running:
        clock.over = True
    found.note(8, Took(8.0))
    assert found.at_once(SIZES) == 1


def test_an_engine_whose_batches_gain_nothing_works_on_one_request_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Costs, "at_once", lambda *_: 1)
    model, order = randomize(PlainDiT(depth=1)), []

    def sampler(request: Request) -> Any:
        x = noise(1, seed=request.seed)
        for i in range(request.num_steps):
            t = torch.full((1,), 1000 - 100 * i)
            x = x - (yield toca_compile.serving.requests.call(x, t, torch.zeros(1, dtype=torch.int64)))[:, :2] / 8
            order.append(request.seed)
        return x

    with_one = Engine(model, Fora(4, 2), lowering="eager", sizes=SIZES)
    with_one.sample([Request(noise(1), num_steps=4, seed=seed, sampler=sampler) for seed in range(3)])
    assert order == [seed for seed in range(3) for _ in range(4)]
    assert with_one.statistics.samples == with_one.statistics.calls == 12
