"""Tokens computed between full steps, simulated: all of them are the model, none the forecast."""

from dataclasses import replace

import pytest
import torch
from corrected import Corrected
from token_run import NOWHERE, Base, Model, Place, Sampling, token_map
from tokens import ORACLES, REAL, Row, gain, laid
from torch import Tensor
from trained import TRAINED

import toca_compile
from toca_compile.demo import fashion_dit
from toca_compile.policies import Composition, Listed, Rule, SkipBlocks
from toca_compile.policies.anchors import Anchors, Polynomial

STEPS = 8
BASE = Base((0, 1, 4), "Newton o2", 0.25)


def dit(steps: int) -> Model:
    """The DiT in so few steps that it takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRAINED, "fashion_dit", replace(TRAINED["fashion_dit"], steps=steps))
        return Model("fashion_dit", (0,), 1)


@pytest.fixture(scope="module")
def model() -> Model:
    return dit(STEPS)


def sampled(model: Model, place: Place = NOWHERE, share: float = 0.0, base: Base = BASE) -> tuple[Tensor, float]:
    """The picture, and what it was charged."""
    sampling = model.sampling(0, base, place, share)
    return model.sampled(0), sampling.charged


def test_all_tokens_are_the_model_and_none_the_forecast(model: Model) -> None:
    base = Base(BASE.full, "Newton o2", 0.0)  # a correction would mend what was not wrong
    whole, charged = sampled(model, Place(), 1.0, base)
    torch.testing.assert_close(whole, model.reference[0], rtol=1e-5, atol=1e-5)
    assert charged == STEPS
    forecast, charged = sampled(model, base=base)
    assert charged == len(BASE.full)
    assert not torch.allclose(forecast, whole, atol=1e-2)
    torch.testing.assert_close(sampled(model, Place(), 0.0, base)[0], forecast)


def test_the_forecast_is_that_of_the_product_and_of_the_study_of_correctors(model: Model) -> None:
    ours, _ = sampled(model)
    model.stack.halves = Corrected(BASE.full, BASE.rule, model.moves, BASE.kappa)
    torch.testing.assert_close(model.sampled(0), ours, rtol=1e-4, atol=1e-4)
    rule = Rule(SkipBlocks(do=Anchors(Polynomial(), 3, correct=BASE.kappa)))
    net, sampler = fashion_dit.model_and_sampler()
    opt = toca_compile.optimize(net, Composition(STEPS, Listed(BASE.full), (rule,)), lowering="eager")
    torch.testing.assert_close(sampler(opt, STEPS, 0, 1), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "place",
    [
        Place(keep=True), Place(sees="forecast"), Place(by="random", sees="forecast"), Place(by="missed"),
        *(Place(spread=way) for way in ("mean", "direction", "nearest")), Place(spread="nearest", sees="cached"),
    ],
    ids=str,
)  # fmt: skip
def test_all_tokens_are_the_model_wherever_they_come_from(model: Model, place: Place) -> None:
    whole, charged = sampled(model, place, 1.0, Base(BASE.full, "Newton o2", 0.0))
    torch.testing.assert_close(whole, model.reference[0], rtol=1e-4, atol=1e-4)
    assert charged == STEPS


def test_kept_tokens_that_were_right_are_not_corrected(model: Model) -> None:
    whole, _ = sampled(model, Place(keep=True), 1.0)
    torch.testing.assert_close(whole, model.reference[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("place", "steps"),
    [
        (Place("before"), 1), (Place("first"), 0), (Place("last"), 1), (Place(blocks="first"), 5 / 4),
        (Place(half="c"), 5 / 2), (Place(half="u → c"), 5 / 2), (Place(spread="mean"), 5),
    ],
    ids=str,
)  # fmt: skip
def test_charged_are_the_tokens_steps_and_blocks_that_are_computed(model: Model, place: Place, steps: float) -> None:
    share = 0.25  # 49 of 196 tokens
    assert sampled(model, place, share)[1] == pytest.approx(len(BASE.full) + share * steps)


def test_the_worst_tokens_are_what_an_oracle_takes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    chosen = Sampling._chosen

    def watched(run: Sampling, step: int, n: int) -> Tensor:
        mask = chosen(run, step, n)
        taken.append((run.missed[step][0], mask))
        return mask

    monkeypatch.setattr(Sampling, "_chosen", watched)
    sampled(model, Place(), 0.25)
    assert len(taken) == STEPS - len(BASE.full)
    for missed, (cond, uncond) in taken:
        assert torch.equal(cond, uncond)
        assert missed[cond].min() >= missed[~cond].max()


def test_every_place_can_be_sampled() -> None:
    model, base = dit(4), Base((0, 1), "Newton o2", 0.25)
    forecast, _ = sampled(model, base=base)
    for what, place in (ORACLES | REAL).items():
        dB, charged = model.run(base, place, 0.5)
        assert dB > 10, what
        assert len(base.full) <= charged < 4, what
    assert forecast.isfinite().all()


def test_maps_find_what_stands_out() -> None:
    pictures = torch.full((1, 1, 8, 8), -1.0)
    pictures[..., 2:6, 2:6] = 1.0
    there = token_map(pictures, "foreground").unflatten(1, (4, 4))[0] > 0
    assert there.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    pictures[..., 6, 7] = 0.0
    assert token_map(pictures[..., 4:, 4:], "frequency").shape == (1, 4)
    flat = token_map(torch.ones(1, 3, 8, 8), "frequency")
    assert flat.abs().max() < 1e-12


def test_gain_is_over_the_best_forecast_of_as_much_time() -> None:
    rows = [Row("m", "forecast", n, 0, n, dB, "") for n, dB in ((4, 30.0), (6, 40.0), (8, 38.0))]
    assert gain(Row("m", "here", 4, 0.25, 5.0, 36.0, ""), rows) == pytest.approx(1.0)
    assert gain(Row("m", "here", 4, 0.5, 8.0, 41.0, ""), rows) == pytest.approx(1.0)  # six steps do better than eight
    assert gain(Row("m", "here", 4, 0.9, 9.0, 42.0, ""), rows) == pytest.approx(2.0)  # a bound: none cost as much
    with pytest.raises(ValueError, match="no forecast of 3"):
        gain(Row("m", "here", 3, 0.0, 3.0, 41.0, ""), rows)


@pytest.mark.parametrize(("steps", "count"), [(50, 5), (28, 3), (28, 20), (50, 34)])
def test_so_many_full_steps_are_laid(steps: int, count: int) -> None:
    for full in laid(steps, count).values():
        assert (len(full), full[0], full[-1]) == (count, 0, steps - 2)
