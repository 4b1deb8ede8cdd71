"""The demo: a trained DiT sampled uncached and with caching, side by side. Needs the ``demo`` extra."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from toca_compile.api import explain, optimize
from toca_compile.errors import TocaError
from toca_compile.model import OptimizedModel
from toca_compile.policies import Fora, preset

GUIDANCE = 1.5
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


@dataclass
class Row:
    """One line of the table. Times are seconds of a whole sampling, one for each repeat."""

    name: str
    model: nn.Module
    steps: str
    flop_speedup: float = 1.0
    seconds: list[float] = field(default_factory=list)
    samples: Tensor | None = None
    cache_mb: float = 0.0

    @property
    def median(self) -> float:
        """Median time."""
        return statistics.median(self.seconds)


def default_model() -> Path:
    """The trained model in the checkout that this package is installed from.

    Raises:
        TocaError: the package is not installed from a checkout.
    """
    path = Path(__file__).resolve().parent.parent / "examples" / "fashion_dit"
    if not (path / "config.json").exists():
        raise TocaError("the demo's model is in the repository (examples/fashion_dit): give its path with --model")
    return path


def load(path: Path) -> tuple[Any, Any]:
    """Model (float32, eval) and scheduler of a folder that diffusers can read."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()
    return model, DDIMScheduler.from_pretrained(path / "scheduler")


def sample(
    model: Callable[..., Any],
    scheduler: Any,
    labels: Tensor,
    steps: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    after_step: Callable[[int], None] = lambda i: None,
) -> Tensor:
    """DDIM with guidance, both halves of the pair in one batch; pictures ``[batch, 1, 28, 28]`` in [−1, 1]."""
    config = model.config  # type: ignore[attr-defined]
    size, channels = config.sample_size, config.in_channels
    x = torch.randn(len(labels), channels, size, size, generator=torch.Generator().manual_seed(seed)).to(device)
    pair = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)]).to(device)
    scheduler.set_timesteps(steps, device=device)
    with torch.inference_mode():
        for i, t in enumerate(scheduler.timesteps):
            noise = model(torch.cat([x, x]), timestep=t.expand(2 * len(labels)), class_labels=pair).sample
            cond, uncond = noise.chunk(2)
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x, eta=0.0).prev_sample
            after_step(i)
    return x


