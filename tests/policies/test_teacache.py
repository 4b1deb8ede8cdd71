"""TeaCache: values and decisions of its published loop."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import toca_compile
from tests import pipelines
from tests.models import PlainDiT, randomize
from tests.policies.test_block_cache import close
from tests.sampling import noise, sample, sample_flux
from tests.shared import Traced
from toca_compile import BlockCache, FullCompute, PolicyError, load_policy, save_policy
from toca_compile.policies import Adaptive, Composition, FirstInput, Rule, SkipBlocks, TeaCache

FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


class TeaCacheOracle:
    """The published loop on ``PlainDiT``: call it once a step."""

    def __init__(self, model: PlainDiT, steps: int, threshold: float, coefficients: tuple[float, ...]) -> None:
        self.model, self.steps, self.threshold, self.coefficients = model, steps, threshold, coefficients
        self.call, self.total = 0, 0.0
        self.before: Tensor | None = None
        self.residual: Tensor | None = None
        self.kinds: list[str] = []

    def measured(self, modulated: Tensor) -> Tensor:
        """What is compared from step to step."""
        return modulated

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.model.prepare(x, t, y)
        block: Any = self.model.blocks[0]
        shift, scale = block.modulation(c).unsqueeze(1).chunk(6, dim=-1)[:2]
        modulated = self.measured(block.norm1(h) * (1 + scale) + shift)
        if self.call in (0, self.steps - 1):
            computes, self.total = True, 0.0
        else:
            assert self.before is not None
            distance = float((modulated - self.before).abs().mean() / self.before.abs().mean())
            powers = range(len(self.coefficients))[::-1]
            self.total += sum(k * distance**p for k, p in zip(self.coefficients, powers, strict=True))
            computes = self.total >= self.threshold
            self.total = 0.0 if computes else self.total
        self.before = modulated
        start = h
        if computes:
            for block in self.model.blocks:
                h = block(h, c)
            self.residual = h - start
        else:
            assert self.residual is not None
            h = h + self.residual
        self.kinds.append("full" if computes else "skip")
        self.call += 1
        return self.model.finish(h, c)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    threshold=st.sampled_from([0.05, 0.2, 0.4, 1.0]), rescale=st.sampled_from([(1.0, 0.0), (2.0, -0.3, 0.1), (0.08,)]),
    steps=st.integers(1, 20), seed=st.integers(0, 99),
)  # fmt: skip
def test_equal_to_the_published_loop(
    traced: Traced, threshold: float, rescale: tuple[float, ...], steps: int, seed: int
) -> None:
    model, opt = traced(PlainDiT, size=(6, 10), depth=3)
    randomize(model, seed)
    opt.policy = TeaCache(steps, threshold, rescale)
    x = noise(2, (6, 10), seed=seed)
    for _ in range(2):  # nothing of the first run may reach the second
        oracle = TeaCacheOracle(model, steps, threshold, rescale)
        close(sample(opt, steps, x), sample(oracle, steps, x))
        assert [r.kind.value for r in opt.steps] == oracle.kinds


def test_it_skips_and_computes_as_its_sum_goes(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither all nor nothing, so that the sum matters; with one read a step."""
    model, opt = traced(PlainDiT, TeaCache(20, 0.3), size=(6, 10), depth=3)
    oracle = TeaCacheOracle(model, 20, 0.3, (1.0, 0.0))
    x = noise(2, (6, 10))
    close(sample(opt, 20, x), sample(oracle, 20, x))
    assert [r.kind.value for r in opt.steps] == oracle.kinds
    assert 4 < oracle.kinds.count("skip") < 16
    gaps = "".join(k[0] for k in oracle.kinds).strip("f").split("f")
    assert len(set(gaps)) > 1
    reads: list[int] = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: reads.append(1) or self.item())  # type: ignore[func-returns-value]
    sample(opt, 20, x)
    told = len(reads)
    opt.policy = BlockCache(20, first=0, interval=3)
    reads.clear()
    sample(opt, 20, x)
    assert told - len(reads) == 18  # the others are of the times, which are the host's


class FluxOracle:
    """The published loop around the blocks of a ``FluxTransformer2DModel``: they all run, and at a step that skips them
    what leaves the last is what entered the first and the last full step's residual."""

    def __init__(self, model: Any, steps: int, threshold: float) -> None:
        self.model, self.steps, self.threshold = model, steps, threshold
        self.total, self.kinds = 0.0, []  # type: tuple[float, list[str]]
        self.before: Tensor | None = None
        self.residual: Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        entered: list[Tensor] = []

        def enter(block: Any, _: Any, given: dict[str, Any]) -> None:
            entered.append(given["hidden_states"])
            modulated = block.norm1(given["hidden_states"], emb=given["temb"])[0]
            computes = len(self.kinds) in (0, self.steps - 1)
            if not computes:
                assert self.before is not None
                self.total += float((modulated - self.before).abs().mean() / self.before.abs().mean())
                computes = self.total >= self.threshold
            self.total = 0.0 if computes else self.total
            self.before = modulated
            self.kinds.append("full" if computes else "skip")

        def leave(block: Any, _: Any, made: tuple[Tensor, Tensor]) -> Any:
            if self.kinds[-1] == "full":
                self.residual = made[1] - entered[0]
            assert self.residual is not None
            return made[0], entered[0] + self.residual

        hooks = [
            self.model.transformer_blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            self.model.single_transformer_blocks[-1].register_forward_hook(leave),
        ]
        out = self.model(**inputs)
        for hook in hooks:
            hook.remove()
        return out


@pytest.mark.parametrize("hoist", [True, False])
def test_two_streams(hoist: bool) -> None:
    """What is measured is the first block's modulated input, wherever its shift and scale are computed."""
    model = pipelines.flux()
    opt = toca_compile.optimize(model, FullCompute(), lowering="eager", hoist=hoist)
    found = set()
    for threshold in (0.1, 0.3, 0.6):
        opt.policy = TeaCache(12, threshold)
        oracle = FluxOracle(model, 12, threshold)
        close(sample_flux(opt, 12, 2, (3, 4)), sample_flux(oracle, 12, 2, (3, 4)))
        assert [r.kind.value for r in opt.steps] == oracle.kinds
        found.add(tuple(oracle.kinds))
    assert len(found) > 1


def test_a_first_block_may_be_computed(traced: Traced) -> None:
    _, opt = traced(PlainDiT, TeaCache(10, 0.3, first=1, last=1, order=1), size=(6, 10), depth=3)
    sample(opt, 10, noise(2, (6, 10)))
    assert {r.kind.value for r in opt.steps} == {"full", "skip"}


def test_as_parts_and_as_a_file(tmp_path: Any) -> None:
    policy = TeaCache(28, 0.4, FLUX, limit=3)
    save_policy(policy, tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json") == policy
    when = Adaptive(0.4, 1, 3, FirstInput(FLUX), ends_full=True)
    assert policy.composition() == Composition(28, when, (Rule(SkipBlocks()),))
    save_policy(policy.composition(), tmp_path / "parts.json")
    assert load_policy(tmp_path / "parts.json") == policy.composition()
    with pytest.raises(PolicyError, match="rescale must have a coefficient"):
        TeaCache(28, 0.4, ())
