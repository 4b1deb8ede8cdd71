"""The optimised model equals ToCa's Algorithm 1 over whole runs: outputs, step kinds and selected indices."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import toca_compile
from tests.models import PlainDiT, randomize
from tests.oracles.dit import Oracle
from tests.recording import Recording, same_selections
from tests.sampling import noise, sample
from toca_compile.lowerings import LOWERINGS

CASES = st.fixed_dictionaries(
    {
        "size": st.sampled_from([(8, 8), (6, 10), (12, 4), (14, 6)]),
        "depth": st.integers(1, 4),
        "batch": st.integers(1, 3),
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
def test_equal_to_algorithm_1(case: dict[str, object]) -> None:
    size, depth, batch = case["size"], case["depth"], case["batch"]
    steps, n, ratio = case["steps"], case["interval"], case["ratio"]
    torch._dynamo.reset()
    model = randomize(PlainDiT(size, depth=depth), case["seed"])  # type: ignore[arg-type]
    policy = toca_compile.ToCa(num_steps=steps, interval=n, fresh_ratio=ratio, cell=case["cell"], bonus=case["bonus"])  # type: ignore[arg-type]
    opt = toca_compile.optimize(model, policy, lowering="recording")
    oracle = Oracle(model, steps, n, ratio, cell=case["cell"], bonus=case["bonus"])  # type: ignore[arg-type]
    x = noise(batch, size, seed=case["seed"])  # type: ignore[arg-type]
    Recording.chosen.clear()
    expected = sample(oracle, steps, x)  # type: ignore[arg-type]
    actual = sample(opt, steps, x)  # type: ignore[arg-type]
    kinds = ["full" if r.kind == "full" else "cached" for r in opt.steps]
    assert kinds == oracle.kinds
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    tokens = model.grid[0] * model.grid[1]  # type: ignore[operator]
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
