"""PixArt-α (and Σ): pictures from text through diffusers' pipelines, uncached and with ToCa.

    python examples/pixart.py                                                   # a small model with random weights
    python examples/pixart.py --model PixArt-alpha/PixArt-XL-2-512x512 --device cuda --prompt "a small cactus"
    python examples/pixart.py --model PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --device cuda

Prints steps, FLOP and latency speed-up with their ratio, PSNR to the uncached pictures, cache memory.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from toca_compile import preset
from toca_compile.quality.compare import compare_pipeline


def offline() -> tuple[Any, dict[str, Any]]:
    """A pipeline of the same architecture, 256 tokens, random weights and text, and its call."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=4, in_channels=4, out_channels=8,
        cross_attention_dim=384, caption_channels=64, sample_size=32, use_additional_conditions=False,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pipe = PixArtAlphaPipeline(None, None, vae.eval(), transformer.eval(), DPMSolverMultistepScheduler())
    words, nothing, mask = torch.randn(1, 120, 64), torch.randn(1, 120, 64), torch.ones(1, 120)
    call = {
        "prompt_embeds": words, "prompt_attention_mask": mask, "negative_prompt": None, "height": 256, "width": 256,
        "negative_prompt_embeds": nothing, "negative_prompt_attention_mask": mask, "use_resolution_binning": False,
    }  # fmt: skip
    return pipe, call


def main() -> None:
    """Compare, print, write pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder, e.g. PixArt-alpha/PixArt-XL-2-512x512")
    parser.add_argument("--prompt", default="a small cactus with a happy face in the Sahara desert")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", default="inductor", help="eager: a quick look, nothing is compiled")
    parser.add_argument("--out", type=Path, default=Path("toca-pixart"))
    given = parser.parse_args()
    call: dict[str, Any]
    if given.model:
        dtype = torch.float32 if given.device == "cpu" else torch.float16
        load = PixArtSigmaPipeline if "sigma" in given.model.lower() else PixArtAlphaPipeline
        pipe, call = load.from_pretrained(given.model, torch_dtype=dtype), {"prompt": given.prompt}
    else:
        pipe, call = offline()
    pipe.to(given.device)
    policies = {"ToCa dpm-20": preset("pixart-alpha/dpm-20"), "ToCa dpm-20-n2": preset("pixart-alpha/dpm-20-n2")}
    compare_pipeline(
        pipe, call, policies, steps=given.steps, repeats=given.repeats, device=given.device, out=given.out,
        lowering=given.lowering,
    )  # fmt: skip


if __name__ == "__main__":
    main()
