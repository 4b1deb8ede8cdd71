"""The four systems of the paper: whole samplings, compiled baseline against optimised, side by side in one run.

    python benchmarks/paper_systems.py                        # CPU: token counts of the paper, reduced width or depth
    python benchmarks/paper_systems.py --systems pixart flux
    python benchmarks/paper_systems.py --device cuda          # full size, bfloat16, random weights
    python benchmarks/paper_systems.py --bounds               # FLOPs at full size, which bound the speed-up

The latents move by an Euler step along the model's output, so that scores and selections are those of changing values.
Results go to ``benchmarks/results/paper_systems[-cuda].{json,md}``.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
from common import begun, dit, interleaved, save
from torch import Tensor

import toca_compile
from toca_compile import ToCa, preset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.opensora.stdit3 import STDiT3

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class System:
    """A model, what it is called with beside the latents and the timestep, and how it was reduced. Functions that make
    one take the device and, where it is not the usual, the number of ``blocks`` of each kind."""

    name: str
    size: str
    model: Any
    latents: Tensor
    call: Callable[[Any, Tensor, Tensor], Tensor]
    policies: dict[str, ToCa]


def system_dit(device: str, blocks: int | None = None) -> System:
    """DiT-XL/2 at 256²: 256 tokens, a guidance pair."""
    depth, dtype = (28, torch.bfloat16) if device != "cpu" else (4, torch.float32)
    depth = blocks or depth
    labels = torch.tensor([1, 1000], device=device)

    def call(model: Any, x: Tensor, t: Tensor) -> Tensor:
        return model(x, timestep=t, class_labels=labels).sample[:, :4]

    latents = torch.randn(2, 4, 32, 32, device=device, dtype=dtype)
    policies = {name: preset(f"dit-xl-2/{name}") for name in ("ddim-50", "ddpm-250")}
    size = f"width 1152, depth {depth}, 256 tokens"
    return System("DiT-XL/2", size, dit(1152, depth, 32, device, dtype), latents, call, policies)


def calling_pixart(text: Tensor, mask: Tensor) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """How a PixArt is called with this text."""
    extra: dict[str, Any] = {"resolution": None, "aspect_ratio": None}

    def call(model: Any, x: Tensor, t: Tensor) -> Tensor:
        out = model(
            x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask, added_cond_kwargs=extra,
        )  # fmt: skip
        return out.sample[:, :4]

    return call


def system_pixart(device: str, blocks: int | None = None) -> System:
    """PixArt-α at 256² (on a GPU 1024²), text of 120 words, a guidance pair."""
    from diffusers import PixArtTransformer2DModel

    depth, side, dtype = (28, 128, torch.bfloat16) if device != "cpu" else (4, 32, torch.float32)
    depth = blocks or depth
    torch.manual_seed(0)
    model: Any = PixArtTransformer2DModel(
        num_layers=depth, sample_size=side, caption_channels=4096, use_additional_conditions=False
    )
    text = torch.randn(2, 120, 4096, device=device, dtype=dtype)
    call = calling_pixart(text, torch.ones(2, 120, device=device))
    latents = torch.randn(2, 4, side, side, device=device, dtype=dtype)
    policies = {name: preset(f"pixart-alpha/{name}") for name in ("dpm-20", "dpm-20-n2")}
    size = f"width 1152, depth {depth}, {side * side // 4} tokens"
    return System("PixArt-α", size, model.eval().to(device, dtype), latents, call, policies)


def system_opensora(device: str, blocks: int | None = None) -> System:
    """OpenSora 1.2 at 480p, 51 frames: 15 × 30 × 53 tokens, text of 300 words, a guidance pair."""
    width, heads, depth, dtype = (1152, 16, 28, torch.bfloat16) if device != "cpu" else (288, 4, 2, torch.float32)
    depth = blocks or depth
    torch.manual_seed(0)
    model: Any = STDiT3(width=width, heads=heads, depth=depth)
    text = torch.randn(2, 300, 4096, device=device, dtype=dtype)
    fps = torch.full((2,), 24.0, device=device)

    def call(model: Any, x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, text, fps=fps)[:, :4]

    latents = torch.randn(2, 4, 15, 60, 106, device=device, dtype=dtype)
    size = f"width {width}, depth {depth} + {depth}, 23850 tokens"
    policies = {"rflow-30": preset("opensora-1.2/rflow-30")}
    return System("OpenSora 1.2", size, model.eval().to(device, dtype), latents, call, policies)


def system_flux(device: str, blocks: int | None = None) -> System:
    """FLUX.1-dev at 1024²: 4096 tokens of the picture and 512 of the text."""
    from diffusers import FluxTransformer2DModel

    heads, double, single, dtype = (24, 19, 38, torch.bfloat16) if device != "cpu" else (3, 2, 4, torch.float32)
    double, single = blocks or double, blocks or single
    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel(
        num_attention_heads=heads, num_layers=double, num_single_layers=single, guidance_embeds=True
    )
    text, pooled = torch.randn(1, 512, 4096, dtype=dtype), torch.randn(1, 768, dtype=dtype)
    ids = torch.zeros(64, 64, 3)
    ids[..., 1], ids[..., 2] = torch.arange(64)[:, None], torch.arange(64)[None]
    img_ids, txt_ids, guidance = ids.flatten(0, 1), torch.zeros(512, 3), torch.full((1,), 3.5)
    latents = torch.randn(1, 4096, 64, dtype=dtype)

    def call(model: Any, x: Tensor, t: Tensor) -> Tensor:
        return model(
            hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t / 1000,
            img_ids=img_ids, txt_ids=txt_ids, guidance=guidance, return_dict=False,
        )[0]  # fmt: skip

    size = f"width {128 * heads}, depth {double} + {single}, 4608 tokens"
    policies = {name: preset(f"flux-dev/{name}") for name in ("50-n4", "50-n6")}
    policies |= {"50-n4, score_stride=16": preset("flux-dev/50-n4", score_stride=16)}
    return System("FLUX.1-dev", size, model.eval().to(dtype), latents, call, policies)


SYSTEMS = {"dit": system_dit, "pixart": system_pixart, "opensora": system_opensora, "flux": system_flux}


def sample(system: System, model: Any, steps: int) -> Tensor:
    """A whole sampling by Euler steps."""
    x = system.latents
    for t in begun(model, 1000.0 * (1 - torch.arange(steps, device=x.device) / steps)):
        x = x - system.call(model, x, t.expand(len(x))) / steps
    return x


def measure(system: System, repeats: int, device: str) -> Rows:
    """One row a policy; the baseline is the same model compiled whole by the same Inductor."""
    torch._dynamo.reset()
    baseline = torch.compile(system.model, dynamic=False)
    sample(system, baseline, 2)
    rows: Rows = []
    opt: Any = toca_compile.optimize(system.model, next(iter(system.policies.values())))
    for name, policy in system.policies.items():
        opt.policy = policy
        sample(system, opt, policy.num_steps)  # compiles every variant
        cache = opt.cache_bytes
        calls: dict[Any, Any] = {"baseline": bind(sample, system, baseline, policy.num_steps)}
        calls |= {"opt": bind(sample, system, opt, policy.num_steps)}
        median = interleaved(calls, repeats, device)
        report = toca_compile.explain(opt)
        clock, flops = median["baseline"] / median["opt"], report.flop_speedup()
        rows.append(
            {
                "system": system.name,
                "size": system.size,
                "policy": name,
                "FLOP speed-up": flops,
                "latency speed-up": clock,
                "ratio": clock / flops,
                "target": 0.85 if device != "cpu" else 0.92,
                "cache MB": cache / 2**20,
                "baseline s": median["baseline"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def bounds() -> Rows:
    """FLOP speed-up of each preset at the published size, traced without weights: what no clock can beat."""
    rows: Rows = []
    for make in SYSTEMS.values():
        torch._dynamo.reset()
        with torch.device("meta"):
            system = make("meta")
        opt: Any = None
        for name, policy in system.policies.items():
            if opt is None:
                opt = toca_compile.optimize(system.model, policy, lowering="eager")
                system.call(opt, system.latents, torch.empty(len(system.latents), device="meta"))
            opt.policy = policy
            report = toca_compile.explain(opt)
            rows.append(
                {
                    "system": system.name,
                    "size": system.size,
                    "policy": name,
                    "TFLOP uncached": float(report.flops("full")) * policy.num_steps / 1e12,
                    "FLOP speed-up": report.flop_speedup(),
                    "cache GB": report.cache_bytes / 1e9,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure the chosen systems and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bounds", action="store_true", help="only count FLOPs at the published sizes")
    given = parser.parse_args()
    with torch.no_grad():
        if given.bounds:
            save("paper_systems", "cpu", {"FLOPs at the published sizes": bounds()})
            return
        for name in given.systems:
            with torch.device(given.device):
                system = SYSTEMS[name](given.device)
            rows = measure(system, given.repeats, given.device)
            save("paper_systems" + ("" if given.device == "cpu" else "-cuda"), given.device, {rows[0]["system"]: rows})


if __name__ == "__main__":
    main()
