"""Levels: a policy by name that fits the run."""

import itertools
import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import toca_compile
from tests.models import PlainDiT, randomize
from tests.pair import Pair
from tests.sampling import noise, sample
from toca_compile.diffusers import optimized_components
from toca_compile.ir.anchors import Weights
from toca_compile.ir.signature import FLOW, Signature
from toca_compile.policies import LEVELS, Composition, EndAligned, Level, Rule, SkipBlocks, load_policy, save_policy
from toca_compile.policies.anchors import Anchors, Foca, Hermite, Polynomial

STEPS = (1, 2, 3, 4, 8, 20, 28, 50)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("steps", STEPS)
def test_full_steps(name: str, steps: int) -> None:
    """The first steps are computed, no gap is longer than the interval, and the last gap is one step or none."""
    level = Level(name, steps)
    full = level.full_steps()
    assert full == tuple(sorted(set(full)))
    assert full[: level.when.warmup] == tuple(range(min(steps, level.when.warmup)))
    assert all(b - a <= level.when.interval for a, b in itertools.pairwise(full))
    assert full[-1] == (steps - 1 if level.when.last else max(steps - 2, 0)) or len(full) == steps
    assert level.when.last == (name == "quality" and steps >= 16)


@pytest.mark.parametrize("steps", STEPS)
def test_a_level_further_computes_no_more(steps: int) -> None:
    counts = [len(Level(name, steps).full_steps()) for name in LEVELS]
    assert counts == sorted(counts, reverse=True)
    assert steps < 8 or counts[-1] < counts[0] < steps


def test_end_aligned() -> None:
    assert EndAligned(3, 2).phases(9, "") == (0, 0, 1, 2, 0, 1, 2, 0, 1)
    assert EndAligned(3, 2, last=True).phases(9, "") == (0, 0, 1, 2, 0, 1, 2, 0, 0)
    assert EndAligned(3, 1).phases(1, "") == (0,)
    assert EndAligned(5, 3).phases(2, "") == (0, 0)
    assert EndAligned(1, 1).phases(3, "") == (0, 0, 0)


def test_no_policy_is_balanced_and_says_once_what_it_means(caplog: pytest.LogCaptureFixture) -> None:
    opt = toca_compile.optimize(randomize(PlainDiT(depth=2)), lowering="eager")
    assert opt.policy == Level("balanced")
    opt.policy = Level("balanced", 8)
    with caplog.at_level(logging.WARNING, logger="toca_compile"):
        sample(opt, 8, noise())
        sample(opt, 8, noise())
    assert [s.kind.value for s in opt.steps] == ["full", "full", "full", "skip", "full", "skip", "full", "skip"]
    (said,) = [r.message for r in caplog.records if "level" in r.message]
    assert "'balanced'" in said
    assert "5 are computed" in said


@pytest.mark.parametrize(
    ("name", "steps", "rule"),
    [("quality", 28, Foca()), ("fast", 28, Foca()), ("balanced", 20, Hermite()), ("max", 28, Hermite()),
     ("max", 50, Foca()), ("quality", 8, Hermite())],
)  # fmt: skip
def test_a_rule_for_flow_matching(name: str, steps: int, rule: Weights) -> None:
    level = Level(name, steps)
    for prediction, sampler in ((None, None), ("v_prediction", "DDIMScheduler"), ("epsilon", None),
                                ("epsilon", "EulerAncestralDiscreteScheduler"), ("epsilon", "DDIMScheduler eta=1")):  # fmt: skip
        assert level.for_call(Signature(prediction=prediction, sampler=sampler)) == level
    flow = level.for_call(Signature(prediction=FLOW))
    assert flow.for_run(steps, True) == flow == Level(name, steps, flow=True)
    assert flow.full_steps() == level.full_steps()
    assert [choice.rules[0].do for choice in flow.choices] == [SkipBlocks(do=Anchors(rule, 3)), Anchors(rule, 3)]


@pytest.mark.parametrize(
    ("name", "steps", "rule", "share"),
    [("quality", 50, Foca(), 0.25), ("balanced", 50, Foca(), 0.25), ("fast", 50, Polynomial(), 0.25),
     ("quality", 28, Polynomial(), 0.5), ("balanced", 28, Polynomial(), 0.25), ("quality", 20, Polynomial(), 0.5),
     ("max", 28, Polynomial(), 0.25), ("quality", 8, Polynomial(), 0.25)],
)  # fmt: skip
def test_a_rule_where_noise_is_predicted(name: str, steps: int, rule: Weights, share: float) -> None:
    level, moves = Level(name, steps), tuple(-1.0 - i for i in range(steps))
    for told in (moves, None):
        noise = level.for_call(Signature(prediction="epsilon", sampler="DDIMScheduler", moves=told))
        assert noise.for_run(steps, True) == noise == Level(name, steps, noise=True, moves=told or ())
        assert noise.full_steps() == level.full_steps()
        kept = moves if told and steps >= 16 else ()
        blocks = SkipBlocks(do=Anchors(rule, 3, correct=share, moves=kept))
        assert [choice.rules[0].do for choice in noise.choices] == [blocks, Anchors(rule, 3)]
    assert replace(noise, moves=moves).for_run(steps + 1, True).moves == ()


