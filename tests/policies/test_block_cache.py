"""Skipped blocks: DuCa, and block caches with and without a test at run time, against their literal forms."""

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import toca_compile
from tests.models import PlainDiT, randomize
from tests.oracles.blocks import BlockOracle
from tests.oracles.dit import DuCaOracle
from tests.sampling import noise, sample
from tests.shared import Traced
from toca_compile import BlockCache, Composition, DuCa, PolicyError, ToCa
from toca_compile.policies import Adaptive, Partial, Rule, SkipBlocks


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_schedule_of_duca_ddim_50() -> None:
    """The published order of full, ToCa and aggressive steps of the last layer's kind."""
    wanted = "FTATTFTATFTATFTATATFATFATFATFATFTFTFTFTFTFTFTFTFTF"
    phases = DuCa().when.phases(50, "mlp")
    assert "".join("F" if p == 0 else "T" if p % 2 else "A" for p in phases) == wanted


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    interval=st.integers(1, 6), steps=st.integers(2, 40), ratio=st.sampled_from([0.07, 0.3]), depth=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equal_to_duca(traced: Traced, interval: int, steps: int, ratio: float, depth: int, seed: int) -> None:
    model, opt = traced(PlainDiT, size=(6, 10), depth=depth)
    randomize(model, seed)
    opt.policy = DuCa(num_steps=steps, interval=interval, fresh_ratio=ratio)
    oracle = DuCaOracle(model, steps, interval, ratio, bonus=0.8)
    x = noise(2, (6, 10), seed=seed)
    close(sample(opt, steps, x), sample(oracle, steps, x))
    names = {"full": "full", "skip": "skip"}
    assert [names.get(r.kind.value, "cached") for r in opt.steps] == oracle.kinds


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    first=st.integers(0, 2), last=st.integers(0, 1), order=st.integers(0, 3), interval=st.integers(1, 5),
    warmup=st.integers(1, 3), steps=st.integers(1, 20), seed=st.integers(0, 99),
)  # fmt: skip
def test_equal_to_a_static_block_cache(
    traced: Traced, first: int, last: int, order: int, interval: int, warmup: int, steps: int, seed: int
) -> None:
    model, opt = traced(PlainDiT, size=(6, 10), depth=4)
    randomize(model, seed)
    opt.policy = BlockCache(steps, first, last, interval=interval, warmup=warmup, order=order)
    oracle = BlockOracle(model, first, last, interval=interval, warmup=warmup, order=order)
    x = noise(2, (6, 10), seed=seed)
    close(sample(opt, steps, x), sample(oracle, steps, x))
    assert [r.kind.value for r in opt.steps] == oracle.kinds


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    first=st.integers(1, 3), last=st.integers(0, 1), order=st.integers(0, 2), warmup=st.integers(1, 3),
    threshold=st.sampled_from([0.1, 0.3, 0.5, 0.8]), limit=st.none() | st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_decisions_equal_the_oracles(
    traced: Traced, first: int, last: int, order: int, warmup: int, threshold: float, limit: int | None, seed: int
) -> None:
    model, opt = traced(PlainDiT, size=(6, 10), depth=5)
    randomize(model, seed)
    opt.policy = BlockCache(24, first, last, threshold=threshold, limit=limit, warmup=warmup, order=order)
    x = noise(2, (6, 10), seed=seed)
    for _ in range(2):  # nothing of the first run may reach the second
        oracle = BlockOracle(model, first, last, threshold=threshold, limit=limit, warmup=warmup, order=order)
        close(sample(opt, 24, x), sample(oracle, 24, x))
        assert [r.kind.value for r in opt.steps] == oracle.kinds


def test_decisions_differ_from_run_to_run_and_are_reported(dit: tuple[Any, Any]) -> None:
    opt = dit[1]
    opt.policy = BlockCache(20, threshold=0.5)
    sample(opt, 20, noise(2, (6, 10)))
    report = toca_compile.explain(opt)
    skipped = sum(r.kind == "skip" for r in opt.steps)
    assert 0 < skipped < 19
    assert report.schedule.count("S") == skipped
    full, skip = report.flops("full"), report.flops("skip")
    assert report.run_flops() == (20 - skipped) * full + skipped * skip
    sample(opt, 19, noise(2, (6, 10)))  # the last step would free them
    assert opt.cache_bytes == report.cache_bytes


