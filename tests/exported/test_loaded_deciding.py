"""Policies that decide at run time, in a file, in the program of a step and live: the same steps and values."""

from typing import Any

import pytest
import torch
from torch import nn

import toca_compile
from tests.in_memory import loaded, whole
from tests.models import PlainDiT, randomize
from tests.runs import optimized
from tests.sampling import noise, sample
from toca_compile import BlockCache
from toca_compile.policies import (
    Adaptive,
    Anchors,
    Composition,
    DiCache,
    EasyCache,
    Hermite,
    LastBlocks,
    Rule,
    SeaCache,
    SkipBlocks,
    SpeCa,
    TeaCache,
)

STEPS = 10
INPUTS = noise(), torch.zeros(2, dtype=torch.int64), torch.arange(2)
POLICIES = [
    BlockCache(STEPS, threshold=0.5, limit=2, order=1),
    TeaCache(STEPS, 0.35, (2.0, 0.5, 0.0), limit=2),
    SeaCache(STEPS, 0.3, order=1),
    EasyCache(STEPS, 0.5, 2, limit=3, order=1),
    DiCache(STEPS, 1.5, retention=0.2),
    SpeCa(STEPS, 1.6, 0.8, limit=3, order=1, warmup=2),
    SpeCa(STEPS, 0.8, 1.0, drafts=1, order=2, warmup=1, basis="newton"),
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(PlainDiT(depth=3))


@pytest.fixture(scope="module")
def live(model: nn.Module) -> Any:
    return optimized(model, POLICIES[0])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_it_decides_alike(model: nn.Module, live: Any, policy: Any) -> None:
    live.policy = policy
    wanted, kinds = [], []
    for seed in range(2):
        wanted.append(sample(live, STEPS, noise(seed=seed)))
        kinds.append([r.kind.value for r in live.steps])
    assert {"full", "skip"} == {*kinds[0], *kinds[1]}
    for own in (loaded(model, policy, INPUTS), whole(model, policy, INPUTS)):
        for seed in range(2):
            torch.testing.assert_close(sample(own, STEPS, noise(seed=seed)), wanted[seed])
            assert [r.kind.value for r in own.steps] == kinds[seed]


def test_weights_of_a_ring_are_the_hosts(model: nn.Module, live: Any) -> None:
    """Which steps were computed, a run tells, and by them how much each kept value counts: the file has the rule."""
    policy = Composition(STEPS, Adaptive(0.6, 1, 3), (Rule(SkipBlocks(1, do=Anchors(Hermite(0.5), 3))),))
    live.policy = policy
    wanted = sample(live, STEPS, noise())
    kinds = [r.kind.value for r in live.steps]
    assert {"full", "skip"} == set(kinds)
    own = loaded(model, policy, INPUTS)
    torch.testing.assert_close(sample(own, STEPS, noise()), wanted)
    assert [r.kind.value for r in own.steps] == kinds


def test_a_gate_that_nobody_registered_is_named(model: nn.Module) -> None:
    class Mine(LastBlocks):
        pass

    policy = Composition(4, Adaptive(by=Mine()), (Rule(SkipBlocks(0, 1)),))
    with pytest.raises(toca_compile.PolicyError, match="Mine cannot be saved: it has not registered itself"):
        loaded(model, policy, INPUTS)


@pytest.mark.parametrize("policy", POLICIES[3:6], ids=lambda policy: type(policy).__name__)
def test_with_an_open_batch_it_decides_alike(model: nn.Module, live: Any, policy: Any) -> None:
    batch = {name: {0: torch.export.Dim("batch", min=2, max=5)} for name in "xty"}
    own, live.policy = loaded(model, policy, INPUTS, dynamic=batch), policy
    for count in (2, 5):
        assert torch.equal(sample(own, STEPS, noise(count)), sample(live, STEPS, noise(count)))
        assert [r.kind for r in own.steps] == [r.kind for r in live.steps]
