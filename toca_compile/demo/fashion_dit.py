"""The demo: a trained DiT sampled uncached and with caching, side by side. Needs the ``demo`` extra."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toca_compile.api import explain, optimize
from toca_compile.demo import shipped
from toca_compile.model import OptimizedModel
from toca_compile.policies import Fora, preset
from toca_compile.progress import working
from toca_compile.quality.compare import Row, measure, print_table, uncached
from toca_compile.quality.evaluation import Sampler
from toca_compile.quality.settings import ComparisonSettings
from toca_compile.report.page import Shown

GUIDANCE = 1.5
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def default_model() -> Path:
    """The trained model that travels with the package; in a checkout, that in ``examples/``.

    Raises:
        TocaError: there is none.
    """
    return shipped.folder("fashion_dit")


def load(path: Path) -> tuple[Any, Any]:
    """Model (float32, eval) and scheduler of a folder that diffusers can read.

    Raises:
        TocaError: it holds no DiTTransformer2DModel with a scheduler.
    """
    return shipped.load(path, "DiTTransformer2DModel", "DDIMScheduler")


def sample(
    model: Callable[..., Any],
    scheduler: Any,
    labels: Tensor,
    steps: int,
    *,
    seed: int = 0,
    after_step: Callable[[int, Tensor], None] = lambda i, x: None,
) -> Tensor:
    """DDIM with guidance, on the device of ``labels``, both halves of the pair in one batch; pictures ``[batch, 1, 28,
    28]`` in [−1, 1]. ``after_step`` is told a step's number and its latents, of the same shape."""
    config = model.config  # type: ignore[attr-defined]
    size, channels = config.sample_size, config.in_channels
    x = torch.randn(len(labels), channels, size, size, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    pair = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
    scheduler.set_timesteps(steps, device=labels.device)
    with torch.inference_mode():
        for i, t in enumerate(shipped.begun(model, scheduler)):
            noise = model(torch.cat([x, x]), timestep=t.expand(2 * len(labels)), class_labels=pair).sample
            cond, uncond = noise.chunk(2)
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x, eta=0.0).prev_sample
            after_step(i, x)
    return x


def labels(count: int, first: int = 0) -> Tensor:
    """The classes that a batch is asked for."""
    return (first + torch.arange(count)) % len(CLASSES)


def model_and_sampler(path: Path | None = None, device: str = "cpu", first: int = 0) -> tuple[Any, Sampler]:
    """The trained model, and a sampler of it for ``evaluate`` and ``tune``. ``first``: class that a batch begins
    with."""
    model, scheduler = load(path or default_model())

    def sampler(model: Any, steps: int, seed: int, count: int) -> Tensor:
        return sample(model, scheduler, labels(count, first).to(device), steps, seed=seed)

    return model.to(device), sampler


def run(settings: ComparisonSettings, model_path: Path | None = None) -> list[Row]:
    """Sample, time, print the table and write the pictures; returns the table's rows."""
    from rich.console import Console

    console = Console()
    with working("loading the model"):
        model, scheduler = load(model_path or default_model())
    model.to(settings.device)
    asked, steps = labels(settings.samples).to(settings.device), settings.steps

    def sampler(net: Any) -> Callable[[Callable[[], None]], Tensor]:
        return lambda tick: sample(net, scheduler, asked, steps, seed=settings.seed, after_step=lambda *_: tick())

    toca, fora = (
        optimize(model, p, lowering=settings.lowering)
        for p in (preset("dit-xl-2/ddim-50", num_steps=steps), Fora(steps, 3))
    )
    plain = uncached(model, settings.lowering)
    rows = [
        Row("uncached", sampler(plain)),
        Row("ToCa ddim-50", sampler(toca), toca),
        Row("FORA N=3", sampler(fora), fora),
    ]
    measure(rows, repeats=settings.repeats, device=settings.device, ticks=steps, console=console)
    print_table(console, rows, peak=2.0)
    if settings.out is None:
        return rows

    def latents(net: Any, look: Callable[[], None] = lambda: None) -> list[Tensor]:
        seen: list[Tensor] = []

        def keep(_: int, x: Tensor) -> None:
            seen.append(x)
            look()

        sample(net, scheduler, asked, steps, seed=settings.seed, after_step=keep)
        return seen

    # Runs of their own, since looking costs time.
    tokens: list[Tensor] = []
    mlps = {s.name for s in explain(toca).sites if "partial" in s.actions}
    cached = latents(toca, lambda: tokens.append(_computed(toca, mlps)))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(cached, latents(plain), strict=True)]
    _write_pictures(settings.out, rows, torch.stack(tokens).mean(0), asked)
    side = round(len(tokens[0]) ** 0.5)
    shown = Shown(cached[-1][0].cpu(), tokens, (side, side), {"ToCa ddim-50": errors})
    explain(toca).save(settings.out / "report.html", shown)
    names = "samples.png", "difference.png", "recomputed.png", "report.html"
    console.print(f"pictures and the report: {', '.join(f'{settings.out}/{name}' for name in names)}")
    return rows


def _computed(model: OptimizedModel, mlps: set[str]) -> Tensor:
    """How much of each token the last step computed, mean over MLP sites and samples: ``[tokens]``."""
    masks = [mask.float().mean(0) for name, mask in model.fresh_tokens().items() if name in mlps]
    return torch.stack(masks).mean(0).cpu()


def _write_pictures(out: Path, rows: list[Row], counts: Tensor, labels: Tensor) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    base = rows[0].samples
    assert base is not None

    def strip(file: str, pictures: list[tuple[str, Tensor]], scale: str = "", **show: Any) -> None:
        size = (1.3 * len(labels) + bool(scale), 1.45 * len(pictures) + 0.2)
        figure, axes = plt.subplots(
            len(pictures), len(labels), figsize=size, squeeze=False, layout="constrained"
        )  # fmt: skip
        for line, (name, tensor) in zip(axes, pictures, strict=True):
            for j, axis in enumerate(line):
                image = axis.imshow(tensor[j, 0].cpu(), **show)
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(name, fontsize=8)
        for axis, label in zip(axes[0], labels, strict=True):
            axis.set_title(CLASSES[int(label)], fontsize=8)
        if scale:
            figure.colorbar(image, ax=axes, fraction=0.02).set_label(scale, fontsize=8)
        figure.savefig(out / file, dpi=120)
        plt.close(figure)

    strip("samples.png", [(r.name, r.samples) for r in rows if r.samples is not None], cmap="gray", vmin=-1, vmax=1)
    strip(
        "difference.png",
        [(r.name, (r.samples - base).abs()) for r in rows[1:] if r.samples is not None],
        scale="|difference to uncached|", cmap="magma", vmin=0, vmax=0.5,
    )  # fmt: skip
    side = round(len(counts) ** 0.5)
    figure, axis = plt.subplots(figsize=(4.8, 4), layout="constrained")
    image = axis.imshow(100 * counts.reshape(side, side), cmap="viridis")
    axis.set_title("in how many steps ToCa recomputed a token's MLPs", fontsize=9)
    axis.set_xlabel("token column")
    axis.set_ylabel("token row")
    figure.colorbar(image, format="%g %%")
    figure.savefig(out / "recomputed.png", dpi=120)
    plt.close(figure)
