"""Other libraries' caches on the shipped model, through their public calls: rows of ``quality.py``.

Each peer works on a copy of the model. Its FLOPs are counted in one uncompiled sampling, as the share of attention and
feed-forward layers that ran.
"""

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


class Peer:
    """A model with somebody else's cache: called as the model, ``reset`` before each sampling."""

    def __init__(self, model: nn.Module, flop_speedup: float, reset: Callable[[], None], *, compiled: bool) -> None:
        self.model, self.flop_speedup, self.reset = model, flop_speedup, reset
        self.config = model.config
        self.call = torch.compile(model, dynamic=False) if compiled else model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _in_context(self.model):
            return self.call(*args, **kwargs)


def peers(model: Any, sampler: Callable[..., Any], steps: int, *, compiled: bool) -> dict[str, Callable[[], Peer]]:
    """Rows by name. What is not installed is left out."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
    from diffusers.hooks import (
        apply_first_block_cache,
        apply_mag_cache,
        apply_pyramid_attention_broadcast,
        apply_taylorseer_cache,
    )

    def diffusers(apply: Callable[..., Any], config: Callable[[Any], Any]) -> Callable[[], Peer]:
        def make() -> Peer:
            net = copy.deepcopy(model)
            apply(net, config(net))
            return _counted(net, sampler, steps, lambda: _reset_hooks(net), compiled=compiled)

        return make

    blocks = [r"transformer_blocks\.\d+\.(attn1|ff)"]

    def first_block(threshold: float) -> Callable[[Any], Any]:
        return lambda _: FirstBlockCacheConfig(threshold=threshold)

    def taylor(interval: int, order: int) -> Callable[[Any], Any]:
        return lambda _: TaylorSeerCacheConfig(
            cache_interval=interval, max_order=order, disable_cache_before_step=3, cache_identifiers=blocks,
            taylor_factors_dtype=torch.float32,
        )  # fmt: skip

    def mag_cache(threshold: float) -> Callable[[Any], Any]:
        return lambda _: MagCacheConfig(
            threshold=threshold, max_skip_steps=4, num_inference_steps=steps, mag_ratios=ratios(),
        )  # fmt: skip

    @functools.cache
    def ratios() -> list[float]:
        return _mag_ratios(model, sampler, steps)

    rows = {f"diffusers FirstBlockCache {t}": diffusers(apply_first_block_cache, first_block(t)) for t in (0.05, 0.1)}
    rows |= {
        f"diffusers TaylorSeer o{order} N={n}": diffusers(apply_taylorseer_cache, taylor(n, order))
        for n, order in ((4, 1), (3, 2), (5, 2))
    }
    rows |= {f"diffusers MagCache {t}": diffusers(apply_mag_cache, mag_cache(t)) for t in (0.06,)}
    rows["diffusers PAB 2"] = diffusers(
        apply_pyramid_attention_broadcast,
        lambda net: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_block_identifiers=("transformer_blocks",),
            spatial_attention_timestep_skip_range=(0, 1000), current_timestep_callback=lambda: net.timestep_now,
        ),
    )  # fmt: skip
    return rows | _cache_dit(model, sampler, steps, compiled=compiled)


def _cache_dit(
    model: Any, sampler: Callable[..., Any], steps: int, *, compiled: bool
) -> dict[str, Callable[[], Peer]]:  # fmt: skip
    try:
        import cache_dit
        from cache_dit.caching.cache_blocks import pattern_3_4_5
    except ImportError:
        return {}
    # DiT's last layer reads the first block's embedding, which the library's stand-in for the blocks does not have.
    pattern_3_4_5.CachedBlocks_Pattern_3_4_5.norm1 = property(lambda self: self.transformer_blocks[0].norm1)

    def row(threshold: float, order: int) -> Callable[[], Peer]:
        def make() -> Peer:
            net = copy.deepcopy(model)
            # One first block, and at most four cached steps in a row.
            config = cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=4,
                max_continuous_cached_steps=4, num_inference_steps=steps,
            )  # fmt: skip
            adapter = cache_dit.BlockAdapter(
                transformer=net, blocks=net.transformer_blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_3,
                has_separate_cfg=False,
            )  # fmt: skip
            calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
            cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)

            def reset() -> None:
                cache_dit.refresh_context(net, num_inference_steps=steps)

            return _counted(net, sampler, steps, reset, compiled=compiled)

        return make

    cases = ((0.1, 0), (0.1, 1))
    return {f"cache-dit DBCache {t}" + (f" Taylor{o}" if o else ""): row(t, o) for t, o in cases}


def _reset_hooks(net: Any) -> None:
    """What a pipeline does between two samplings."""
    from diffusers.hooks import HookRegistry

    HookRegistry.check_if_exists_or_initialize(net).reset_stateful_hooks(recurse=True)


def _in_context(net: Any) -> AbstractContextManager[None]:
    """What a pipeline opens around the model; this model's class has no such method of its own."""
    from diffusers import CacheMixin

    context: AbstractContextManager[None] = CacheMixin.cache_context(net, "run")
    return context


def _counted(
    net: Any, sampler: Callable[..., Any], steps: int, reset: Callable[[], None], *, compiled: bool
) -> Peer:  # fmt: skip
    """One sampling with a counter on every attention and feed-forward layer."""
    net.timestep_now = 999
    net.register_forward_pre_hook(_note_timestep, with_kwargs=True)
    ran, weights, handles = [0.0], 0.0, []
    tokens = (net.config.sample_size // net.config.patch_size) ** 2
    for block in net.transformer_blocks:
        width = block.attn1.to_q.in_features
        # Multiply-adds a token: four projections and two products; two linear layers of four times the width.
        for layer, cost in ((block.attn1.to_q, 4 * width**2 + 2 * tokens * width), (block.ff.net[2], 8 * width**2)):
            weights += cost
            handles.append(layer.register_forward_hook(lambda *_, cost=cost: ran.__setitem__(0, ran[0] + cost)))
    reset()
    sampler(Peer(net, 1.0, reset, compiled=False), steps, 7, 4)
    for handle in handles:
        handle.remove()
    return Peer(net, steps * weights / ran[0], reset, compiled=compiled)


def _note_timestep(net: Any, args: Any, kwargs: Any) -> None:
    net.timestep_now = int(kwargs["timestep"].flatten()[0])


def _mag_ratios(model: Any, sampler: Callable[..., Any], steps: int) -> list[float]:
    """One calibration sampling; the ratios that MagCache logs."""
    import logging
    import re

    from diffusers import MagCacheConfig
    from diffusers.hooks import apply_mag_cache

    net, said = copy.deepcopy(model), []

    class Listen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = logging.getLogger("diffusers.hooks.mag_cache")
    logger.addHandler(Listen())
    logger.setLevel(logging.INFO)
    apply_mag_cache(net, MagCacheConfig(calibrate=True, num_inference_steps=steps))
    _reset_hooks(net)
    sampler(Peer(net, 1.0, lambda: None, compiled=False), steps, 7, 4)
    found = re.search(r"\[[-\d., e]+\]", " ".join(said))
    assert found is not None, said
    return [float(x) for x in found.group()[1:-1].split(",")]
