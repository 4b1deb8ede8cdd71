"""Planned: a plan that was found holds for what it was made for, is laid out over other steps, and is refused else."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.pipelines import build, run
from tests.sampling import noise, sample
from toca_compile import PolicyError, load_policy, save_policy
from toca_compile.ir.signature import Signature, clock_of, fingerprint
from toca_compile.policies import Anchors, Foca, Mixed, Planned, Polynomial, SkipBlocks
from toca_compile.policies.storage import as_data, from_data

SIZE, STEPS = (4, 4), 8
TIMES = tuple(float((STEPS - 1 - i) * 1000 // STEPS) for i in range(STEPS))
RULES = (Polynomial(1), Foca())


def made(**fields: Any) -> Planned:
    shares = tuple((round(i / 7, 3), round(1 - round(i / 7, 3), 3)) for i in range(STEPS))
    return replace(Planned(STEPS, (0, 1, 4, 6), Mixed(RULES, shares)), **fields)


def small() -> Any:
    return randomize(PlainDiT(SIZE, width=8, depth=2))


def full(opt: Any) -> tuple[int, ...]:
    return tuple(step.index for step in opt.steps if step.kind.value == "full")


def test_it_runs_for_what_it_was_made_for_and_is_refused_else() -> None:
    model, x = small(), noise(2, SIZE)
    own = Signature(model=fingerprint(model), size=(2, *SIZE), dtype="float32", sampler="tests.sampling.sample")
    plan = made(made_for=own)
    opt = toca_compile.optimize(model, plan, lowering="eager")
    found = sample(opt, STEPS, x)
    assert full(opt) == plan.full
    for wrong, why in (
        ({"model": "0123"}, r"another weights: '0123', and the call has '\w{16}'.*policy.anyway\('model'\)"),
        ({"size": (2, 8, 8)}, r"another size of a sample: \(2, 8, 8\), and the call has \(2, 4, 4\)"),
        ({"dtype": "bfloat16"}, "another dtype: 'bfloat16', and the call has 'float32'"),
    ):
        other = made(made_for=replace(own, **wrong))
        opt.policy = other
        with pytest.raises(PolicyError, match=why):
            sample(opt, STEPS, x)
        opt.policy = other.anyway(*wrong)
        assert torch.equal(sample(opt, STEPS, x), found)


def test_a_bare_torch_compile_asks_too(caplog: pytest.LogCaptureFixture) -> None:
    """By the weights of the model that it was given, and by the inputs of the graph."""
    model, x = small(), noise(2, SIZE)
    own = Signature(model=fingerprint(model), size=(2, *SIZE), dtype="float32")
    options = {"policy": made(made_for=own), "lowering": "eager"}
    opt = toca_compile.optimize(small(), made(made_for=own), lowering="eager")
    compiled = torch.compile(model, backend="toca", options=options)
    assert torch.equal(sample(compiled, STEPS, x), sample(opt, STEPS, x))
    for wrong, why in (
        ({"model": "0123"}, r"another weights: '0123', and the call has '\w{16}'"),
        ({"size": (2, 8, 8)}, "another size of a sample"),
    ):
        torch._dynamo.reset()
        options = {"policy": made(made_for=replace(own, **wrong)), "lowering": "eager"}
        with pytest.raises(PolicyError, match=why):
            sample(torch.compile(small(), backend="toca", options=options), STEPS, x)
    torch._dynamo.reset()
    loose = torch.compile(small(), backend="toca", options={**options, "strict": False})
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(loose, STEPS, x), sample(small(), STEPS, x))
    assert "another size of a sample" in caplog.text
    assert "runs uncached" in caplog.text


def test_without_strict_what_it_does_not_fit_runs_uncached(caplog: pytest.LogCaptureFixture) -> None:
    model, x = small(), noise(2, SIZE)
    plan = made(made_for=Signature(dtype="float64"))
    opt = toca_compile.optimize(model, plan, lowering="eager", strict=False)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(opt, STEPS, x), sample(model, STEPS, x))
    assert caplog.text.count("The model runs uncached") == 1
    assert "another dtype: 'float64'" in caplog.text


def test_another_number_of_steps_is_adapted_to_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model, x = small(), noise(2, SIZE)
    opt = toca_compile.optimize(model, made(made_for=Signature(times=TIMES)), lowering="eager")
    for steps in (STEPS, 2 * STEPS):
        opt.begin([(steps - 1 - i) * 1000 // steps for i in range(steps)])
        with caplog.at_level(logging.WARNING):
            sample(opt, steps, x)
        assert len(opt.steps) == steps
        assert len(full(opt)) == steps // 2
    assert caplog.text.count("found for 8 steps is laid out over 16, of which 8 are computed") == 1


def test_laid_out_by_the_time() -> None:
    """The same share of steps is full, each where the time is nearest; weights are those of the same time."""
    plan = made(made_for=Signature(times=TIMES))
    assert plan.for_call(Signature(times=TIMES)) == plan
    assert plan.for_call(Signature(times=tuple(t / 1000 for t in TIMES))) == plan  # in other units
    assert plan.for_run(STEPS, True) == plan
    # The same times, of which the second half is passed twice as densely.
    dense = (*TIMES[:4], *(TIMES[4] * (1 - i / 6) for i in range(7)))
    over = plan.for_call(Signature(times=dense))
    assert over.num_steps == 11
    assert over.adapted == STEPS
    assert len(over.full) == 6
    assert over.full[:2] == (0, 1)
    assert over.full[-1] == 8  # TIMES[6]
    assert isinstance(over.by, Mixed)
    assert isinstance(plan.by, Mixed)
    for step, old in ((0, 0), (2, 2), (4, 4), (8, 6)):
        assert over.by.shares[step] == pytest.approx(plan.by.shares[old], abs=1e-6)
    between = [(a + b) / 2 for a, b in zip(plan.by.shares[4], plan.by.shares[5], strict=True)]
    assert over.by.shares[5] == pytest.approx(between, abs=5e-3)
    # Where no time is known, evenly.
    assert plan.for_run(16, True).full == tuple(sorted(set(plan.for_run(16, True).full)))
    assert len(plan.for_run(16, True).full) == 8
    one = plan.for_run(1, True)
    assert (one.full, one.num_steps) == ((0,), 1)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"full": (1, 2)}, "full must rise from 0"),
        ({"full": (0, 9)}, "full must stay below num_steps"),
        ({"by": Mixed(RULES, ((1.0, 0.0),))}, "by.shares must be 8, one a step, not 1"),
        ({"made_for": Signature(times=(1.0,))}, "made_for.times must be 8, one a step, not 1"),
    ],
)
def test_what_contradicts_itself_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        made(**wrong)


def test_a_pipeline_tells_its_scheduler_and_guidance(tmp_path: Any) -> None:
    """A search through a pipeline gives it back as it was; its plan knows the call, and refuses another."""
    pipe, call = build("PixArtAlphaPipeline")

    def sampler(pipe: Any, steps: int, seed: int, count: int) -> torch.Tensor:
        found: torch.Tensor = run(pipe, call, steps)
        return found

    plan = toca_compile.plan(pipe, sampler, budget=3, steps=6, samples=1, trials=6)
    assert not toca_compile.is_optimized(pipe)
    assert plan.made_for.sampler == type(pipe.scheduler).__name__
    assert plan.made_for.guidance is not None
    assert plan.made_for.times is not None
    assert len(plan.made_for.times) == 6
    save_policy(plan, tmp_path / "plan.json")
    toca_compile.optimize(pipe, load_policy(tmp_path / "plan.json"), lowering="eager")
    run(pipe, call, 6)
    assert full(pipe.transformer) == plan.full
    run(pipe, call, 12)
    assert len(full(pipe.transformer)) == 6
    assert len(pipe.transformer.steps) == 12
    with pytest.raises(PolicyError, match="another guidance scale"):
        run(pipe, call | {"guidance_scale": plan.made_for.guidance + 1}, 6)
    with pytest.raises(toca_compile.TocaError, match="restore it first"):
        toca_compile.plan(pipe, sampler, budget=3, steps=6, samples=1)


def test_the_clock_is_found_among_a_call_s_inputs() -> None:
    calls = [{0: torch.randn(2, 3), 1: torch.full((2,), 5 - i), "y": torch.tensor([1, 2])} for i in range(4)]
    assert clock_of(calls) == (5.0, 4.0, 3.0, 2.0)
    assert clock_of([{**c, "other": torch.tensor(float(i))} for i, c in enumerate(calls)]) is None  # two
    assert clock_of([{**c, 1: torch.tensor(5)} for c in calls]) is None  # none


def test_corrects_by_the_moves_that_it_was_found_with(tmp_path: Path) -> None:
    moves = tuple(-(0.5**step) for step in range(STEPS))
    plan = made(correct=0.5, made_for=Signature(times=TIMES, moves=moves))
    blocks, sites = (choice.rules[0].do for choice in plan.choices)
    assert blocks == SkipBlocks(do=Anchors(plan.by, plan.kept, correct=0.5, moves=moves))
    assert sites == Anchors(plan.by, plan.kept)
    assert made(made_for=Signature(times=TIMES, moves=moves)).choices == made().choices
    save_policy(plan, tmp_path / "plan.json")
    assert load_policy(tmp_path / "plan.json") == plan
    # Over other steps by theirs, or all alike.
    other = tuple(t - 1 for t in TIMES[:-1])
    assert plan.for_call(Signature(times=other, moves=moves[1:])).made_for.moves == moves[1:]
    assert plan.for_call(Signature(times=other)).made_for.moves is None
    with pytest.raises(PolicyError, match=f"moves must be {STEPS}, one a step, not 3"):
        replace(plan, made_for=Signature(moves=moves[:3]))


def test_a_plan_of_before_corrects_nothing() -> None:
    told = as_data(made(made_for=Signature(times=TIMES)))
    del told["correct"], told["made_for"]["moves"]
    assert from_data(told) == made(made_for=Signature(times=TIMES))
