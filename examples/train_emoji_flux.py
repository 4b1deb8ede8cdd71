"""Train the small FLUX that draws emoji by their names; goes on where it was cut off.

    python examples/train_emoji_flux.py --data DIR --out runs/emoji

``--data`` is the folder that npm's archive of Noto's emoji is kept in; it is fetched there once (74 MB). Velocity of
the straight flow, mean squared error, σ stratified and logit-normal, one prompt in ten empty for guidance. The first
stage draws pictures of 16 pixels, whose patches lie where four of the full size do, and costs a fifth a picture. Muon
for the matrices of the blocks, AdamW for the rest, EMA, bf16 autocast. Writes the EMA weights in bf16 and prints the
loss on the emoji held out, and on as many of the trained ones.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toca_compile.demo.emoji_flux import PROMPTS, SIDE, Text, noise_of, packed, positions, prompts, sample
from toca_compile.demo.noto_emoji import SIZE, Emoji, download, read_emoji, words

HEAD, HEADS, DOUBLE, SINGLE, WIDTH_OF_TEXT = 32, 4, 2, 4, 64


class Net(nn.Module):
    """The transformer and the vectors of the text, as one thing to train."""

    def __init__(self, vocabulary: list[str]) -> None:
        from diffusers import FluxTransformer2DModel

        super().__init__()
        self.transformer = FluxTransformer2DModel(
            in_channels=12, num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=HEAD,
            num_attention_heads=HEADS, joint_attention_dim=WIDTH_OF_TEXT, pooled_projection_dim=WIDTH_OF_TEXT,
            axes_dims_rope=(4, 14, 14),
        )  # fmt: skip
        self.text = Text(vocabulary, WIDTH_OF_TEXT)
        for name, module in self.transformer.named_modules():
            # Every block begins as the identity, as the authors of adaLN-Zero train it.
            if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, sigma: Tensor, indices: Tensor) -> Tensor:
        """The velocity: packed pictures in, the like out."""
        side = 2 * round(x.shape[1] ** 0.5)
        velocity: Tensor = self.transformer(
            hidden_states=x, timestep=sigma, **self.text(indices), **positions(side, x.device)
        ).sample
        return velocity


@dataclass(frozen=True)
class Stage:
    """So many steps at one size of pictures.

    Attributes:
        side: of a picture, in pixels.
        steps: of the optimizer.
        batch: pictures a step.
    """

    side: int
    steps: int
    batch: int

    @classmethod
    def read(cls, text: str) -> "Stage":
        """From ``SIDE:STEPS:BATCH``."""
        side, steps, batch = (int(part) for part in text.split(":"))
        return cls(side, steps, batch)


def small(pictures: Tensor, side: int) -> Tensor:
    """Pictures of ``side`` pixels, each the mean of those it covers."""
    return nn.functional.avg_pool2d(pictures, pictures.shape[-1] // side)


def moved(pictures: Tensor) -> Tensor:
    """Each picture scaled to 85 to 100 % and moved by at most 3 % of its side; what lies outside is white."""
    count = len(pictures)
    zoom = 1 / (0.85 + 0.15 * torch.rand(count))
    turn = torch.zeros(count, 2, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = zoom
    turn[:, :, 2] = 0.06 * (2 * torch.rand(count, 2) - 1)
    grid = nn.functional.affine_grid(turn, [count, 3, SIZE, SIZE], align_corners=False)
    return nn.functional.grid_sample(pictures - 1, grid, align_corners=False) + 1


def loss_of(net: nn.Module, x: Tensor, sigma: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
    """Mean squared error of the velocity, for pictures ``x`` ``[b, 3, h, h]`` and σ ``[b]``."""
    x, noise = packed(x), packed(noise)
    at = sigma[:, None, None]
    return (net((1 - at) * x + at * noise, sigma, indices).float() - (noise - x)).square().mean()


@torch.no_grad()
def judged(net: Net, emoji: Emoji, side: int, device: torch.device) -> float:
    """Loss on fixed pictures and noise, each at eight evenly spread σ."""
    generator = torch.Generator().manual_seed(1)
    x, total = small(emoji.pictures, side).to(device), torch.zeros(())
    indices = net.text.indices(emoji.prompts).to(device)
    for i in range(8):
        noise = torch.randn(x.shape, generator=generator).to(device)
        sigma = torch.full((len(x),), (i + 0.5) / 8, device=device)
        total += loss_of(net, x, sigma, noise, indices).cpu() / 8
    return float(total)


def batches(emoji: Emoji, net: Net, stage: Stage) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Pictures, σ, noise and words, without end."""
    indices = net.text.indices(emoji.prompts)
    while True:
        pick = torch.randint(len(indices), (stage.batch,))
        x = small(moved(emoji.pictures[pick]), stage.side)
        told = torch.where(torch.rand(stage.batch, 1) < 0.1, 0, indices[pick])
        # Stratified: one quantile in each of batch equal slices, shuffled.
        u = (torch.randperm(stage.batch) + torch.rand(stage.batch)) / stage.batch
        yield x, torch.sigmoid(1.2 * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4))), torch.randn_like(x), told


