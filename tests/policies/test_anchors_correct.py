"""Anchors that correct: a computed step makes up for the forecasts before it, against a literal loop."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.in_memory import loaded
from tests.models import PlainDiT, randomize
from tests.runs import TIMES, kinds, steps
from tests.sampling import noise
from tests.shared import Traced
from toca_compile import Composition, PolicyError, load_policy, save_policy
from toca_compile.lowerings import LOWERINGS
from toca_compile.policies import Adaptive, Anchors, Bands, Every, Foca, Hermite, Listed, Polynomial, Rule, SkipBlocks

STEPS = len(TIMES)
MOVES = tuple(-(0.7**step) for step in range(STEPS))
EAGER = LOWERINGS["eager"]


def policy(do: Anchors, full: Sequence[int] = (0, 1, 4, 7)) -> Composition:
    """Blocks forecast between these steps."""
    return Composition(STEPS, Listed(tuple(full)), (Rule(SkipBlocks(do=do)),))


@torch.no_grad()
def literal(model: Any, do: Anchors, full: Sequence[int]) -> Tensor:
    """The same sampling, written out: an Euler step of an eighth of the model's output at each time."""
    x, known, told = noise(), dict[int, Tensor](), dict[int, Tensor]()

    def summed(by: Any, kept: int, step: int) -> Tensor:
        anchors = sorted(known)[-kept:]
        return torch.stack([w * known[s] for w, s in zip(by.weights(anchors, step), anchors, strict=True)]).sum(0)

    for step, time in enumerate(TIMES):
        h, c = model.prepare(x, torch.full((2,), time), torch.arange(2))
        if step in full:
            out = h
            for block in model.blocks:
                out = block(out, c)
            known[step] = added = out - h
            for between, wrong in told.items():
                share = do.moves[between] / do.moves[step] if do.moves else 1.0
                added = added + do.correct * share * (summed(Polynomial(), 3, between) - wrong)
            told.clear()
        else:
            added = told[step] = summed(do.by, do.kept, step)
        x = x - model.finish(h + added, c)[:, : x.shape[1]] / STEPS
    return x