def psnr(a: Tensor, b: Tensor, peak: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB, mean over the pictures."""
    error = (a - b).square().flatten(1).mean(1).clamp(min=1e-12)
    return float((10 * torch.log10(peak**2 / error)).mean())


def run(
    *, model_path: Path | None = None, out: Path = Path("toca-demo"), steps: int = 50, samples: int = 8,
    repeats: int = 3, seed: int = 0, device: str = "cpu",
) -> list[Row]:  # fmt: skip
    """Sample, time, print the table and write the pictures; returns the table's rows."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    model, scheduler = load(model_path or default_model())
    model.to(device)
    labels = torch.arange(samples) % 10
    policy = preset("dit-xl-2/ddim-50", num_steps=steps)
    rows = [
        Row("uncached", cast(nn.Module, torch.compile(model, dynamic=False)), f"{steps}+0+0"),
        Row("ToCa ddim-50", optimize(model, policy), ""),
        Row("FORA N=3", optimize(model, Fora(steps, 3)), ""),
    ]
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        warm = [progress.add_task(f"compile: {r.name}", total=steps) for r in rows]
        for row, task in zip(rows, warm, strict=True):
            row.samples = sample(
                row.model,
                scheduler,
                labels,
                steps,
                seed=seed,
                device=device,
                after_step=lambda i, t=task: progress.advance(t),  # type: ignore[misc]
            )
            _sync(device)
        timed = progress.add_task("timed, interleaved", total=steps * repeats * len(rows))
        for _ in range(repeats):
            for row in rows:
                start = time.perf_counter()
                sample(row.model, scheduler, labels, steps, seed=seed, device=device)
                _sync(device)
                row.seconds.append(time.perf_counter() - start)
                progress.advance(timed, steps)
        counts = _recompute_counts(rows[1].model, scheduler, labels, steps, seed, device)
    for row in rows[1:]:
        assert isinstance(row.model, OptimizedModel)
        report = explain(row.model)
        letters = report.schedule
        row.flop_speedup = report.flop_speedup()
        row.steps = "+".join(str(letters.count(kind)) for kind in "FPR")
        row.cache_mb = row.model.cache_bytes / 2**20
    _print_table(console, rows)
    _write_pictures(out, rows, counts, labels)
    console.print(f"pictures: {out}/samples.png, {out}/difference.png, {out}/recomputed.png")
    return rows


def _sync(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _recompute_counts(model: nn.Module, scheduler: Any, labels: Tensor, steps: int, seed: int, device: str) -> Tensor:
    """Share of steps in which a token was computed, mean over MLP sites and samples: ``[tokens]``. A run of its own,
    since looking costs time."""
    assert isinstance(model, OptimizedModel)
    total: list[Tensor] = []

    def look(_: int) -> None:
        masks = [m.float().mean(0) for name, m in model.fresh_tokens().items() if name in mlps]
        total.append(torch.stack(masks).mean(0).cpu())

    mlps = {s.name for s in explain(model).sites if "partial" in s.actions}
    sample(model, scheduler, labels, steps, seed=seed, device=device, after_step=look)
    return torch.stack(total).mean(0)


def _print_table(console: Any, rows: list[Row]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        title="same seeds, both compiled by Inductor",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption="steps: full + partial + reuse; latency: median of interleaved samplings; PSNR to the uncached samples",
    )
    for name in ("", "steps", "FLOPs ×", "latency ×", "ratio", "PSNR dB", "cache MB", "s"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    base = rows[0]
    assert base.samples is not None
    for row in rows:
        speedup = base.median / row.median
        assert row.samples is not None
        close = "–" if row is base else f"{psnr(row.samples, base.samples):.1f}"
        table.add_row(
            row.name,
            row.steps,
            f"{row.flop_speedup:.2f}",
            f"{speedup:.2f}",
            f"{speedup / row.flop_speedup:.2f}",
            close,
            f"{row.cache_mb:.1f}",
            f"{row.median:.2f}",
        )
    console.print(table)


def _write_pictures(out: Path, rows: list[Row], counts: Tensor, labels: Tensor) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    base = rows[0].samples
    assert base is not None

    def strip(file: str, pictures: list[tuple[str, Tensor]], **show: Any) -> None:
        columns = len(labels)
        figure, axes = plt.subplots(
            len(pictures), columns, figsize=(1.3 * columns, 1.45 * len(pictures)), squeeze=False
        )
        for line, (name, tensor) in zip(axes, pictures, strict=True):
            for j, axis in enumerate(line):
                axis.imshow(tensor[j, 0].cpu(), **show)
                axis.set_xticks([])
                axis.set_yticks([])
                if line is axes[0]:
                    axis.set_title(CLASSES[int(labels[j])], fontsize=8)
            line[0].set_ylabel(name, fontsize=8)
        figure.tight_layout()
        figure.savefig(out / file, dpi=120)
        plt.close(figure)

    strip("samples.png", [(r.name, r.samples) for r in rows if r.samples is not None], cmap="gray", vmin=-1, vmax=1)
    strip(
        "difference.png",
        [(f"|{r.name} − …|", (r.samples - base).abs()) for r in rows[1:] if r.samples is not None],
        cmap="magma", vmin=0, vmax=0.5,
    )  # fmt: skip
    side = round(len(counts) ** 0.5)
    figure, axis = plt.subplots(figsize=(4.6, 4))
    image = axis.imshow(100 * counts.reshape(side, side), cmap="viridis")
    axis.set_title("steps in which ToCa recomputed a token's MLPs, %", fontsize=9)
    axis.set_xlabel("token column")
    axis.set_ylabel("token row")
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(out / "recomputed.png", dpi=120)
    plt.close(figure)