def optimizers_of(net: Net) -> list[torch.optim.Optimizer]:
    """Muon for the matrices that stand in blocks, AdamW for the rest; rates are set before each step."""
    inner = [
        p
        for name, p in net.named_parameters()
        if p.ndim == 2 and "transformer_blocks" in name and "norm" not in name
    ]  # fmt: skip
    rest = [p for p in net.parameters() if all(p is not q for q in inner)]
    return [
        torch.optim.Muon(inner, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def export(net: Net, out: Path) -> None:
    """What ``toca_compile.demo.emoji_flux.load`` reads, in bf16."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    net = copy.deepcopy(net).to(torch.bfloat16)
    net.transformer.save_pretrained(out)
    FlowMatchEulerDiscreteScheduler().save_pretrained(out / "scheduler")
    (out / "text").mkdir(exist_ok=True)
    save_file(net.text.state_dict(), out / "text" / "model.safetensors")
    (out / "text" / "vocabulary.json").write_text(json.dumps(net.text.vocabulary) + "\n", encoding="utf-8")


def draw(net: Net, path: Path, steps: int) -> None:
    """Samples of the demo's prompts, four noises each, as a picture."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from matplotlib.image import imsave

    asked, scheduler = prompts(len(PROMPTS)), FlowMatchEulerDiscreteScheduler()
    noises = [noise_of(len(asked), seed) for seed in range(4)]
    rows = [sample(net.transformer, scheduler, net.text, asked, steps, noise=noise) for noise in noises]
    sheet = torch.cat([row.permute(2, 0, 3, 1).reshape(SIDE, -1, 3) for row in rows]).cpu()
    sheet = (sheet.float().clamp(-1, 1) + 1) / 2
    imsave(path, sheet.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())


class Training:
    """What a run is made of, kept on disk once a minute."""

    def __init__(self, net: Net, out: Path, device: torch.device) -> None:
        self.net = net.to(device).train()
        self.average = copy.deepcopy(net).eval().requires_grad_(False)
        self.optimizers = optimizers_of(net)
        self.path, self.step = out / "state.pt", 0
        if self.path.exists():
            state = torch.load(self.path, map_location=device)
            self.step = state["step"]
            self.net.load_state_dict(state["net"])
            self.average.load_state_dict(state["average"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)

    def save(self) -> None:
        """A run cut off while writing leaves the last state."""
        state: dict[str, Any] = {"step": self.step, "net": self.net.state_dict(), "average": self.average.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").rename(self.path)

    def advance(self, loss: Tensor, rate: float, ema: float) -> None:
        """One step of both optimizers and of the average."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        weight = 1 - min(ema, self.step / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), weight)


def main() -> None:
    """Parse, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("noto_emoji"))
    parser.add_argument("--out", type=Path, default=Path("emoji_flux_trained"))
    parser.add_argument("--stages", type=Stage.read, nargs="+", default=[Stage(16, 1200, 64), Stage(32, 1200, 32)],
                        metavar="SIDE:STEPS:BATCH")  # fmt: skip
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=50, help="steps in which the rate rises")
    parser.add_argument("--cooldown", type=int, default=400, help="last steps, in which it falls")
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--sheet-steps", type=int, default=28, help="of the samples that are drawn at the end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    given = parser.parse_args()

    device = torch.device(given.device)
    emoji, held_out = read_emoji(download(given.data)).split()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vocabulary = ["", *sorted({word for prompt in emoji.prompts for word in words(prompt)})]
    training = Training(Net(vocabulary), given.out, device)
    net, total = training.net, sum(stage.steps for stage in given.stages)
    seen = emoji.some(len(held_out.prompts))
    torch.manual_seed(training.step)
    if given.compile:
        net.transformer.compile_repeated_blocks(dynamic=False)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{len(emoji.prompts)} emoji, {len(vocabulary)} words, {parameters / 1e6:.2f} M parameters, {total} steps")

    start, judged_at, saved_at, first = time.time(), time.time(), time.time(), training.step
    losses: list[float] = []
    end = 0
    for stage in given.stages:
        end += stage.steps
        stream = batches(emoji, net, stage)
        while training.step < end:
            step = training.step
            rate = given.rate * min(1.0, (step + 1) / given.warmup, (total - step) / given.cooldown)
            x, sigma, noise, told = (part.to(device) for part in next(stream))
            with torch.autocast(device.type, torch.bfloat16, enabled=given.dtype == "bfloat16"):
                loss = loss_of(net, x, sigma, noise, told)
            training.advance(loss, rate, given.ema)
            losses.append(loss.item())
            now, last = time.time(), training.step == total
            if now - judged_at > 240 or last:
                judged_at = now
                scores = [judged(training.average, part, stage.side, device) for part in (held_out, seen)]
                print(
                    f"step {training.step}/{total}  side {stage.side}  loss {sum(losses) / len(losses):.4f}  "
                    f"held-out {scores[0]:.4f}  trained {scores[1]:.4f}  {now - start:.0f} s  "
                    f"{(now - start) / (training.step - first):.2f} s/step", flush=True,
                )  # fmt: skip
                losses = []
            if now - saved_at > 60 or last:
                saved_at = now
                training.save()
    export(training.average, given.out)
    draw(training.average, given.out / "samples.png", given.sheet_steps)


if __name__ == "__main__":
    main()