def test_one_read_a_step_with_a_threshold_and_none_without(
    dit: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: dict[str, int] = dict.fromkeys(("bool", "float"), 0)

    def count(name: str) -> Callable[[Tensor], Any]:
        def read(self: Tensor) -> Any:
            reads[name] += 1
            return getattr(builtins, name)(self.item())

        return read

    for name in reads:
        monkeypatch.setattr(torch.Tensor, f"__{name}__", count(name))
    opt, of_times = dit[1], 0
    for policy, wanted in (
        (BlockCache(12, interval=3), 0),
        (DuCa(12), 0),
        (BlockCache(12, threshold=0.5, warmup=2), 10),
    ):
        opt.policy = policy
        x = noise(2, (6, 10))
        sample(opt, 12, x)
        reads.update(bool=0, float=0)
        sample(opt, 12, x)
        of_times = of_times or reads["float"]  # which are the host's
        assert reads == {"bool": 0, "float": of_times + wanted}


def test_flops_of_skipped_blocks(dit: tuple[Any, Any]) -> None:
    """A skipped block costs nothing, and the first ones what they cost."""
    opt = dit[1]
    opt.policy = BlockCache(8, first=1, interval=4)
    sample(opt, 8, noise(2, (6, 10)))
    report = toca_compile.explain(opt)
    assert report.schedule == "FSSSFSSS"
    per_block = sum(s.flops for s in report.sites) / 4
    assert report.flops("full") - report.flops("skip") >= 3 * per_block
    assert report.flops("skip") >= per_block


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: BlockCache(first=0, threshold=0.1), "first"),
        (lambda: BlockCache(order=5), "order"),
        (lambda: BlockCache(threshold=-1.0), "threshold"),
        (lambda: BlockCache(threshold=0.1, limit=0), "limit"),
        (lambda: Composition(when=Adaptive(), rules=(Rule(Partial()),)), "skipped"),
        (lambda: Composition(rules=(Rule(SkipBlocks()), Rule(Partial()))), "as a whole"),
        (lambda: Composition(rules=(Rule(SkipBlocks(), kinds=("mlp",)),)), "as a whole"),
        (lambda: Composition(rules=(Rule(SkipBlocks(1)),), alternate=(Rule(SkipBlocks(2)),)), "same"),
        (lambda: Composition(rules=(Rule(Partial(order=2)),), basis="newton"), "history each"),
    ],
)
def test_contradictions_are_refused(make: object, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        make()  # type: ignore[operator]


def test_more_blocks_than_there_are() -> None:
    opt = toca_compile.optimize(randomize(PlainDiT(depth=3)), BlockCache(8, first=2, last=1), lowering="eager")
    with pytest.raises(PolicyError, match="3 blocks"):
        sample(opt, 8, noise())


def test_as_diffusers_first_block_cache() -> None:
    """On FLUX, whose streams are joined half way: the same pictures as diffusers' own hooks."""
    diffusers = pytest.importorskip("diffusers")
    model = randomize(
        diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, guidance_embeds=True,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=[2, 2, 4],
        )
    )  # fmt: skip

    def run(net: object) -> torch.Tensor:
        x = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for i in range(10):
                x = x + 0.0005 * net(  # type: ignore[operator]
                    hidden_states=x, encoder_hidden_states=torch.ones(1, 6, 12), pooled_projections=torch.ones(1, 12),
                    timestep=torch.tensor([0.9 - i * i * 0.00003]), img_ids=torch.ones(16, 3), txt_ids=torch.ones(6, 3),
                    guidance=torch.tensor([3.5]), return_dict=False,
                )[0]  # fmt: skip
        return x

    opt = toca_compile.optimize(model, BlockCache(10, threshold=0.03), lowering="eager")
    ours = run(opt)
    assert 0 < sum(r.kind == "skip" for r in opt.steps) < 9
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.03))
    with model.cache_context("run"):
        theirs = run(model)
    close(ours, theirs)


def test_a_policy_with_skips_is_followed_by_one_without(traced: Traced) -> None:
    model, opt = traced(PlainDiT, size=(6, 10), depth=3)
    opt.policy = BlockCache(9, interval=3)
    x = noise(2, (6, 10))
    sample(opt, 9, x)
    opt.policy = ToCa(9, 3, 0.3)
    other = toca_compile.optimize(model, ToCa(9, 3, 0.3), lowering="eager")
    assert torch.equal(sample(opt, 9, x), sample(other, 9, x))
