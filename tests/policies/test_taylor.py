"""Forecasts: equal to TaylorSeer's literal form, exact where they must be, as large as reported."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import toca_compile
from tests.models import PlainDiT, diffusers_dit, randomize
from tests.oracles.taylor import TaylorOracle
from tests.sampling import noise, sample
from tests.shared import Traced
from toca_compile import PolicyError, TaylorSeer
from toca_compile.ir.history import CacheSpec
from toca_compile.ops import series


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    interval=st.integers(1, 6), order=st.integers(0, 4), warmup=st.integers(1, 4), steps=st.integers(1, 24),
    depth=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_equal_to_taylorseer(
    traced: Traced, interval: int, order: int, warmup: int, steps: int, depth: int, seed: int
) -> None:
    model, opt = traced(PlainDiT, size=(6, 10), depth=depth)
    randomize(model, seed)
    opt.policy = TaylorSeer(steps, interval, order, warmup)
    oracle = TaylorOracle(model, interval, order, warmup)
    x = noise(2, (6, 10), seed=seed)
    torch.testing.assert_close(sample(opt, steps, x), sample(oracle, steps, x), rtol=1e-4, atol=1e-4)
    assert ["full" if r.kind == "full" else "cached" for r in opt.steps] == oracle.kinds


def forecast(memory: CacheSpec, values: torch.Tensor, full: Sequence[int], step: int) -> torch.Tensor:
    """What the graph does, on one number: differences at each full step, the series at ``step``."""
    kept: list[torch.Tensor] = []
    for n, at in enumerate(full):
        fresh = [values[at]]
        for order in range(1, min(n, memory.order) + 1):
            fresh.append(series.difference(fresh[-1], kept[order - 1], memory.spacing(full[: n + 1], order)))
        kept = fresh
    total = kept[0]
    for order, d in enumerate(kept[1:], 1):
        factor = order if memory.basis == "taylor" else 0
        total = series.forecast(total, d, memory.power(full, step, order), factor)
    return total


@given(st.data(), st.integers(0, 4))
def test_newton_is_exact_on_polynomials_of_its_order(data: st.DataObject, order: int) -> None:
    """Through order + 1 full steps however spaced; a Taylor series of repeated slopes is so up to order 1."""
    gaps = data.draw(st.lists(st.integers(1, 6), min_size=order, max_size=order))
    full = [0]
    for gap in gaps:
        full.append(full[-1] + gap)
    step = full[-1] + data.draw(st.integers(1, 6))
    coefficients = data.draw(st.lists(st.integers(-5, 5), min_size=order + 1, max_size=order + 1))
    x = torch.arange(step + 1, dtype=torch.float64) / 8
    values = sum((c * x**i for i, c in enumerate(coefficients)), start=torch.zeros_like(x)).float()
    for basis in ("newton", "taylor") if order < 2 else ("newton",):
        actual = forecast(CacheSpec(order, basis=basis), values, full, step)
        torch.testing.assert_close(actual, values[step], rtol=1e-3, atol=1e-2)


def test_memory_is_order_plus_one_outputs() -> None:
    sizes = {}
    opt = toca_compile.optimize(diffusers_dit(), TaylorSeer(9, 3), lowering="eager")
    for order, dtype in ((0, None), (2, None), (2, "bfloat16")):
        opt.policy = TaylorSeer(9, 3, order, cache_dtype=dtype)
        with torch.no_grad():
            for _ in range(8):
                assert (
                    opt(noise(), timestep=torch.full((2,), 500), class_labels=torch.arange(2)).sample.isfinite().all()
                )
        sizes[order, dtype] = opt.cache_bytes
        assert toca_compile.explain(opt).cache_bytes == opt.cache_bytes
    assert sizes[2, None] == 3 * sizes[0, None]
    assert sizes[2, "bfloat16"] * 2 == sizes[2, None]


def test_a_schedule_is_read_from_the_report() -> None:
    opt = toca_compile.optimize(randomize(PlainDiT()), TaylorSeer(12, 4, 2, warmup=2), lowering="eager")
    sample(opt, 12, noise())
    report = toca_compile.explain(opt)
    assert report.schedule == "FFTTTFTTTFTT"
    assert report.flops("forecast") == report.flops("reuse") < report.flops("full")
    assert all("forecast" in s.actions for s in report.sites)


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": 5},
        {"order": -1},
        {"interval": 0},
        {"basis": "fourier"},
        {"schedule": "x"},
        {"bend": 0},
        {"full": (1, 2)},
        {"cache_dtype": "int8"},
        {"warmup": 0},
    ],
)
def test_numbers_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(PolicyError, match=next(iter(wrong))):
        TaylorSeer(**wrong)
