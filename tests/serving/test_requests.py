"""Requests: what samplers ask the model, and what they make of its answers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sampling import gaussian
from toca_compile import Request, TocaError
from toca_compile.policies import Anchors, Composition, EndAligned, Foca, Rule, SkipBlocks
from toca_compile.policies.levels import Level
from toca_compile.serving.requests import Call, Euler, Scheduled, call, meant


def run(request: Request, model: Any) -> tuple[Tensor, list[Call]]:
    """What a request comes to, and the calls that it made."""
    sampling, calls, answer = request.sampler(request), [], None
    try:
        while True:
            calls.append(sampling.send(answer))
            answer = model(**calls[-1].kwargs)
    except StopIteration as done:
        return done.value, calls


def test_euler_follows_a_straight_flow_to_its_end() -> None:
    noise, data = gaussian(1, 3), gaussian(1, 3, seed=1)

    def model(hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return noise - data

    result, calls = run(Request(noise, num_steps=4, sampler=Euler(scale=1000)), model)
    torch.testing.assert_close(result, data)
    assert [c.kwargs["timestep"].tolist() for c in calls] == [[1000], [750], [500], [250]]


def test_with_guidance_a_call_is_of_a_pair_unconditional_first() -> None:
    shared = torch.zeros(7, 3)

    def model(hidden_states: Tensor, timestep: Tensor, text: Tensor, ids: Tensor, flag: bool) -> tuple[Tensor]:
        assert hidden_states.shape == (2, 3)
        assert timestep.shape == (2,)
        assert text.tolist() == [[0], [1]]
        assert ids is shared
        return (text * torch.ones(3),)

    given = {"text": torch.ones(1, 1), "ids": shared, "flag": True}
    request = Request(torch.zeros(1, 3), given, 2, guidance=4.0, negative={"text": torch.zeros(1, 1)})
    result, _ = run(request, model)
    torch.testing.assert_close(result, torch.full((1, 3), -4.0))


def test_negative_conditioning_of_what_no_sample_has_is_refused() -> None:
    request = Request(torch.zeros(1, 3), {"ids": torch.zeros(7, 3)}, 2, 4.0, {"ids": torch.ones(7, 3)})
    with pytest.raises(TocaError, match="must be a tensor of 1 samples"):
        run(request, lambda **_: torch.zeros(2, 3))
    with pytest.raises(TocaError, match="no latents"):
        run(Request(None), lambda **_: None)


def test_a_scheduler_of_diffusers_is_copied_for_each_request_and_draws_from_its_seed() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler()
    noise = gaussian(1, 2, 4, 4)

    def model(hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return torch.cat([hidden_states * 0.1, hidden_states], 1)  # and a variance, which is left aside

    def sampled(seed: int, eta: float) -> Tensor:
        sampler = Scheduled(scheduler, step={"eta": eta})
        return run(Request(noise, num_steps=5, seed=seed, sampler=sampler), model)[0]

    own = diffusers.DDIMScheduler()
    own.set_timesteps(5)
    x = noise
    for t in own.timesteps:
        x = own.step(x * 0.1, t, x, eta=0.0).prev_sample
    assert torch.equal(sampled(0, 0.0), x)
    assert torch.equal(sampled(0, 1.0), sampled(0, 1.0))
    assert not torch.equal(sampled(0, 1.0), sampled(1, 1.0))
    assert scheduler.num_inference_steps is None  # it was not touched


def test_a_scheduler_that_makes_other_calls_than_steps_is_refused() -> None:
    diffusers = pytest.importorskip("diffusers")
    sampler = Scheduled(diffusers.HeunDiscreteScheduler())
    with pytest.raises(TocaError, match="makes 9 calls of 5 steps"):
        run(Request(torch.zeros(1, 2, 4, 4), num_steps=5, sampler=sampler), lambda **_: None)


def test_a_policy_is_told_what_the_sampler_takes_the_model_to_predict() -> None:
    diffusers = pytest.importorskip("diffusers")
    level, first = Level("max", 50), call(torch.zeros(1, 4, 8, 8))

    def flow(sampler: Any) -> bool:
        fitted = meant(level, Request(None, num_steps=8, sampler=sampler), first)
        assert isinstance(fitted, Level)
        assert fitted.num_steps == 8
        return fitted.flow

    assert flow(Euler())
    assert flow(Scheduled(diffusers.FlowMatchEulerDiscreteScheduler()))
    assert not flow(Scheduled(diffusers.DDIMScheduler()))
    assert not flow(lambda request: iter(()))


def test_a_policy_is_told_what_a_scheduler_knows() -> None:
    diffusers = pytest.importorskip("diffusers")
    told = Scheduled(diffusers.DDIMScheduler()).facts(5)
    assert told.sampler == "DDIMScheduler"
    assert told.moves is not None
    assert [len(told.moves), len(told.times or ())] == [5, 5]
    first = call(hidden_states=torch.zeros(1, 4, 8), timestep=torch.ones(1))
    request = Request(None, num_steps=5, sampler=Scheduled(diffusers.DDIMScheduler()))
    wanted = Composition(50, EndAligned(3, 2), (Rule(SkipBlocks(do=Anchors(Foca(), 3, correct=0.5))),))
    meant_so: Any = meant(wanted, request, first)
    assert meant_so.num_steps == 5
    assert meant_so.rules[0].do.do.moves == told.moves
