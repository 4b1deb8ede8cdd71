"""OpenSora 1.2: video latents from text, with a model and a sampler of one's own (folder ``opensora``), and with ToCa.

    python examples/opensora.py                                      # a small model with random weights
    python examples/opensora.py --model stdit3.safetensors --vae hpcai-tech/OpenSora-VAE-v1.2 --text text.safetensors

``--model`` holds a state dict of ``STDiT3`` at the published size, ``--text`` the text encoder's states: ``text`` and
``null_text``, ``[1, words, 4096]``, ``mask`` ``[1, words]``. ``--vae`` is loaded with diffusers' AutoencoderKL, frame
by frame, to make pictures; without it the latents are shown. Prints steps, FLOP and latency speed-up with their ratio,
PSNR to the uncached latents, cache memory.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from opensora.sampler import sample
from opensora.stdit3 import STDiT3
from rich.console import Console
from torch import Tensor

from toca_compile import optimize, preset
from toca_compile.quality.compare import Row, measure, print_table, write_pictures


def load(path: Path) -> STDiT3:
    """The published size with weights from a file."""
    from safetensors.torch import load_file

    model = STDiT3()
    model.load_state_dict(load_file(path))
    return model


def pictures(latents: Tensor, vae: str | None, device: str) -> Tensor:
    """The frames of the first video, ``[frames, height, width, 3]`` in [0, 1]."""
    frames = latents[0].transpose(0, 1)
    if vae is None:
        shown = frames[:, :3]
        low, high = shown.amin(), shown.amax()
        return ((shown - low) / (high - low)).permute(0, 2, 3, 1).cpu()
    from diffusers import AutoencoderKL

    decoder = AutoencoderKL.from_pretrained(vae).to(device).eval()
    with torch.no_grad():
        decoded = decoder.decode(frames / decoder.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu()


def main() -> None:
    """Compare, print, write pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="safetensors file of STDiT3")
    parser.add_argument("--text", type=Path, help="safetensors file of the text's states")
    parser.add_argument("--vae", help="model id or folder of an AutoencoderKL")
    parser.add_argument("--frames", type=int, default=15, help="latent frames")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lowering", default="inductor", help="eager: a quick look, nothing is compiled")
    parser.add_argument("--out", type=Path, default=Path("toca-opensora"))
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.model:
        from safetensors.torch import load_file

        model, size = load(given.model), (given.frames, 60, 106)
        words = load_file(given.text) if given.text else {}
    else:
        model, size, words = STDiT3(width=192, heads=3, depth=2, caption_channels=64), (4, 16, 24), {}
    model = model.eval().to(given.device)
    channels = model.y_embedder[0].in_features
    text, null = (words.get(n, torch.randn(1, 60, channels)).to(given.device) for n in ("text", "null_text"))
    mask = words["mask"].bool().to(given.device) if "mask" in words else None
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0)).to(given.device)

    def sampler(net: Any) -> Callable[[Callable[[], None]], Tensor]:
        def run(tick: Callable[[], None]) -> Tensor:
            def step(*args: Any, **kwargs: Any) -> Tensor:
                tick()
                return net(*args, **kwargs)

            return sample(step, noise, text, null, text_mask=mask, steps=given.steps)

        return run

    opt = optimize(model, preset("opensora-1.2/rflow-30", num_steps=given.steps), lowering=given.lowering)
    baseline: Any = torch.compile(model, dynamic=False) if given.lowering == "inductor" else model
    rows = [Row("uncached", sampler(baseline)), Row("ToCa rflow-30", sampler(opt), opt)]
    console = Console()
    measure(rows, repeats=given.repeats, device=given.device, ticks=given.steps, console=console)
    latents = [row.samples for row in rows if row.samples is not None]
    print_table(console, rows, peak=float(latents[0].amax() - latents[0].amin()))
    for row, made in zip(rows, latents, strict=True):
        row.samples = pictures(made, given.vae, given.device)
    write_pictures(given.out, rows)
    console.print(f"pictures: {given.out}/")


if __name__ == "__main__":
    main()
