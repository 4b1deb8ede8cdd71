"""Small diffusers pipelines with random weights; prompt embeddings are given, so there is no text encoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models import diffusers_dit, randomize

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}


def vae(channels: int, scale: int = 1) -> Any:
    """A tiny autoencoder with ``channels`` latent channels that shrinks pictures by 2 for each step of ``scale``."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=[8] * (scale + 1), norm_num_groups=4, latent_channels=channels, sample_size=16,
        layers_per_block=1, down_block_types=["DownEncoderBlock2D"] * (scale + 1),
        up_block_types=["UpDecoderBlock2D"] * (scale + 1), shift_factor=0.1, scaling_factor=0.5,
    ).eval()  # fmt: skip


def pixart(additional: bool = False, depth: int = 2, sample: int = 8, seed: int = 0) -> Any:
    """A small ``PixArtTransformer2DModel``."""
    from diffusers import PixArtTransformer2DModel

    # Resolution and aspect ratio are embedded in a third of the width each.
    settings = HEADS | {"num_layers": depth, "attention_head_dim": 12 if additional else 8}
    model = PixArtTransformer2DModel(
        **settings, in_channels=4, out_channels=8, cross_attention_dim=24 if additional else 16, caption_channels=12, sample_size=sample,
        norm_num_groups=1, use_additional_conditions=additional,
    )  # fmt: skip
    return randomize(model, seed)


def flux(double: int = 1, single: int = 1, seed: int = 0, guidance: bool = False) -> Any:
    """A small ``FluxTransformer2DModel``."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=double, num_single_layers=single, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance,
    )  # fmt: skip
    return randomize(model, seed)


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the arguments of a call, apart from the number of steps and the generator."""
    import diffusers as d

    embeds = torch.Generator().manual_seed(7)

    def words(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=embeds)

    call: dict[str, Any] = {"output_type": "latent", "return_dict": False}
    if name == "DiTPipeline":
        pipe = d.DiTPipeline(diffusers_dit(depth=1, num_embeds_ada_norm=1000), vae(2, 0), d.DDIMScheduler())
        call = {"class_labels": [1, 2], "output_type": "np", "return_dict": False}
    elif name.startswith("PixArt"):
        text = {"prompt_embeds": words(1, 5, 12), "prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
        text |= {"negative_prompt_embeds": words(1, 5, 12), "negative_prompt_attention_mask": torch.ones(1, 5)}
        parts = (None, None, vae(4, 1), pixart(depth=1), d.DPMSolverMultistepScheduler())
        pipe = getattr(d, name)(*parts)
        call |= text | {
            "prompt": None,
            "negative_prompt": None,
            "height": 16,
            "width": 24,
            "use_resolution_binning": False,
        }
    elif name.startswith("Flux"):
        scheduler = d.FlowMatchEulerDiscreteScheduler()
        pipe = getattr(d, name)(scheduler, vae(4, 1), None, None, None, None, flux())
        call |= {"prompt_embeds": words(1, 5, 12), "pooled_prompt_embeds": words(1, 12), "height": 16, "width": 24}
        if "Img2Img" in name:
            call |= {"image": torch.rand(1, 3, 16, 24), "strength": 0.6}
    elif name == "LattePipeline":
        model = d.LatteTransformer3DModel(
            **HEADS, in_channels=4, out_channels=8, sample_size=8, patch_size=2, attention_bias=True,
            activation_fn="gelu-approximate", norm_type="ada_norm_single", norm_elementwise_affine=False,
            caption_channels=8, video_length=3,
        )  # fmt: skip
        pipe = d.LattePipeline(None, None, vae(4, 1), randomize(model), d.DDIMScheduler())
        call |= {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": words(1, 5, 8),
            "negative_prompt_embeds": words(1, 5, 8),
        }
        call |= {"height": 16, "width": 16, "video_length": 3, "mask_feature": False, "clean_caption": False}
    else:
        model = d.SD3Transformer2DModel(
            **HEADS | {"num_layers": 2}, sample_size=8, patch_size=2, in_channels=4, joint_attention_dim=12,
            caption_projection_dim=16, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=16,
        )  # fmt: skip
        parts = (randomize(model), d.FlowMatchEulerDiscreteScheduler(), vae(4, 1), *[None] * 8)
        pipe = d.StableDiffusion3Pipeline(*parts)
        call |= {f"{n}prompt_embeds": words(1, 5, 12) for n in ("", "negative_")}
        call |= {f"{n}pooled_prompt_embeds": words(1, 12) for n in ("", "negative_")} | {"height": 16, "width": 24}
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def run(pipe: Any, call: dict[str, Any], steps: int, **more: Any) -> Any:
    """What the pipeline makes with one seed."""
    out = pipe(**call | more, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))[0]
    return torch.as_tensor(out)


NAMES = (
    "DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline", "FluxPipeline", "FluxImg2ImgPipeline",
    "LattePipeline", "StableDiffusion3Pipeline",
)  # fmt: skip
Build = Callable[[str], tuple[Any, dict[str, Any]]]