def test_where_noise_is_predicted_sites_are_forecast_if_blocks_cannot_be_skipped() -> None:
    opt = toca_compile.optimize(randomize(Pooled(depth=2)), Level("fast", 8, noise=True), lowering="eager")
    sample(opt, 8, noise())
    own = Composition(8, EndAligned(3, 2), (Rule(Anchors(Polynomial(), 3)),))
    again = toca_compile.optimize(opt._orig_mod, own, lowering="eager")
    torch.testing.assert_close(sample(opt, 8, noise()), sample(again, 8, noise()), rtol=0, atol=0)


class FlowMatchEuler:
    """A scheduler whose name says what it knows, as diffusers have it."""

    def __init__(self, own: Any) -> None:
        self.own, self.set_timesteps = own, own.set_timesteps

    @property
    def timesteps(self) -> Tensor:
        """Of the run."""
        found: Tensor = self.own.timesteps
        return found

    def step(self, noise: Tensor, x: Tensor) -> Tensor:
        """One Euler step."""
        moved: Tensor = self.own.step(noise, x)
        return moved


def test_a_pipeline_says_whether_it_is_flow_matching() -> None:
    pipe: Any = toca_compile.optimize(Pair(), Level("fast"), lowering="eager")

    def sampled(policy: Level) -> Tensor:
        for part in optimized_components(pipe).values():
            part.policy = policy
        made: Tensor = pipe(16, generator=torch.Generator().manual_seed(0))[0]
        return made

    noise, flow = sampled(Level("fast")), sampled(Level("fast", flow=True))
    assert not torch.equal(noise, flow)
    pipe.scheduler = FlowMatchEuler(pipe.scheduler)
    torch.testing.assert_close(sampled(Level("fast")), flow, rtol=0, atol=0)


def test_a_name_stands_for_its_policy() -> None:
    model = PlainDiT(depth=1)
    opt = toca_compile.optimize(model, "fast")
    assert opt.policy == Level("fast")
    opt.policy = "flux-dev/50-n4"
    assert opt.policy == toca_compile.preset("flux-dev/50-n4")


def test_a_short_run_says_that_nothing_is_cached(caplog: pytest.LogCaptureFixture) -> None:
    model = randomize(PlainDiT(depth=1))
    opt = toca_compile.optimize(model, Level("quality", 4), lowering="eager")
    with caplog.at_level(logging.WARNING, logger="toca_compile"):
        out = sample(opt, 4, noise())
    assert [s.kind.value for s in opt.steps] == ["full"] * 4
    (said,) = (r.getMessage() for r in caplog.records if "nothing is cached" in r.getMessage())
    assert said.startswith("level 'quality' computes all 4 steps of a run this short")
    torch.testing.assert_close(out, sample(model, 4, noise()))


def test_a_level_survives_a_file(tmp_path: pytest.TempPathFactory) -> None:
    path = f"{tmp_path}/policy.json"
    save_policy(Level("max", 28), path)
    assert load_policy(path) == Level("max", 28)


class Pooled(PlainDiT):
    """A mean over the first block's tokens is read by the second and behind it: the blocks cannot be skipped as one."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.prepare(x, t, y)
        first, second = self.blocks
        x = first(x, c)
        c = c + x.mean(1)
        return self.finish(second(x, c), c)


def test_where_blocks_cannot_be_skipped_each_site_is_forecast() -> None:
    opt = toca_compile.optimize(randomize(Pooled(depth=2)), Level("balanced", 8), lowering="eager")
    sample(opt, 8, noise())
    assert [s.kind.value for s in opt.steps] == [
        "full", "full", "full", "forecast", "full", "forecast", "full", "forecast"
    ]  # fmt: skip
    own = Composition(8, EndAligned(2, 2), (Rule(Anchors(Foca(), 3)),))
    again = toca_compile.optimize(opt._orig_mod, own, lowering="eager")
    torch.testing.assert_close(sample(opt, 8, noise()), sample(again, 8, noise()), rtol=0, atol=0)


def test_backend_by_name_in_a_process_that_never_imports_the_package() -> None:
    code = """
import sys, torch
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm1, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
    def forward(self, x):
        q, k, v = (y.unsqueeze(1) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))
model = nn.Sequential(Block(), Block()).eval()
fast = torch.compile(model, backend="toca", options={"policy": "fast", "lowering": "eager"})
plain = torch.compile(model, backend="toca", options={"lowering": "eager"})
with torch.no_grad():
    x = torch.randn(1, 16, 8)
    for f in (fast, plain):
        torch.testing.assert_close(f(x), model(x))
print("toca_compile" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True", done.stderr
