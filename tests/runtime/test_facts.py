"""What schedulers of diffusers tell of a sampling, held against what they do."""

import copy
from typing import Any

import pytest
import torch

from toca_compile.ir.signature import Signature
from toca_compile.runtime.facts import facts_of

diffusers = pytest.importorskip("diffusers")
STEPS = 6


def told(name: str, **settings: Any) -> Signature:
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(STEPS)
    return facts_of(scheduler, STEPS)


@pytest.mark.parametrize(
    ("name", "settings", "scaled"),
    [("DDIMScheduler", {"clip_sample": False}, True), ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, True),
     ("EulerDiscreteScheduler", {}, False), ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, False),
     ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, False)],
)  # fmt: skip
def test_a_step_moves_the_picture_by_that_much_of_what_is_predicted(
    name: str, settings: dict[str, Any], scaled: bool
) -> None:
    scheduler = getattr(diffusers, name)(**settings)
    scheduler.set_timesteps(STEPS)
    moves = facts_of(scheduler, STEPS).moves
    assert moves is not None
    alphas = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps] if scaled else [1.0] * STEPS
    after = [*alphas[1:], float(scheduler.final_alpha_cumprod) if scaled else 1.0]
    for i, t in enumerate(scheduler.timesteps):
        ends = []
        for at, predicted in ((copy.deepcopy(scheduler), 0.0), (scheduler, 1.0)):
            x, out = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), predicted)
            ends.append(float(at.step(out, t, x).prev_sample) / after[i] ** 0.5)
        assert ends[1] - ends[0] == pytest.approx(moves[i], rel=1e-3)


def test_what_is_known_of_its_last_steps_alone() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    all_of_them, last = facts_of(scheduler, STEPS), facts_of(scheduler, 2)
    assert all_of_them.times is not None
    assert all_of_them.moves is not None
    assert (last.times, last.moves) == (all_of_them.times[-2:], all_of_them.moves[-2:])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("DDIMScheduler", {"prediction_type": "v_prediction"}), ("EDMEulerScheduler", {}), ("PNDMScheduler", {}),
     ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})],
)  # fmt: skip
def test_where_it_moves_by_other_amounts_nothing_is_told(name: str, settings: dict[str, Any]) -> None:
    assert told(name, **settings).moves is None


def test_a_scheduler_of_two_calls_a_step_tells_nothing_of_its_moves() -> None:
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    assert facts_of(scheduler, len(scheduler.timesteps)).moves is None
