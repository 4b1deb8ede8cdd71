"""diffusers models and pipelines, unmodified."""

from typing import Any

import numpy as np
import pytest
import torch

import toca_compile
from tests.models import diffusers_dit
from tests.runs import both_ways
from toca_compile import FullCompute, ToCa
from toca_compile.ir.signature import Signature
from toca_compile.policies import Anchors, Composition, EndAligned, Foca, Planned, Rule, SkipBlocks
from toca_compile.runtime.facts import facts_of

diffusers = pytest.importorskip("diffusers")


def pipeline(transformer: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8], norm_num_groups=4, latent_channels=2, sample_size=8, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"],
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, vae.eval(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, steps: int = 10) -> Any:
    return pipe([1, 2], num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np").images


@pytest.fixture
def transformer() -> Any:
    return diffusers_dit(sample_size=8, num_embeds_ada_norm=1000)


def test_in_the_dit_pipeline(transformer: Any) -> None:
    plain = latents(pipeline(transformer))
    opt = toca_compile.optimize(transformer, FullCompute(), lowering="eager")
    assert (latents(pipeline(opt)) == plain).all()
    assert len(opt.steps) == 10
    opt = toca_compile.optimize(transformer, ToCa(num_steps=10, interval=3, fresh_ratio=0.3), lowering="eager")
    pipe = pipeline(transformer)
    pipe.transformer = opt
    first, second = latents(pipe), latents(pipe)
    assert (first == second).all()
    assert not (first == plain).all()
    assert opt.config.num_layers == 2
    assert opt.dtype is torch.float32


def test_guidance_halves_are_selected_apart(transformer: Any) -> None:
    """The halves of a guidance pair ride in one batch; each selects its own tokens."""
    opt = toca_compile.optimize(transformer, ToCa(num_steps=4, fresh_ratio=0.4, schedule="constant"), lowering="eager")
    x = torch.randn(1, 2, 8, 8).expand(2, -1, -1, -1)
    with torch.no_grad():
        for t in (900, 800):
            opt(x, timestep=torch.full((2,), t), class_labels=torch.tensor([1, 1000]))
    masks = torch.stack([m for n, m in opt.fresh_tokens().items() if "ff" in n])
    assert masks.sum(-1).unique().tolist() == [6]
    assert not torch.equal(masks[:, 0], masks[:, 1])


KW = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
OTHERS: dict[str, Any] = {
    "PixArtTransformer2DModel": (
        {**KW, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8,
         "norm_num_groups": 1, "use_additional_conditions": False},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 7, 12), "timestep": (2,), "encoder_attention_mask": (2, 7)},
        {"self_attention": 2, "cross_attention": 2, "mlp": 2},
    ),
    "SD3Transformer2DModel": (
        {**KW, "sample_size": 8, "patch_size": 2, "in_channels": 4, "joint_attention_dim": 12,
         "caption_projection_dim": 16, "pooled_projection_dim": 12, "out_channels": 4, "pos_embed_max_size": 8},
        {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 6, 12), "pooled_projections": (2, 12), "timestep": (2,)},
        {"joint_attention": 3, "mlp": 3},
    ),
    "FluxTransformer2DModel": (
        {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 12, "axes_dims_rope": [2, 2, 4]},
        {"hidden_states": (2, 16, 4), "encoder_hidden_states": (2, 6, 12), "pooled_projections": (2, 12),
         "timestep": (2,), "img_ids": (16, 3), "txt_ids": (6, 3)},
        {"joint_attention": 4, "mlp": 4, "parallel": 2},
    ),
    "HunyuanDiT2DModel": (
        {**KW, "num_layers": 4, "sample_size": 8, "patch_size": 2, "in_channels": 4, "cross_attention_dim": 8,
         "cross_attention_dim_t5": 8, "pooled_projection_dim": 4, "hidden_size": 16, "activation_fn": "gelu-approximate",
         "text_len": 4, "text_len_t5": 4},
        {"hidden_states": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 4, 8), "text_embedding_mask": (2, 4),
         "encoder_hidden_states_t5": (2, 4, 8), "text_embedding_mask_t5": (2, 4), "image_meta_size": (2, 6), "style": "zeros",
         "image_rotary_emb": "rope"},
        {"self_attention": 4, "cross_attention": 4, "mlp": 4},
    ),
    "WanTransformer3DModel": (
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
         "text_dim": 8, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32},
        {"hidden_states": (2, 4, 2, 8, 8), "encoder_hidden_states": (2, 5, 8), "timestep": (2,)},
        {"self_attention": 2, "cross_attention": 2, "mlp": 2},
    ),
    "LatteTransformer3DModel": (
        {**KW, "in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2, "attention_bias": True,
         "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
         "caption_channels": 8, "video_length": 4},
        {"hidden_states": (2, 4, 4, 8, 8), "encoder_hidden_states": (2, 5, 8), "timestep": (2,)},
        {"self_attention": 4, "mlp": 4},
    ),
}  # fmt: skip


