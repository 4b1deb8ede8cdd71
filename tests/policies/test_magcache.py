"""MagCache: its steps follow from the curve alone, and the curve is that of what the blocks add."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import toca_compile
from tests.models import PlainDiT, randomize
from tests.pipelines import build, run
from tests.quality.test_evaluation import SIZE, Counting
from tests.sampling import noise, sample
from toca_compile import MagCache, PolicyError, TocaError
from toca_compile.policies import Magnitudes

STEPS = 6


def published(ratios: list[float], threshold: float, limit: int, retention: float) -> list[bool]:
    """Which steps skip, as the published loop decides it while it runs."""
    skips, ratio, error, steps, has = [], 1.0, 0.0, 0, False
    for step in range(len(ratios)):
        skip = False
        if step >= int(retention * len(ratios) + 0.5):
            ratio, steps = ratio * ratios[step], steps + 1
            error += abs(1 - ratio)
            if has and error <= threshold and steps <= limit:
                skip = True
            else:
                ratio, steps, error = 1.0, 0, 0.0
        has = True
        skips.append(skip)
    return skips


@given(
    st.lists(st.floats(0.5, 1.5), min_size=2, max_size=40),
    st.floats(0, 0.6),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
)
def test_the_steps_of_the_published_loop(ratios: list[float], threshold: float, limit: int, retention: float) -> None:
    phases = Magnitudes(tuple(ratios), threshold, limit, retention).phases(len(ratios), "mlp")
    assert [bool(phase) for phase in phases] == published(ratios, threshold, limit, retention)


def test_another_number_of_steps_takes_the_nearest_ratio() -> None:
    few = Magnitudes((1.0, 1.5, 1.0), 0.4, 9, 0.0)
    assert few.phases(5, "mlp") == Magnitudes((1.0, 1.0, 1.5, 1.0, 1.0), 0.4, 9, 0.0).phases(5, "mlp")
    assert few.phases(1, "mlp") == (0,)


class Added:
    """Calls a model, and keeps what all its blocks add to the stream at each call."""

    def __init__(self, model: PlainDiT) -> None:
        self.model, self.values = model, []  # type: tuple[PlainDiT, list[Tensor]]

    def __call__(self, *args: Any) -> Tensor:
        ends: list[Tensor] = []
        hooks = [
            self.model.blocks[0].register_forward_pre_hook(lambda _, given: ends.append(given[0])),
            self.model.blocks[-1].register_forward_hook(lambda _, given, made: ends.append(made)),
        ]
        out: Tensor = self.model(*args)
        for hook in hooks:
            hook.remove()
        self.values.append(ends[1] - ends[0])
        return out


def test_the_curve_is_that_of_what_the_blocks_add() -> None:
    model = randomize(PlainDiT(SIZE, depth=2))
    added = Added(model)
    Counting()(added, STEPS, 0, 2)
    lengths = [v.norm(dim=-1) for v in added.values]
    wanted = [1.0, *(float((b / a).mean()) for a, b in pairwise(lengths))]
    found = toca_compile.magnitudes(model, Counting(), steps=STEPS, seeds=(0,), samples=2)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert max(abs(r - 1) for r in found) > 1e-3
    opt = toca_compile.optimize(model, MagCache(STEPS, found, 0.1), lowering="eager")
    sample(opt, STEPS, noise(2, SIZE))
    assert [s.kind.value == "skip" for s in opt.steps] == published(list(found), 0.1, 5, 0.1)
    with pytest.raises(TocaError, match="called the model 4 times"):
        toca_compile.magnitudes(model, lambda net, _, seed, n: Counting()(net, 4, seed, n), steps=STEPS)
    assert not model._forward_hooks


def test_the_curve_of_a_pipeline() -> None:
    pipe, call = build("StableDiffusion3Pipeline")

    def sampler(pipe: Any, steps: int, seed: int, count: int) -> Tensor:
        found: Tensor = run(pipe, call, steps)
        return found

    plain = run(pipe, call, 3)
    found = toca_compile.magnitudes(pipe, sampler, steps=3)
    assert len(found) == 3
    assert not toca_compile.is_optimized(pipe)
    assert torch.equal(run(pipe, call, 3), plain)


def test_no_curve_is_refused() -> None:
    with pytest.raises(PolicyError, match="ratios must be one a step"):
        MagCache(10, ())
