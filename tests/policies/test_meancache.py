"""MeanCache: mean velocities by the published formula, with the latents that it asks for."""

from typing import Any

import pytest
import torch
from torch import Tensor

import toca_compile
from tests.oracles import anchors as literal
from tests.pipelines import build, run
from tests.sampling import noise, sample
from toca_compile import PolicyError
from toca_compile.ir.signature import Signature
from toca_compile.policies import MeanCache, MeanVelocity

STEPS = 14
FULL = (0, 1, 4, 6, 7, 11)
BENT = tuple((1 - i / STEPS) ** 2 for i in range(STEPS))


def mean_velocity(anchors: list[literal.Anchor], step: int, span: int, sigmas: tuple[float, ...]) -> Tensor:
    """The published function on logs of velocities and latents, which begin at the oldest full step."""
    known, first = {at: v.double() for at, v in anchors}, anchors[0][0]
    sigmas = (*sigmas, 0.0)
    velocities: list[Tensor] = []
    latents = [torch.zeros_like(known[first])]
    for at in range(first, step + 1):
        if at in known:
            v = known[at]
        else:
            i0 = len(velocities) - min(span, len(velocities))
            denom = sigmas[at] - sigmas[first + i0]
            average = (latents[-1] - latents[i0]) / denom
            jvp = (velocities[i0] - average) / denom
            v = velocities[-1] - jvp * (sigmas[at + 1] - sigmas[at])
        velocities.append(v)
        latents.append(latents[-1] + v * (sigmas[at + 1] - sigmas[at]))
    return velocities[-1]


def test_equal_to_its_literal_form(dit: tuple[Any, Any]) -> None:
    model, opt = dit
    x = noise(2, (6, 10), seed=3)
    seen = []
    even = tuple(1 - i / STEPS for i in range(STEPS))
    for span, sigmas, kept in ((1, (), 2), (2, (), 4), (3, BENT, 4), (5, BENT, 3)):
        opt.policy = MeanCache(STEPS, full=FULL, span=span, sigmas=sigmas, kept=kept)

        def predict(anchors: list[literal.Anchor], step: int, k: int = span, s: Any = sigmas or even) -> Tensor:
            return mean_velocity(anchors, step, k, s)

        oracle = literal.AnchorOracle(model, FULL, kept, predict, blocks=True)
        seen.append(sample(oracle, STEPS, x))
        torch.testing.assert_close(sample(opt, STEPS, x), seen[-1], rtol=1e-4, atol=1e-4 * float(seen[-1].abs().max()))
        assert [r.index for r in opt.steps if r.kind.value == "full"] == list(FULL)
    assert not torch.allclose(seen[1], seen[2], rtol=1e-2, atol=1e-2)


def test_by_hand() -> None:
    """v = 0.9, 0.8 over σ = 0.9, 0.8: the latents moved by 0.85 for each σ, so that J = (0.9 − 0.85) / −0.2."""
    weights = MeanVelocity(2, 10).weights((0, 1, 2), 3)
    assert sum(w * v for w, v in zip(weights, (1.0, 0.9, 0.8), strict=True)) == pytest.approx(0.8 - 0.25 * 0.1)
    assert sum(weights) == pytest.approx(1)
    assert MeanVelocity(1, 10).weights((0, 2), 4) == pytest.approx([0.0, 1.0])


def test_the_scheduler_says_the_noise() -> None:
    pipe, call = build("StableDiffusion3Pipeline")
    toca_compile.optimize(pipe, MeanCache(interval=2, warmup=1), lowering="eager")
    run(pipe, call, 4)
    policy = toca_compile.controls(pipe)
    assert "".join(step.kind.value[0] for step in policy.steps) == "fsfs"
    times = tuple(float(t) for t in pipe.scheduler.timesteps)
    told = MeanCache().for_call(Signature(times=times))
    assert told.sigmas == pytest.approx([t / 1000 for t in times])
    assert told.num_steps == 4
    assert told.for_call(Signature(times=(1.0, 0.5))) is told


def test_noise_that_does_not_fall_is_refused() -> None:
    with pytest.raises(PolicyError, match="sigmas must be 4, one a step, not 2"):
        MeanCache(4, sigmas=(1.0, 0.5))
    with pytest.raises(PolicyError, match="sigmas must fall from step to step"):
        MeanCache(3, sigmas=(1.0, 0.5, 0.5))