@pytest.mark.parametrize("do", [Anchors(Polynomial(), 3, correct=0.5), Anchors(Foca(), 3, correct=0.25), Anchors(Hermite(), 2, correct=1.0),
                                Anchors(Polynomial(), 5, correct=0.7), Anchors(Foca(), 3, correct=0.5, moves=MOVES)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("full", [(0, 1, 4, 7), (0, 3, 5, 6), (0, 2)])
def test_is_the_literal_loop(traced: Traced, do: Anchors, full: tuple[int, ...]) -> None:
    model, opt = traced(PlainDiT, policy(do, full))
    out = steps(opt, noise(), TIMES)
    expected = literal(model, do, full)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    plain = literal(model, Anchors(do.by, do.kept), full)
    assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-3)
    opt.policy = policy(Anchors(do.by, do.kept), full)
    torch.testing.assert_close(steps(opt, noise(), TIMES), plain, rtol=1e-4, atol=1e-4)


def test_a_step_behind_a_computed_one_is_the_model_to_the_bit(traced: Traced) -> None:
    model, opt = traced(PlainDiT, policy(Anchors(Polynomial(), 3, correct=0.5), range(STEPS)))
    assert torch.equal(steps(opt, noise(), TIMES), steps(model, noise(), TIMES))


def test_inputs_that_stay_give_the_models_output(traced: Traced) -> None:
    model, opt = traced(PlainDiT, policy(Anchors(Polynomial(), 3, correct=0.5)))
    given = noise(), torch.full((2,), 500), torch.arange(2)
    with torch.no_grad():
        plain = model(*given)
        for _ in TIMES:
            torch.testing.assert_close(opt(*given), plain, rtol=1e-5, atol=1e-5)
    assert kinds(opt) == "ffssfssf"


def test_other_shares_and_steps_compile_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[Any] = []

    def counted(variant: Any, examples: Any) -> Any:
        lowered.append(variant)
        return EAGER(variant, examples)

    monkeypatch.setitem(LOWERINGS, "counted", counted)
    do = Anchors(Polynomial(), 3, correct=0.5)
    opt: Any = toca_compile.optimize(randomize(PlainDiT()), policy(do), lowering="counted")
    steps(opt, noise(), TIMES)
    before = len(lowered)
    opt.policy = policy(Anchors(Foca(), 3, correct=0.25, moves=MOVES), (0, 2, 3, 6))
    steps(opt, noise(), TIMES)
    assert len(lowered) == before > 0


class Scheduler:
    """What one of diffusers tells."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.timesteps, self.sigmas = torch.tensor(TIMES), torch.tensor(sigmas, dtype=torch.float64)
        self.config = SimpleNamespace(prediction_type="epsilon")


def test_a_scheduler_tells_by_how_much_it_moves(traced: Traced) -> None:
    do = Anchors(Foca(), 3, correct=0.5)
    model, opt = traced(PlainDiT, policy(do))
    sigmas = [0.7**step for step in range(STEPS)]
    opt.begin(Scheduler([*sigmas, 0.0]))
    uneven = replace(do, moves=tuple(b - a for a, b in pairwise([*sigmas, 0.0])))
    expected = literal(model, uneven, (0, 1, 4, 7))
    torch.testing.assert_close(steps(opt, noise(), TIMES), expected, rtol=1e-4, atol=1e-4)
    even = literal(model, do, (0, 1, 4, 7))
    assert not torch.allclose(expected, even, rtol=1e-3, atol=1e-3)
    opt.begin(TIMES)  # which says nothing of it
    torch.testing.assert_close(steps(opt, noise(), TIMES), even, rtol=1e-4, atol=1e-4)
    opt.begin(Scheduler([*sigmas, 0.0]))
    opt.policy = policy(replace(do, moves=(1.0,) * STEPS))  # what is given counts
    torch.testing.assert_close(steps(opt, noise(), TIMES), even, rtol=1e-4, atol=1e-4)


def test_a_step_at_which_the_picture_stands_still_corrects_nothing(traced: Traced) -> None:
    model, opt = traced(PlainDiT, policy(Anchors(Foca(), 3, correct=0.5, moves=(*MOVES[:-1], 0.0))))
    short = Anchors(Foca(), 3, correct=0.5, moves=MOVES), (0, 1, 4)
    out = steps(opt, noise(), TIMES)
    opt.policy = policy(*short)
    # The last step alone differs, which the shorter plan forecasts and this one computes.
    before = steps(opt, noise(), TIMES[:-1])
    with torch.no_grad():
        given = model(before, torch.full((2,), TIMES[-1]), torch.arange(2))
    torch.testing.assert_close(out, before - given[:, : before.shape[1]] / STEPS, rtol=1e-4, atol=1e-4)


def test_the_whole_step_as_a_graph_and_a_file_do_the_same(traced: Traced) -> None:
    model, opt = traced(PlainDiT, policy(Anchors(Polynomial(), 3, correct=0.5)))
    given = {"x": noise(), "t": torch.full((2,), TIMES[0]), "y": torch.arange(2)}
    expected = steps(opt, noise(), TIMES)
    opt.lowering = "program"
    torch.testing.assert_close(steps(opt, noise(), TIMES), expected, rtol=1e-5, atol=1e-5)
    opt.lowering = "eager"
    file = loaded(model, policy(Anchors(Polynomial(), 3, correct=0.5)), tuple(given.values()))
    torch.testing.assert_close(steps(file, noise(), TIMES), expected, rtol=1e-5, atol=1e-5)


def test_kept_in_bfloat16(traced: Traced) -> None:
    do = Anchors(Polynomial(), 3, correct=0.5)
    model, opt = traced(PlainDiT, policy(do))
    opt.policy = Composition(STEPS, Listed((0, 1, 4, 7)), (Rule(SkipBlocks(do=do)),), cache_dtype="bfloat16")
    torch.testing.assert_close(steps(opt, noise(), TIMES), literal(model, do, (0, 1, 4, 7)), rtol=5e-2, atol=5e-2)


def test_moves_stand_in_a_file_of_the_policy(tmp_path: Path) -> None:
    told = policy(Anchors(Foca(), 3, correct=0.5, moves=MOVES))
    save_policy(told, tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json") == told


def test_moves_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(PolicyError, match="they need correct"):
        Anchors(Foca(), 3, moves=MOVES)
    with pytest.raises(PolicyError, match="must not turn back"):
        Anchors(Foca(), 3, correct=0.5, moves=(1.0, -1.0))
    with pytest.raises(PolicyError, match=f"moves must be {STEPS}, one a step, not 2"):
        policy(Anchors(Foca(), 3, correct=0.5, moves=(1.0, 0.5)))
    with pytest.raises(PolicyError, match=f"moves must be 20, one a step, not {STEPS}"):
        policy(Anchors(Foca(), 3, correct=0.5, moves=MOVES)).for_run(20, guided=False)


def test_what_cannot_be_corrected_is_refused() -> None:
    with pytest.raises(PolicyError, match="correct needs two values or more"):
        Anchors(Polynomial(), 1, correct=0.5)
    with pytest.raises(PolicyError, match="correct"):
        Anchors(Polynomial(), 3, correct=1.5)
    with pytest.raises(PolicyError, match="in bands"):
        Bands(Hermite(), 3, correct=0.5)
    with pytest.raises(PolicyError, match="residual=False"):
        Composition(STEPS, Every(3), (Rule(SkipBlocks(residual=False, do=Anchors(Polynomial(), 3, correct=0.5))),))
    rules = (Rule(SkipBlocks(do=Anchors(Polynomial(), 3, correct=0.5))),)
    with pytest.raises(PolicyError, match="a threshold decides"):
        Composition(STEPS, Adaptive(0.1), rules)


def test_single_sites_are_not_corrected() -> None:
    model: nn.Module = randomize(PlainDiT())
    wanted = Composition(STEPS, Every(3), (Rule(Anchors(Polynomial(), 3, correct=0.5)),))
    with pytest.raises(PolicyError, match="SkipBlocks"):
        steps(toca_compile.optimize(model, wanted, lowering="eager"), noise(), TIMES)
