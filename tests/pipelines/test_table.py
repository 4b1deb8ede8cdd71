"""Pipelines of diffusers × what must hold of each.

Checks, in the order in which they are made (one optimised pipeline serves them all, as one trace does):

* ``full``: with a policy that computes everything the result is the plain pipeline's, bit for bit;
* ``steps``: under caching policies each transformer, in each guidance pass, makes as many steps as the pipeline gives
  it, of the kinds that the policy plans for a run of that length;
* ``repeat``: a second call yields the same bits, and no cache outlives a call;
* ``stopped``: after a call that failed, and after one that was interrupted, the next is as on a fresh pipeline;
* ``announced``: where it pays, what follows from the scheduler's timesteps is made for all of them by the first step.
"""

import inspect
from typing import Any
from unittest.mock import patch

import pytest
import torch

import toca_compile
from tests.apart import apart
from tests.pipelines import run
from tests.pipelines.builders import TABLE, follow, kinds, made
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer, ToCa
from toca_compile.diffusers import optimized_components
from toca_compile.ir.plan import Policy
from toca_compile.runtime.conditioning import Conditioning
from toca_compile.session import Session

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CALLS = 6

# Of each caching policy, what a run of as many steps as any transformer makes here is to do.
PLANNED: tuple[tuple[Policy, str], ...] = (
    (Fora(50, 3), "frrfrr"),
    (ToCa(50, interval=3, fresh_ratio=0.4, schedule="constant"), "fppfpp"),
    (TaylorSeer(50, 3, 1), "frrftt"),
    (BlockCache(50, first=0, interval=3, order=1), "fssfss"),
)

# Steps of each transformer where they are not all six; guidance passes where it is not one call a step.
STEPS = {
    "FLUX img2img": (4,),
    "FLUX inpaint": (5,),
    "Wan 2.2": (3, 3),
    "Wan 2.2 I2V": (4, 2),
}
TWO_PASSES = {"Chroma", "QwenImage", "Lumina2", "Wan", "Wan I2V", "Wan 2.2", "Wan 2.2 I2V"}
# Whose blocks take nothing from the time alone.
UNCONDITIONED = {"Lumina2"}


def cache_bytes(pipe: Any) -> int:
    """Bytes that all transformers of a pipeline keep."""
    return sum(model.cache_bytes for model in optimized_components(pipe).values())


def stop_in_a_step(pipe: Any, call: dict[str, Any], step: int) -> None:
    """A call that fails as its scheduler takes a step."""
    before, count = pipe.scheduler.step, iter(range(100))

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(count) == step:
            raise KeyboardInterrupt
        return before(*args, **kwargs)

    pipe.scheduler.step = fail
    with pytest.raises(KeyboardInterrupt):
        run(pipe, call, CALLS)
    del pipe.scheduler.step


def interrupted(pipe: Any, call: dict[str, Any], step: int) -> torch.Tensor:
    """What a call yields that a callback interrupts after a step."""

    def interrupt(pipe: Any, index: int, _: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index >= step
        return kwargs

    return run(pipe, call, CALLS, callback_on_step_end=interrupt)


# Of all, tried once: it is seen in each that has modulations but for three, which write a timestep's number down anew.
ELSEWHERE = ["DiT", "PixArt-α", "FLUX", "Wan 2.2", "CogVideoX", "AuraFlow"]
READ_BY_THE_PIPELINE = {"AuraFlow", "HunyuanDiT", "EasyAnimate"}


@pytest.mark.parametrize("name", TABLE)
def test_a_pipeline(name: str) -> None:
    pipe, call = made(name)
    has_callback = "callback_on_step_end" in inspect.signature(pipe.__call__).parameters and hasattr(pipe, "interrupt")
    plain = run(pipe, call, CALLS)
    stopped = interrupted(pipe, call, 1) if has_callback else None
    steps = STEPS.get(name, (CALLS,))
    passes = 2 if name in TWO_PASSES else 1

    # full
    assert toca_compile.optimize(pipe, FullCompute(), lowering="eager") is pipe
    assert torch.equal(run(pipe, call, CALLS), plain)
    assert kinds(pipe) == [["f" * n] * passes for n in steps]
    if stopped is not None:
        assert torch.equal(interrupted(pipe, call, 1), stopped)
        assert not torch.equal(stopped, plain)

    for policy, planned in PLANNED:
        # steps
        follow(pipe, policy)
        first = run(pipe, call, CALLS)
        assert kinds(pipe) == [[planned[:n]] * passes for n in steps], policy
        assert not torch.equal(first, plain), policy
        assert first.isfinite().all()
        assert cache_bytes(pipe) == 0
        # repeat
        assert torch.equal(run(pipe, call, CALLS), first), policy

    # stopped
    stop_in_a_step(pipe, call, 1)
    assert cache_bytes(pipe) == 0
    assert torch.equal(run(pipe, call, CALLS), first)
    if stopped is not None:
        interrupted(pipe, call, 1)
        assert cache_bytes(pipe) == 0
        assert torch.equal(run(pipe, call, CALLS), first)
    assert kinds(pipe) == [[PLANNED[-1][1][:n]] * passes for n in steps]

    # announced
    announced(pipe, call, plain)
    tables = [
        t for m in optimized_components(pipe).values() for ts in m._toca.session.control.tables.values() for t in ts
    ]
    assert bool(tables) == (name not in UNCONDITIONED)


def announced(pipe: Any, call: dict[str, Any], plain: torch.Tensor) -> None:
    """Nothing that follows from the time is made in a step."""
    follow(pipe, FullCompute())  # no forecast grows what the rounding of rows made at once differs by
    for model in optimized_components(pipe).values():
        model.reset()
    with patch.object(Session, "compiles", True), patch.object(Conditioning, "_make", side_effect=AssertionError):
        out = run(pipe, call, CALLS)
    # A random network and its sampler make more of a row's rounding, 1e-6, than of its own numbers.
    assert (out - plain).abs().max() <= 1e-4 * plain.abs().max()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_pipeline_on_an_accelerator(name: str) -> None:
    """The host knows the timesteps there, though it reads nothing that the model is told, and lets go of them."""
    pipe, call = made(name)
    plain = run(pipe, call, CALLS)
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    with apart():
        announced(pipe, call, plain)
        assert type(pipe.scheduler.timesteps) is torch.Tensor
        kept = [model._toca.session.control.conditioning_bytes for model in optimized_components(pipe).values()]
    assert any(kept) == (name not in READ_BY_THE_PIPELINE)
