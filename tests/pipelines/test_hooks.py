"""What diffusers and accelerate put around the layers of a pipeline's transformer: it works, or the hook is named, and
the model goes on as it would without us."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import toca_compile
from tests.pipelines import run
from tests.pipelines.builders import kinds, made, wan
from toca_compile import Fora, FullCompute, TocaError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
hooks = pytest.importorskip("diffusers.hooks")

Act = Callable[[Any], Any]
HERE = torch.device("cpu")


def stored_in_float8(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def by_blocks(pipe: Any) -> None:
    pytest.importorskip("accelerate")
    pipe.transformer.enable_group_offload(onload_device=HERE, offload_type="block_level", num_blocks_per_group=1)


def by_leaves(pipe: Any) -> None:
    pytest.importorskip("accelerate")
    pipe.transformer.enable_group_offload(onload_device=HERE, offload_type="leaf_level")


def both(pipe: Any) -> None:
    stored_in_float8(pipe)
    by_blocks(pipe)


def whole_models(pipe: Any) -> None:
    pytest.importorskip("accelerate")
    pipe.enable_model_cpu_offload(device="cpu")


def aligned(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate.hooks")
    accelerate.add_hook_to_module(
        pipe.transformer, accelerate.AlignDevicesHook(execution_device=HERE, io_same_device=True)
    )


WORKS: dict[str, tuple[str, Act]] = {
    "layerwise casting": ("FLUX", stored_in_float8),
    "group offload": ("SD3", by_blocks),
    "layerwise casting and group offload": ("FLUX", both),
    "model offload": ("SD3", whole_models),
    "aligned devices": ("PixArt-α", aligned),
}


@pytest.mark.parametrize("name", WORKS)
def test_hooks_that_work(name: str) -> None:
    pipeline, hook = WORKS[name]
    pipe, call = made(pipeline)
    hook(pipe)
    plain = run(pipe, call, 6)
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    assert torch.equal(run(pipe, call, 6), plain)
    assert kinds(pipe) == [["ffffff"]]
    pipe.transformer.policy = Fora(50, 3)
    first = run(pipe, call, 6)
    assert kinds(pipe) == [["frrfrr"]]
    assert not torch.equal(first, plain)
    assert torch.equal(run(pipe, call, 6), first)
    assert toca_compile.summary(pipe).recompiles == 0
    toca_compile.restore(pipe)
    assert torch.equal(run(pipe, call, 6), plain)


def test_layers_are_stored_as_before_between_calls() -> None:
    """The model has one graph, and its weights are never seen in the dtype in which it computes."""
    pipe, call = made("FLUX")
    stored_in_float8(pipe)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    forward = layer.forward
    toca_compile.optimize(pipe, Fora(50, 3), lowering="eager")
    run(pipe, call, 3)
    assert layer.forward is forward
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert toca_compile.summary(pipe).transformers["transformer"].graphs == 1


def test_a_hook_that_comes_after_the_first_call() -> None:
    pipe, call = made("FLUX")
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    run(pipe, call, 2)
    stored_in_float8(pipe)
    cached = run(pipe, call, 3)
    assert kinds(pipe) == [["fff"]]
    toca_compile.restore(pipe)
    assert torch.equal(cached, run(pipe, call, 3))


def time_of(pipe: Any) -> Callable[[], int]:
    return lambda: 500 if pipe._current_timestep is None else int(pipe._current_timestep)


def pyramid(pipe: Any) -> None:
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=time_of(pipe),
    )
    pipe.transformer.enable_cache(config)


def first_block(pipe: Any) -> None:
    pipe.transformer = wan(num_layers=2)
    pipe.transformer.enable_cache(hooks.FirstBlockCacheConfig(threshold=0.2))


def faster(pipe: Any) -> None:
    config = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=time_of(pipe),
        is_guidance_distilled=True,
        tensor_format="BCHW",
    )
    pipe.transformer.enable_cache(config)


def sequential(pipe: Any) -> None:
    pytest.importorskip("accelerate").cpu_offload(pipe.transformer, execution_device=HERE)


# The hook's name, and the remedy.
REFUSED: dict[str, tuple[str, Act, str, str]] = {
    "PyramidAttentionBroadcast": ("FLUX", pyramid, "PyramidAttentionBroadcastHook", "disable_cache()"),
    "FirstBlockCache": ("Wan", first_block, "FBCHeadBlockHook", "disable_cache()"),
    "FasterCache": ("FLUX", faster, "FasterCacheDenoiserHook", "disable_cache()"),
    "leaf offload": ("FLUX", by_leaves, "GroupOffloadingHook", "offload_type='block_level'"),
    "sequential offload": ("DiT", sequential, "AlignDevicesHook", "enable_model_cpu_offload()"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hooks_that_are_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, hook, called, remedy = REFUSED[name]
    pipe, call = made(pipeline)
    hook(pipe)
    plain = run(pipe, call, 4)
    toca_compile.optimize(pipe, Fora(50, 3), lowering="eager")
    with pytest.raises(TocaError) as error:
        run(pipe, call, 4)
    for part in (called, remedy, "strict=False"):
        assert part in str(error.value)
    assert "right module" not in str(error.value)
    toca_compile.optimize(pipe, Fora(50, 3), lowering="eager", strict=False)
    assert torch.equal(run(pipe, call, 4), plain)
    assert torch.equal(run(pipe, call, 4), plain)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("toca_compile")]
    assert len(said) == 1
    assert called in said[0]
    assert remedy in said[0]


def test_a_cache_of_diffusers_that_is_switched_off_again() -> None:
    pipe, call = made("FLUX")
    plain = run(pipe, call, 3)
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    pyramid(pipe)
    with pytest.raises(TocaError, match="PyramidAttentionBroadcastHook"):
        run(pipe, call, 3)
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe, call, 3), plain)
    assert kinds(pipe) == [["fff"]]
