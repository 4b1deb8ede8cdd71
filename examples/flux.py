"""FLUX.1: pictures from text through diffusers' FluxPipeline, uncached and with ToCa.

    python examples/flux.py                                                    # a small model with random weights
    python examples/flux.py --model black-forest-labs/FLUX.1-dev --device cuda --prompt "a cat in a library"

Prints steps, FLOP and latency speed-up with their ratio, PSNR to the uncached pictures, cache memory.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from toca_compile import preset
from toca_compile.quality.compare import compare_pipeline


def offline() -> tuple[Any, dict[str, Any]]:
    """A pipeline of the same architecture, 256 + 32 tokens, random weights and text, and its call."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=64, num_attention_heads=6,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24), guidance_embeds=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    parts = (None, None, None, None, transformer.eval())
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae.eval(), *parts)
    words, pooled = torch.randn(1, 32, 64), torch.randn(1, 64)
    return pipe, {"prompt_embeds": words, "pooled_prompt_embeds": pooled, "height": 256, "width": 256}


def main() -> None:
    """Compare, print, write pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder, e.g. black-forest-labs/FLUX.1-dev")
    parser.add_argument("--prompt", default="a cat reading in a library, afternoon light")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", default="inductor", help="eager: a quick look, nothing is compiled")
    parser.add_argument("--out", type=Path, default=Path("toca-flux"))
    given = parser.parse_args()
    call: dict[str, Any]
    if given.model:
        dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
        pipe = FluxPipeline.from_pretrained(given.model, torch_dtype=dtype)
        call = {"prompt": given.prompt, "guidance_scale": 3.5, "height": 1024, "width": 1024}
    else:
        pipe, call = offline()
    pipe.to(given.device)
    policies = {f"ToCa 50-n{n}": preset(f"flux-dev/50-n{n}") for n in ((4, 5, 6) if given.model else (4,))}
    compare_pipeline(
        pipe, call, policies, steps=given.steps, repeats=given.repeats, device=given.device, out=given.out,
        lowering=given.lowering,
    )  # fmt: skip


if __name__ == "__main__":
    main()
