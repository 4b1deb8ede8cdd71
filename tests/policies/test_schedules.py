"""Schedules and ratios against the published values (ToCa's code, confirmed by its users' printouts)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import toca_compile
from tests.models import PlainDiT, randomize
from tests.oracles.tokens import interval
from tests.sampling import noise, sample
from toca_compile import (
    BlockCache,
    DuCa,
    Fora,
    FullCompute,
    PolicyError,
    TaylorSeer,
    TaylorToCa,
    ToCa,
    load_policy,
    preset,
    save_policy,
)
from toca_compile.ir.actions import Partial
from toca_compile.policies import PRESETS, ready_made
from toca_compile.policies.schedules import spread_steps, toca_phases


def counted_down(policy: ToCa) -> list[int]:
    return [policy.num_steps - 1 - i for i in policy.full_steps()]


def test_full_steps_of_ddim_50() -> None:
    expected = [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
    assert counted_down(preset("dit-xl-2/ddim-50")) == expected


def test_full_steps_of_ddpm_250() -> None:
    steps = counted_down(preset("dit-xl-2/ddpm-250"))
    assert len(steps) == 72
    assert steps[:10] == [249, 240, 234, 228, 222, 216, 210, 205, 200, 195]
    assert not {245, 155} & set(steps)
    assert [s for s in steps if 48 <= s <= 94] == list(range(94, 47, -2))


def test_without_ratio_the_schedule_is_fora() -> None:
    assert counted_down(preset("dit-xl-2/ddim-50", fresh_ratio=0.0)) == [49, *range(48, -1, -3)]
    assert ToCa(num_steps=10, interval=4, fresh_ratio=0.0, schedule="constant").full_steps() == (0, 4, 8)


@given(st.integers(1, 120), st.integers(1, 9))
def test_the_interval_function(steps: int, n: int) -> None:
    """Against the literal form: whenever s is a multiple of the interval, evaluate anew and test again."""
    current, expected = 1, []
    for s in range(steps - 1, -1, -1):
        full = s == steps - 1
        if full or s % current == 0:
            current = interval(s, steps, n, 0.4, True)
            full = full or s % current == 0
        if full:
            expected.append(s)
    assert [s for s, p in toca_phases(steps, n, 0.4, (0.2, 0.4), 2).items() if p == 0] == expected


def tokens_at(name: str, depth: int, s: int) -> int:
    policy = preset(name)
    return policy.ratios.tokens(policy.fresh_ratio, 256, kind="mlp", layer=(depth, 27), step=(s, policy.num_steps))


def test_tokens_of_both_presets() -> None:
    for s, expected in {48: (0, 0, 0), 36: (4, 5, 6), 25: (35, 44, 53), 12: (73, 90, 109), 1: (104, 129, 156)}.items():
        assert tuple(tokens_at("dit-xl-2/ddim-50", d, s) for d in (0, 13, 27)) == expected
    for s, expected in {248: (48, 27, 5), 125: (80, 46, 8), 1: (112, 64, 12)}.items():
        assert tuple(tokens_at("dit-xl-2/ddpm-250", d, s) for d in (0, 13, 27)) == expected


def test_depth_comes_from_the_graph() -> None:
    """The layer factor runs over the blocks there are: 0.8 at the first, 1.2 at the last; a span may be given."""
    for depth in (2, 5):
        torch._dynamo.reset()
        opt = toca_compile.optimize(
            randomize(PlainDiT((16, 16), depth=depth)), preset("dit-xl-2/ddim-50"), lowering="eager"
        )
        sample(opt, 1, noise(size=(16, 16)))
        plan = toca_compile.explain(opt).plan
        ks = [a.tokens for a in plan.steps[48].sites if isinstance(a, Partial)]  # s = 1
        assert len(ks) == depth
        assert (ks[0], ks[-1]) == (26, 39)  # ⌊64·0.07·(0.8, 1.2)·2.92·2.5⌋
        opt.policy = preset("dit-xl-2/ddim-50", layer_span=27)
        plan = toca_compile.explain(opt).plan
        ks = [a.tokens for a in plan.steps[48].sites if isinstance(a, Partial)]
        assert ks[-1] == int(64 * 0.07 * (0.8 + 0.4 * (depth - 1) / 27) * 2.92 * 2.5)


@given(st.integers(1, 60), st.integers(1, 8), st.floats(0.5, 2), st.integers(1, 4))
def test_spread_steps(steps: int, interval: int, bend: float, warmup: int) -> None:
    """From 0 to the last step but one, no more than at even intervals (and the warm-up)."""
    full = spread_steps(steps, interval, bend, warmup)
    assert list(full) == sorted(set(full))
    assert full[0] == 0
    assert full[-1] <= max(steps - 2, warmup - 1)
    assert len(full) <= -(-steps // interval) + warmup - 1
    assert spread_steps(50, 5) == (0, 5, 11, 16, 21, 27, 32, 37, 43, 48)


POLICIES = [
    FullCompute(), Fora(7, 2), ToCa(), TaylorSeer(20, 5, 3, schedule="spread", bend=0.8, basis="newton"),
    TaylorSeer(20, full=(0, 1, 7), cache_dtype="bfloat16"), *(preset(name) for name in PRESETS),
    *ready_made().values(), BlockCache(20, 2, 1, threshold=0.2, limit=3, order=1), DuCa(20).composition(),
    preset("opensora-1.2/rflow-30").composition(), TaylorToCa(9, keys="keep").composition(),
    BlockCache(20, threshold=0.3).composition(), TaylorSeer(20, full=(0, 1, 7)).composition(),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_a_policy_survives_json(policy: Any, tmp_path: Path) -> None:
    save_policy(policy, tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json") == policy


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"policy": "Other"}', '{"policy": "Fora", "pace": 3}'])
def test_a_file_that_is_no_policy(text: str, tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(PolicyError, match="holds no policy"):
        load_policy(tmp_path / "policy.json")
    with pytest.raises(PolicyError, match="cannot be saved"):
        save_policy(object(), tmp_path / "policy.json")


def test_plans_of_the_simple_policies() -> None:
    model = randomize(PlainDiT())
    for policy, schedule in ((FullCompute(), "F"), (Fora(7, 3), "FRRFRRF")):
        torch._dynamo.reset()
        opt = toca_compile.optimize(model, policy, lowering="eager")
        sample(opt, 1, noise())
        assert toca_compile.explain(opt).schedule == schedule
