"""The second trained model: what it draws, and what caching leaves of it."""

import pytest
import torch
from torch import Tensor

import toca_compile
from toca_compile.demo import emoji_flux
from toca_compile.demo.sampling import load_sampling
from toca_compile.policies import FullCompute, Level
from toca_compile.quality.metrics import psnr

pytest.importorskip("diffusers")
pytestmark = pytest.mark.xdist_group("emoji-flux")

STEPS = 8


@pytest.fixture(scope="module")
def samples() -> dict[str, Tensor]:
    """What the model draws of two hearts and a face, uncached and with two levels."""
    model, scheduler, text = emoji_flux.load(emoji_flux.default_model())
    asked = ["heart, green heart", "heart, blue heart", "face-smiling, grinning face"]
    asked = [f"smileys & emotion, {name}" for name in asked]
    policies = {"uncached": FullCompute(), "balanced": Level("balanced", STEPS), "max": Level("max", STEPS)}
    opt = toca_compile.optimize(model, policies["uncached"], lowering="eager")
    drawn = {}
    for name, policy in policies.items():
        opt.policy = policy
        drawn[name] = emoji_flux.sample(opt, scheduler, text, asked, STEPS)
    drawn["plain"] = emoji_flux.sample(toca_compile.restore(opt), scheduler, text, asked, STEPS)
    return drawn


def test_it_draws_what_it_is_asked_for(samples: dict[str, Tensor]) -> None:
    red, green, blue = samples["uncached"][:, :, 12:20, 12:20].mean((2, 3)).unbind(1)
    assert green[0] > max(red[0], blue[0]) + 0.3
    assert blue[1] > max(red[1], green[1]) + 0.3
    assert min(red[2], green[2]) > blue[2] + 0.3  # a face is yellow
    corners = samples["uncached"][:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 0.8  # on white


def test_what_caching_leaves(samples: dict[str, Tensor]) -> None:
    assert torch.allclose(samples["uncached"], samples["plain"], atol=1e-4)
    balanced, most = (psnr(samples[name], samples["uncached"]) for name in ("balanced", "max"))
    assert balanced > 20
    assert most < balanced


def test_commands_find_it() -> None:
    sampling = load_sampling(str(emoji_flux.default_model()))
    assert sampling.sampler(sampling.model, 1, 0, 2).shape == (2, 3, 32, 32)
    assert not sampling.shipped
