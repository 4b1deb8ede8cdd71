"""Sample the trained model of this repository uncached and with caching, and print what the compiler did.

python examples/quickstart.py
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

import toca_compile

folder = Path(__file__).resolve().parent / "fashion_dit"
model = DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).float().eval()
scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
scheduler.set_timesteps(20)


def sample(net: torch.nn.Module) -> torch.Tensor:
    """Two pictures from the same noise, ``[2, 1, 28, 28]`` in [−1, 1]; nothing here knows of caching."""
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = net(x, timestep=t.expand(2), class_labels=torch.tensor([7, 9])).sample
            x = scheduler.step(noise, t, x).prev_sample
    return x


policy = toca_compile.BlockCache(20, first=0, interval=3, order=2, basis="newton")
fast = toca_compile.optimize(model, policy, lowering="eager")  # without lowering= it is compiled by Inductor
error = (sample(fast) - sample(model)).square().mean()
print(toca_compile.explain(fast))
print(f"PSNR to the uncached pictures: {10 * torch.log10(4 / error):.1f} dB")
