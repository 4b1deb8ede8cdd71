"""Tokens computed between full steps, simulated: all of them are the model, none the forecast."""

import pytest
import torch
from corrected import Corrected
from tokens import PLACES, Base, Model, Place, Row, gain, token_map
from torch import Tensor

import toca_compile
from toca_compile.demo import fashion_dit
from toca_compile.policies import Composition, Listed, Rule, SkipBlocks
from toca_compile.policies.anchors import Anchors, Polynomial

STEPS = 8
BASE = Base((0, 1, 4), "Newton o2", 0.25)


@pytest.fixture(scope="module")
def model() -> Model:
    """The DiT in so few steps that it takes no time."""
    from dataclasses import replace

    from trained import TRAINED

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRAINED, "fashion_dit", replace(TRAINED["fashion_dit"], steps=STEPS))
        return Model("fashion_dit", (0,), 1)


def sampled(model: Model, place: Place | None, share: float, base: Base = BASE) -> tuple[Tensor, float]:
    """The picture, and what it was charged."""
    sampling = model.sampling(0, base, place, share)
    return model.sampled(0), sampling.charged


def test_all_tokens_are_the_model_and_none_the_forecast(model: Model) -> None:
    base = Base(BASE.full, "Newton o2", 0.0)  # a correction would mend what was not wrong
    whole, charged = sampled(model, Place(), 1.0, base)
    torch.testing.assert_close(whole, model.reference[0], rtol=1e-5, atol=1e-5)
    assert charged == STEPS
    forecast, charged = sampled(model, None, 0, base)
    assert charged == len(BASE.full)
    assert not torch.allclose(forecast, whole, atol=1e-2)
    torch.testing.assert_close(sampled(model, Place(), 0.0, base)[0], forecast)


def test_the_forecast_is_that_of_the_product_and_of_the_study_of_correctors(model: Model) -> None:
    ours, _ = sampled(model, None, 0)
    model.stack.halves = Corrected(BASE.full, BASE.rule, model.moves, BASE.kappa)
    torch.testing.assert_close(model.sampled(0), ours, rtol=1e-4, atol=1e-4)
    rule = Rule(SkipBlocks(do=Anchors(Polynomial(), 3, correct=BASE.kappa)))
    net, sampler = fashion_dit.model_and_sampler()
    opt = toca_compile.optimize(net, Composition(STEPS, Listed(BASE.full), (rule,)), lowering="eager")
    torch.testing.assert_close(sampler(opt, STEPS, 0, 1), ours, rtol=1e-4, atol=1e-4)
