"""Train the demo's diffusion transformer on Fashion-MNIST, from scratch or from the shipped weights.

    python examples/train_fashion_dit.py --data DIR --resume examples/fashion_dit --out runs/fashion --epochs 60

``--data`` holds the four idx files (``train-images-idx3-ubyte[.gz]`` …), as in Debian's package
``dataset-fashion-mnist`` (``/usr/share/datasets/fashion-mnist`` there) or from Zalando's repository. ε-prediction, mean
squared error, stratified uniform timesteps, AdamW, EMA, bf16 autocast on CUDA. Writes the EMA weights in bf16, loadable
with ``DiTTransformer2DModel.from_pretrained``, and prints the loss on held-out images.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toca_compile.demo.fashion_mnist import read_pictures

HERE = Path(__file__).resolve().parent


def loss_of(model: Any, scheduler: Any, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise."""
    noisy = scheduler.add_noise(x, noise, t)
    predicted: Tensor = model(noisy, timestep=t, class_labels=y).sample
    return (predicted.float() - noise).square().mean()


@torch.no_grad()
def held_out(model: Any, scheduler: Any, x: Tensor, y: Tensor) -> float:
    """Loss on fixed images, noise and evenly spread timesteps."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    t = torch.linspace(0, scheduler.config.num_train_timesteps - 1, len(x)).long().to(x.device)
    parts = [
        loss_of(model, scheduler, x[i : i + 64], y[i : i + 64], t[i : i + 64], noise[i : i + 64])
        for i in range(0, len(x), 64)
    ]
    return float(torch.stack(parts).mean())


def main() -> None:
    """Parse, train, save."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--resume", type=Path, help="continue from the weights in this folder")
    parser.add_argument("--out", type=Path, default=Path("fashion_dit_trained"))
    parser.add_argument("--epochs", type=float, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    given = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(given.device)
    source = given.resume or HERE / "fashion_dit"
    scheduler = DDIMScheduler.from_pretrained(source / "scheduler")
    config = DiTTransformer2DModel.load_config(source)
    model = DiTTransformer2DModel.from_config(config)
    if given.resume:
        model = DiTTransformer2DModel.from_pretrained(given.resume, torch_dtype=torch.float32)
    model.to(device).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    (images, labels), (test_x, test_y) = (read_pictures(given.data, kind) for kind in ("train", "t10k"))
    test_x, test_y = test_x[:256].to(device), test_y[:256].to(device)
    optimizer = torch.optim.AdamW(model.parameters(), given.rate, betas=(0.9, 0.98), weight_decay=0.01)
    step_fn = torch.compile(model) if given.compile else model
    total, null = int(given.epochs * len(images) / given.batch), config["num_embeds_ada_norm"]
    print(
        f"{total} steps of {given.batch} on {device}; held-out loss {held_out(average, scheduler, test_x, test_y):.4f}"
    )
    start = time.time()
    for step in range(total):
        rate = given.rate * min(1.0, (step + 1) / given.warmup) * (1 - step / total) ** 0.5
        optimizer.param_groups[0]["lr"] = rate
        pick = torch.randint(len(images), (given.batch,))
        x, y = images[pick].to(device), labels[pick].to(device)
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(-1), x)
        y = torch.where(torch.rand(len(y), device=device) < 0.1, torch.full_like(y, null), y)
        # Stratified: one timestep in each of batch equal slices, shuffled.
        t = (torch.arange(given.batch) + torch.rand(given.batch)) / given.batch * scheduler.config.num_train_timesteps
        t = t.long()[torch.randperm(given.batch)].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(step_fn, scheduler, x, y, t, torch.randn_like(x))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(given.ema, (1 + step) / (10 + step))
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        if (step + 1) % 500 == 0 or step + 1 == total:
            score = held_out(average, scheduler, test_x, test_y)
            print(f"step {step + 1}/{total}  loss {loss.item():.4f}  held-out {score:.4f}  {time.time() - start:.0f} s")
            average.to(torch.bfloat16).save_pretrained(given.out)
            average.to(torch.float32)
            scheduler.save_pretrained(given.out / "scheduler")


if __name__ == "__main__":
    main()
