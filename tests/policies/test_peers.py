"""Other libraries' settings do here what they do there: diffusers' own hooks on the same model are the oracle."""

import dataclasses
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    QwenImageTransformer2DModel,
    TaylorSeerCacheConfig,
)
from torch import Tensor

import toca_compile
from tests.models import PlainDiT
from toca_compile import FullCompute, PolicyError, preset
from toca_compile.policies import BlockCache, Composition, Level, Listed, SkipBlocks, TaylorSeer, from_dict
from toca_compile.policies.composition import Rule
from toca_compile.policies.given import checked_policy
from toca_compile.policies.peers import PEERS, Peer

STEPS = 10


def small_model() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


@torch.no_grad()
def sampled(model: Any) -> list[Tensor]:
    """Outputs of a run whose latents follow from them, as a sampler's do."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 4, generator=generator)
    text, mask = torch.randn(1, 5, 12, generator=generator), torch.ones(1, 5, dtype=torch.long)
    outputs = []
    for call in range(STEPS):
        time = torch.tensor([1.0 - call / STEPS])
        with model.cache_context("cond"):
            outputs.append(model(x, text, mask, time, img_shapes=[(1, 4, 4)], return_dict=False)[0].clone())
        x = x - 0.3 * outputs[-1]
    return outputs


def test_the_same_as_in_diffusers() -> None:
    uncached, opt = sampled(small_model()), toca_compile.optimize(small_model(), FullCompute(), lowering="eager")
    for config in (
        FirstBlockCacheConfig(0.4),
        FirstBlockCacheConfig(0.8),
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32),
        TaylorSeerCacheConfig(cache_interval=5, max_order=2, taylor_factors_dtype=torch.float32),
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32),
        MagCacheConfig(0.3, 3, 0.2, STEPS, np.linspace(1.1, 0.8, STEPS)),
        MagCacheConfig(0.06, 2, 0.0, STEPS, np.array([1.0, 1.2, 1.02, 0.99, 0.98, 0.9])),
    ):
        peer = small_model()
        peer.enable_cache(deepcopy(config))
        theirs = sampled(peer)
        opt.policy = from_dict(asked(config, num_inference_steps=STEPS))
        ours = sampled(opt)
        assert any((a - b).abs().max() > 1e-4 for a, b in zip(theirs, uncached, strict=True))  # something was cached
        for call, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            what = f"{config}, call {call}"
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, what=what: f"{what}: {text}")


def asked(config: Any, **more: Any) -> dict[str, Any]:
    return {**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, **more}


def test_a_configuration_object_is_a_policy() -> None:
    config = FirstBlockCacheConfig(0.3)
    assert checked_policy(config) == BlockCache(50, 1, threshold=0.3)
    model = toca_compile.enable_cache(PlainDiT(depth=2), config, lowering="eager")
    assert toca_compile.controls(model).policy == BlockCache(50, 1, threshold=0.3)
    assert checked_policy({"policy": "Level", "name": "fast"}) == Level("fast")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"threshold": 0.1, "num_inference_steps": 20}, BlockCache(20, 1, threshold=0.1)),
        (
            {"cache_config": {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.12, "max_warmup_steps": 4,
                              "max_continuous_cached_steps": 2, "enable_taylorseer": True, "taylorseer_order": 2,
                              "enable_separate_cfg": True}},
            BlockCache(50, 1, 0, threshold=0.12, warmup=4, limit=2, order=2),
        ),
        ({"cache_type": "DBCache"}, BlockCache(50, 8, threshold=0.08, warmup=8)),
        (
            {"Fn_compute_blocks": 1, "steps_computation_mask": [1, 1, 0, 1, 0], "steps_computation_policy": "static"},
            Composition(5, Listed((0, 1, 3)), (Rule(SkipBlocks(1)),)),
        ),
        ({"interval": 5, "max_order": 2, "num_sampling_steps": 30}, TaylorSeer(30, 5, 2, warmup=2)),
        (
            {"--fresh-threshold": 3, "--fresh-ratio": 0.07, "--ratio-scheduler": "ToCa-ddim50", "--force-fresh": "global",
             "--soft-fresh-weight": 0.25, "--cache-type": "attention", "--num-sampling-steps": 50},
            preset("dit-xl-2/ddim-50"),
        ),
        ({"ratio_scheduler": "ToCa-ddpm250", "fresh_threshold": 4, "num_steps": 250}, preset("dit-xl-2/ddpm-250")),
        ({"ratio_scheduler": "ToCa", "fresh_ratio": 0.3, "num_steps": 20}, preset("pixart-alpha/dpm-20")),
    ],
)  # fmt: skip
def test_fields_of_other_libraries(given: dict[str, Any], meant: Any) -> None:
    assert from_dict(given) == meant


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"warmup_interval": 2}, "DBCacheConfig: warmup_interval has no counterpart here and must be 1, not 2"),
        ({"max_cached_steps": 8}, "max_cached_steps has no counterpart"),
        ({"steps_computation_mask": "fast"}, "steps_computation_mask must be a tuple or list"),
        ({"steps_computation_mask": [1, 0]}, "steps_computation_policy must be 'static'"),
        ({"steps_computation_mask": [0, 1], "steps_computation_policy": "static"}, "full must rise from 0"),
        ({"max_continuous_cached_steps": 0}, r"FullCompute\(\)"),
        ({"cache_type": "DBPrune"}, "cache_type must be one of DBCache"),
        ({"residual_diff_threshold": -1}, "residual_diff_threshold must be a number above 0"),
        ({"cache_interval": 4, "use_lite_mode": True}, r"BlockCache\(first=0"),
        ({"Fn_compute_blocks": 1, "Fn": 2}, "DBCacheConfig has no field 'Fn'"),
        ({"ratio_scheduler": "linear"}, "ratio_scheduler must be one of"),
        ({"threshold": 0.1, "num_inference_steps": 0}, "num_inference_steps must be a whole number from 1"),
        ({"lowering": "eager"}, "no policy"),
        ({"threshold": 0.1, "max_skip_steps": 3}, r"mag_ratios must be given: toca_compile.magnitudes"),
        ({}, "no policy"),
    ],
)
def test_what_has_no_counterpart_is_said(given: dict[str, Any], why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        from_dict(given)


def test_an_object_without_a_counterpart_names_what_is_near() -> None:
    with pytest.raises(PolicyError, match=r"PyramidAttentionBroadcastConfig has no counterpart here: Composition"):
        checked_policy(PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2))


def test_a_field_of_a_later_version_at_its_default_changes_nothing() -> None:
    later = dataclasses.make_dataclass("FirstBlockCacheConfig", [("threshold", float, 0.05), ("sharper", bool, False)])
    assert checked_policy(later(0.2)) == BlockCache(50, 1, threshold=0.2)
    with pytest.raises(PolicyError, match="sharper is not known here and has been set"):
        checked_policy(later(0.2, True))


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__)
def test_defaults_make_a_policy_that_can_be_saved(peer: type[Peer]) -> None:
    """What a configuration means is one of this package's policies, and its exceptions name fields that it has."""
    needed: dict[str, Any] = {"mag_ratios": (1.0, 0.9)} if peer.__name__ == "MagCacheConfig" else {}
    policy = peer(**needed).policy(20)
    assert checked_policy(policy) is policy
    assert peer.without.keys() <= {field.name for field in dataclasses.fields(peer)}
