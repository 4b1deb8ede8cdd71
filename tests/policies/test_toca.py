"""The optimised model equals ToCa's Algorithm 1 over whole runs: outputs, step kinds and selected indices."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import toca_compile
from tests.models import PlainDiT, randomize
from tests.oracles.dit import Oracle
from tests.recording import Recording, same_selections
from tests.sampling import noise, sample
from tests.shared import Traced
from toca_compile.lowerings import LOWERINGS

CASES = st.fixed_dictionaries(
    {
        # Grid, depth and batch: each of these is traced once, and all else is drawn for it.
        "model": st.sampled_from([((8, 8), 1, 2), ((6, 10), 3, 1), ((12, 4), 4, 3), ((14, 6), 2, 2)]),
        "steps": st.just(50) | st.integers(2, 40),
        "interval": st.integers(1, 6),
        "ratio": st.sampled_from([0.0, 0.07, 0.2, 0.5, 1.0]),
        "cell": st.integers(1, 3),
        "bonus": st.sampled_from([0.0, 0.6]),
        "seed": st.integers(0, 1000),
    }
)


@pytest.fixture(autouse=True)
def _recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOWERINGS, "recording", lambda variant, examples: Recording(variant.module).run)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_equal_to_algorithm_1(traced: Traced, case: dict[str, Any]) -> None:
    size, depth, batch = case["model"]
    steps, n, ratio = case["steps"], case["interval"], case["ratio"]
    model, opt = traced(PlainDiT, lowering="recording", size=size, depth=depth)
    randomize(model, case["seed"])
    opt.policy = toca_compile.ToCa(steps, n, ratio, cell=case["cell"], bonus=case["bonus"])
    oracle = Oracle(model, steps, n, ratio, cell=case["cell"], bonus=case["bonus"])
    x = noise(batch, size, seed=case["seed"])
    Recording.chosen.clear()
    expected = sample(oracle, steps, x)
    actual = sample(opt, steps, x)
    kinds = ["full" if r.kind == "full" else "cached" for r in opt.steps]
    assert kinds == oracle.kinds
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    tokens = model.grid[0] * model.grid[1]
    same_selections(oracle.selected, tokens)


@pytest.mark.parametrize("size", [(8, 8), (6, 14)])
def test_whole_ddim_preset(size: tuple[int, int]) -> None:
    model = randomize(PlainDiT(size, depth=5))
    opt = toca_compile.optimize(model, toca_compile.preset("dit-xl-2/ddim-50"), lowering="eager")
    x = noise(2, size)
    torch.testing.assert_close(
        sample(opt, 50, x),
        sample(Oracle(model, 50, 3, 0.07), 50, x),
        rtol=1e-4,
        atol=1e-5,  # type: ignore[arg-type]
    )
    full = [49 - r.index for r in opt.steps if r.kind == "full"]
    assert full == [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
