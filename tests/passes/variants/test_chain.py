"""Chain: what computes no branch is one graph, and means what its parts mean."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.runs import TIMES, kinds, optimized, steps
from tests.sampling import noise
from tests.shared import Traced
from toca_compile import BlockCache, DuCa, Fora, TaylorSeer, ToCa
from toca_compile.policies import Anchors, Composition, Every, Polynomial, Rule
from toca_compile.runtime.schedule import Schedule

aten = torch.ops.aten


def variants(opt: Any) -> dict[str, str]:
    """The text of every chain that was built, by its name."""
    return {n: text for n, text in toca_compile.explain(opt).graphs().items() if n.startswith("segments")}


POLICIES = {
    "reuse": Fora(8, 4),
    "forecast": TaylorSeer(8, 4, 2),
    "newton": TaylorSeer(8, 4, 2, basis="newton"),
    "anchors": Composition(8, Every(4), (Rule(Anchors(Polynomial(), 3)),)),
    "blocks": BlockCache(8, 1, interval=4, order=1),
    "all blocks": BlockCache(8, 0, interval=4),
    "half": ToCa(8, 4, 0.3),
    "in turns": DuCa(8, 4),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_chain_is_its_parts(traced: Traced, name: str) -> None:
    out = steps(traced(PlainDiT, POLICIES[name], depth=4)[1], noise(), TIMES)
    with patch.object(Schedule, "joined", lambda self, calls: calls):
        apart = steps(traced(PlainDiT, POLICIES[name], which=1, depth=4)[1], noise(), TIMES)
    assert torch.equal(out, apart)


def test_a_step_that_reuses_everything_is_one_call(traced: Traced) -> None:
    _, opt = traced(PlainDiT, Fora(8, 4), depth=4)
    steps(opt, noise(), TIMES)
    schedule = opt._toca.session.executors[0].schedule
    front = sum(s.timed for s in schedule.program.segments)
    assert len(schedule.joined(schedule.calls[1])) == front + 1
    (text,) = variants(opt).values()
    assert text.count("= linear(") == 1  # the last layer's


@pytest.mark.parametrize("policy", [ToCa(8, 4, 0.05), DuCa(8, 4)], ids=str)
def test_where_tokens_are_selected_blocks_stay_apart(traced: Traced, policy: Any) -> None:
    """Or another ratio, under which some have no token left to compute, would compile anew."""
    _, opt = traced(PlainDiT, policy, depth=4)
    steps(opt, noise(), TIMES)
    assert "p" in kinds(opt)
    assert not variants(opt)


def test_sites_that_are_forecast_alike_share_their_numbers(traced: Traced) -> None:
    _, opt = traced(PlainDiT, TaylorSeer(8, 4, 2), depth=4)
    steps(opt, noise(), TIMES)
    text = variants(opt)["segments5-10[forecast]"]
    assert text.count(" = number move") == 1  # so far there were two full steps, so one difference
    assert text.count(" = buffer history") == 8


def test_a_step_that_may_compute_what_it_skips_is_joined_behind_the_test(traced: Traced) -> None:
    _, opt = traced(PlainDiT, BlockCache(8, threshold=0.5), depth=4)
    out = steps(opt, noise(), TIMES)
    schedule = opt._toca.session.executors[0].schedule
    assert schedule.probe is not None
    for calls in (schedule.calls[1], schedule.uncut[1]):
        assert schedule.joined(calls)[: schedule.probe.at] == calls[: schedule.probe.at]
    assert len(schedule.joined(schedule.calls[1])) == schedule.probe.at + 1
    with patch.object(Schedule, "joined", lambda self, calls: calls):
        _, apart = traced(PlainDiT, BlockCache(8, threshold=0.5), which=1, depth=4)
        assert torch.equal(out, steps(apart, noise(), TIMES))
    assert kinds(opt) == kinds(apart)
    assert "s" in kinds(opt)


class Pulsing(nn.Module):
    """A block that works out by itself what depends on the time: cheaply, so that no table keeps it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.rate = block, nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor, c: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.block(x, c) * (1 + 0.1 * self.rate * torch.sin(t / 1000))[:, None, None]


class Pulse(PlainDiT):
    """Blocks with the time's sine in each."""

    def __init__(self) -> None:
        super().__init__(depth=4)
        self.blocks = nn.ModuleList(Pulsing(block) for block in self.blocks)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, c = self.prepare(x, t, y)
        for block in self.blocks:
            x = block(x, c, t)
        return self.finish(x, c)


def test_what_blocks_make_alike_is_made_once() -> None:
    model = randomize(Pulse())
    opt = optimized(model, Fora(8, 4))
    out = steps(opt, noise(), TIMES)
    (text,) = variants(opt).values()
    assert text.count("= sin(") == 1
    assert text.count("= mul.Tensor(") >= 4  # by each block's own rate
    with patch.object(Schedule, "joined", lambda self, calls: calls):
        assert torch.equal(out, steps(optimized(model, Fora(8, 4)), noise(), TIMES))
