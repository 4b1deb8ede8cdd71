"""SpeCa: values and decisions of its loop; and gates of its like on joint models."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import toca_compile
from tests import pipelines
from tests.oracles.gated import STEPS, SpeLoop, decide, same_loop
from tests.policies.test_block_cache import close
from tests.sampling import noise, sample, sample_flux
from toca_compile import FullCompute, PolicyError, TocaError
from toca_compile.policies import (
    Adaptive,
    Anchors,
    Composition,
    DiCache,
    EasyCache,
    FreqCa,
    Hermite,
    LastBlocks,
    MeanCache,
    Rule,
    SkipBlocks,
    SpeCa,
)

SIZE, DEPTH = (6, 10), 4


def test_equal_to_its_loop(dit: tuple[Any, Any]) -> None:
    loops: list[Any] = []
    for threshold, decay, order, drafts, limit, last in (
        (1.5, 0.2, 0, 0, None, 1), (1.0, 0.5, 0, 0, None, 1), (1.7, 0.8, 1, 0, 2, 1), (0.5, 1.0, 0, 1, 3, 2), (2.3, 1.0, 2, 0, 8, 1),
    ):  # fmt: skip
        policy = SpeCa(STEPS, threshold, decay, 0.01, drafts, limit, order, 2, last)
        settings = {"threshold": threshold, "decay": decay, "floor": 0.01, "drafts": drafts, "limit": limit}
        settings |= {"order": order, "warmup": 2, "last": last}
        loops.append(same_loop(dit, policy, lambda model, s=settings: SpeLoop(model, STEPS, **s)))  # type: ignore[misc]
    decide(loops)


def test_a_joint_model() -> None:
    """Two streams that are joined on the way: some steps skip, some do not, and thresholds at the ends are reuse and
    no caching at all."""
    model = pipelines.flux()
    opt = toca_compile.optimize(model, FullCompute(), lowering="eager")
    plain = sample_flux(opt, 8, 2, (3, 4))
    for make in (
        lambda t: EasyCache(8, t, 2), lambda t: DiCache(8, t, retention=0.25), lambda t: SpeCa(8, t, 1.0, 0.0, warmup=2),
    ):  # fmt: skip
        opt.policy = make(1e6)
        sample_flux(opt, 8, 2, (3, 4))
        assert {r.kind.value for r in opt.steps} == {"full", "skip"}
        opt.policy = make(1e-9)
        close(sample_flux(opt, 8, 2, (3, 4)), plain)
        assert {r.kind.value for r in opt.steps} == {"full"}


def test_kept_in_few_bits(dit: tuple[Any, Any]) -> None:
    """What gates keep beside the values is not packed, and a packed forecast is near the plain one."""
    _, opt = dit
    x = noise(2, SIZE)
    for policy in (
        EasyCache(8, 1e6, 2), DiCache(8, 1e6), SpeCa(8, 1e6, warmup=2, order=0), FreqCa(8, 3), MeanCache(8, 3),
    ):  # fmt: skip
        opt.policy = policy
        plain = sample(opt, 8, x)
        opt.policy = replace(policy, cache_dtype="float8_e4m3fn")
        packed = sample(opt, 8, x)
        assert {r.kind.value for r in opt.steps} == {"full", "skip"}
        assert 0 < float((packed - plain).norm() / plain.norm()) < 0.1


def test_what_cannot_be_measured_is_refused(dit: tuple[Any, Any], tmp_path: Any) -> None:
    with pytest.raises(PolicyError, match="Adaptive is measured on the last blocks: SkipBlocks\\(last=1\\)"):
        Composition(8, Adaptive(by=LastBlocks()), (Rule(SkipBlocks()),))
    model, opt = dit
    inputs = noise(2, SIZE), torch.ones(2), torch.zeros(2).long()
    forecast = Composition(8, Adaptive(), (Rule(SkipBlocks(1, do=Anchors(Hermite(0.5), 3))),))
    with pytest.raises(TocaError, match="the weights of Hermite follow from which steps were computed"):
        toca_compile.export(model, forecast, inputs, tmp_path / "it.pt2", form="program")
    for policy, blocks in ((SpeCa(8, last=DEPTH), DEPTH), (DiCache(8, probe=DEPTH), DEPTH)):
        with pytest.raises(PolicyError, match=f"the model has {blocks} blocks"):
            opt.policy = policy