def arguments(spec: dict[str, Any], i: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(i)
    constant = torch.Generator().manual_seed(0)
    out: dict[str, Any] = {}
    for name, shape in spec.items():
        if name == "timestep":
            out[name] = torch.full(shape, 900.0 - 100 * i)
        elif shape == "zeros":
            out[name] = torch.zeros(2, dtype=torch.long)
        elif shape == "rope":
            out[name] = [torch.ones(16, 8), torch.zeros(16, 8)]
        elif "mask" in name:
            out[name] = torch.ones(shape)
        else:
            out[name] = torch.randn(shape, generator=generator if name == "hidden_states" else constant)
    return out


@pytest.mark.parametrize("name", list(OTHERS))
def test_models_nobody_prepared(name: str) -> None:
    """Other architectures through the same analysis: sound, and with the sites one would name by hand."""
    config, spec, kinds = OTHERS[name]
    model = getattr(diffusers, name)(**config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    extra: dict[str, Any] = {"return_dict": False}
    if "PixArt" in name:
        extra["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    policy = ToCa(num_steps=5, interval=3, fresh_ratio=0.3, schedule="constant")
    opt = toca_compile.optimize(model, policy, lowering="eager")
    with torch.no_grad():
        runs = both_ways(opt, lambda opt: [opt(**arguments(spec, i), **extra)[0] for i in range(5)])
        torch.testing.assert_close(runs[0][0], model(**arguments(spec, 0), **extra)[0], rtol=0, atol=0)
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)
    found = [s.kind for s in toca_compile.explain(opt).sites]
    assert {k: found.count(k) for k in sorted(set(found))} == dict(sorted(kinds.items()))


def test_a_scheduler_is_told_with_what_makes_it_add_noise(transformer: Any) -> None:
    told = []

    class Asking(FullCompute):
        def for_call(self, call: Signature) -> Any:
            told.append((call.sampler, call.prediction))
            return FullCompute()

    pipe = toca_compile.optimize(pipeline(transformer), Asking(), lowering="eager")
    for kind, settings in ((diffusers.DDIMScheduler, {}), (diffusers.DPMSolverMultistepScheduler, {}),
                           (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"})):  # fmt: skip
        pipe.scheduler = kind(**settings)
        latents(pipe, 2)
    names = ["DDIMScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler sde-dpmsolver++"]
    assert list(dict.fromkeys(told)) == [(name, "epsilon") for name in names]


def test_a_pipeline_tells_by_how_much_its_scheduler_moves(transformer: Any) -> None:
    def corrected(steps: int, *moves: float) -> Composition:
        do = Anchors(Foca(), 3, correct=0.5, moves=moves)
        return Composition(steps, EndAligned(3, 2), (Rule(SkipBlocks(do=do)),))

    pipe = toca_compile.optimize(pipeline(transformer), corrected(10), lowering="eager")
    found = latents(pipe)
    moves = facts_of(pipe.scheduler, 10).moves
    assert moves is not None
    handle: Any = pipe.transformer
    handle.policy = corrected(10, *moves)
    assert np.array_equal(latents(pipe), found)
    plan = Planned(10, corrected(10).full_steps(), Foca(), correct=0.5, made_for=Signature(moves=moves))
    handle.policy = plan
    assert np.array_equal(latents(pipe), found)
    handle.policy = corrected(50)  # as long as the call is
    assert np.array_equal(latents(pipe), found)
    handle.policy = corrected(10, *[1.0] * 10)
    assert not np.allclose(latents(pipe), found, atol=1e-4)
