"""DiT-XL/2: class-conditional pictures through diffusers' DiTPipeline, uncached and with ToCa.

    python examples/dit_xl2.py                                              # a small model with random weights
    python examples/dit_xl2.py --model facebook/DiT-XL-2-256 --device cuda  # the published weights, pictures in --out

Prints steps, FLOP and latency speed-up with their ratio, PSNR to the uncached pictures, cache memory.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from toca_compile import Fora, preset
from toca_compile.quality.compare import compare_pipeline


def offline() -> Any:
    """A pipeline of the same architecture, 256 tokens, random weights."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=4, patch_size=2,
        sample_size=32, num_embeds_ada_norm=1000, attention_bias=True, activation_fn="gelu-approximate",
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=32)
    return DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())


def main() -> None:
    """Compare, print, write pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder, e.g. facebook/DiT-XL-2-256")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", default="inductor", help="eager: a quick look, nothing is compiled")
    parser.add_argument("--out", type=Path, default=Path("toca-dit"))
    given = parser.parse_args()
    if given.model:
        dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
        pipe = DiTPipeline.from_pretrained(given.model, torch_dtype=dtype)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    else:
        pipe = offline()
    pipe.to(given.device)
    policies: dict[str, Any] = {"ToCa ddim-50": preset("dit-xl-2/ddim-50"), "FORA N=3": Fora(interval=3)}
    call = {"class_labels": [207], "guidance_scale": 1.5}
    compare_pipeline(
        pipe, call, policies, steps=given.steps, repeats=given.repeats, device=given.device, out=given.out,
        lowering=given.lowering,
    )  # fmt: skip


if __name__ == "__main__":
    main()
