"""The arithmetic of predicted times."""

import pytest
from fake_gpu import Launch
from roofline import GPU, Assumed, busy, graphed, launched

CARD = GPU(rate=100, bandwidth=1000)
ASSUMED = Assumed(products=0.5, attention=0.25, memory=0.5, host=4e-6, gap=1e-6)
SMALL = Launch("triton", moved=500_000, flops=0)
LARGE = Launch("gemm", moved=500_000, flops=10**9)


def test_a_launch_is_bound_by_its_products_or_its_bytes() -> None:
    assert busy(SMALL, CARD, ASSUMED) == pytest.approx(1e-6)
    assert busy(LARGE, CARD, ASSUMED) == pytest.approx(20e-6)
    assert busy(Launch("attention", 0, 10**9), CARD, ASSUMED) == pytest.approx(40e-6)


def test_a_graph_leaves_gaps_and_the_host_may_be_late() -> None:
    assert graphed([SMALL, LARGE], CARD, ASSUMED) == pytest.approx((1 + 1 + 20 + 1) * 1e-6)
    assert launched([SMALL] * 3, CARD, ASSUMED) == pytest.approx((3 * 4 + 1) * 1e-6)  # the GPU waits for the host
    assert launched([LARGE, SMALL, SMALL], CARD, ASSUMED) == pytest.approx((4 + 20 + 1 + 1 + 1 + 1) * 1e-6)
