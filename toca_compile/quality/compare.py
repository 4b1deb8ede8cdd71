"""Samplings side by side: the same seeds, interleaved repeats, one table. Needs the ``demo`` extra."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toca_compile.api import explain, optimize
from toca_compile.ir.plan import Policy
from toca_compile.lowerings.inductor import SIDE_BY_SIDE
from toca_compile.model import OptimizedModel
from toca_compile.progress import plain_line, shortened, shown
from toca_compile.quality.metrics import psnr
from toca_compile.quality.settings import ComparisonSettings, overridden
from toca_compile.report import StepCounts

DEFAULTS = ComparisonSettings()


@dataclass
class Row:
    """One line of the table. ``sample`` makes the samples, ``[batch, …]``, and calls its argument after each step that
    it can tell of; ``model`` is what it samples with, where that caches. Times are seconds of a whole sampling."""

    name: str
    sample: Callable[[Callable[[], None]], Tensor]
    model: OptimizedModel | None = None
    steps: str = ""
    flop_speedup: float = 1.0
    seconds: list[float] = field(default_factory=list)
    samples: Tensor | None = None
    cache_mb: float = 0.0

    @property
    def median(self) -> float:
        """Median time."""
        return statistics.median(self.seconds)


def measure(rows: Sequence[Row], *, repeats: int, device: str, ticks: int, console: Any) -> None:
    """Sample once with each (this compiles), then ``repeats`` times with all in turn; fills the rows in.

    Args:
        ticks: how often a sampling calls back, for the progress shown.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        warm = [progress.add_task(f"compile: {r.name}", total=ticks) for r in rows]
        for row, task in zip(rows, warm, strict=True):
            with _stages(progress, task, f"compile: {row.name}"):
                row.samples = row.sample(lambda t=task: progress.advance(t))  # type: ignore[misc]
                _sync(device)
            progress.update(task, completed=ticks)
        if not console.is_terminal:
            plain_line(f"sampling {repeats} × {len(rows)} times, timed")
        timed = progress.add_task("timed, interleaved", total=ticks * repeats * len(rows))
        for _ in range(repeats):
            for row in rows:
                start = time.perf_counter()
                row.sample(lambda: None)
                _sync(device)
                row.seconds.append(time.perf_counter() - start)
                progress.advance(timed, ticks)
    for row in rows:
        if row.model is None:
            row.steps = str(StepCounts({"full": ticks}))
            continue
        report = explain(row.model)
        row.flop_speedup = report.flop_speedup()
        row.steps = str(report.step_counts)
        row.cache_mb = report.cache_bytes / 2**20


def print_table(console: Any, rows: Sequence[Row], *, peak: float) -> None:
    """The table; the first row is what the others are compared with. ``peak``: of a sample's values."""
    from rich import box
    from rich.table import Table

    table = Table(
        title="same seeds, one compiler for all",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption="latency: median of interleaved samplings; PSNR to the uncached samples",
    )
    for name in ("", "steps", "FLOPs ×", "latency ×", "ratio", "PSNR dB", "cache MB", "s"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=name != "steps")
    base = rows[0]
    assert base.samples is not None
    for row in rows:
        speedup = base.median / row.median
        assert row.samples is not None
        table.add_row(
            row.name,
            row.steps,
            f"{row.flop_speedup:.2f}",
            f"{speedup:.2f}",
            f"{speedup / row.flop_speedup:.2f}",
            "–" if row is base else f"{psnr(row.samples, base.samples, peak):.1f}",
            f"{row.cache_mb:.1f}",
            f"{row.median:.2f}",
        )
    console.print(table)


def compare_pipeline(
    pipe: Any,
    call: Mapping[str, Any],
    policies: Mapping[str, Policy],
    *,
    settings: ComparisonSettings = DEFAULTS,
    **overrides: Any,
) -> list[Row]:
    """A diffusers pipeline uncached and with each policy; prints the table and writes the pictures.

    Args:
        call: arguments of the pipeline's call, without steps, generator and output type.
        policies: by the name of their row.
        settings: steps, repeats, where pictures are written.
        **overrides: single settings by name, instead of those in ``settings``: ``steps=20, lowering="eager"``.

    Raises:
        TocaError: a setting is unknown or holds what it may not.
    """
    from rich.console import Console

    settings = overridden(settings, overrides)
    console, plain = Console(), pipe.transformer
    pipe.set_progress_bar_config(disable=True)

    def sampler(transformer: Any) -> Callable[[Callable[[], None]], Tensor]:
        def sample(_: Callable[[], None]) -> Tensor:
            pipe.transformer = transformer
            generator = torch.Generator(settings.device).manual_seed(settings.seed)
            images = pipe(**call, num_inference_steps=settings.steps, generator=generator, output_type="np").images
            return torch.as_tensor(images)

        return sample

    rows = [Row("uncached", sampler(uncached(plain, settings.lowering)))]
    for name, policy in policies.items():
        pipe.transformer = plain
        optimize(pipe, policy, lowering=settings.lowering)
        rows.append(Row(name, sampler(pipe.transformer), pipe.transformer))
    measure(rows, repeats=settings.repeats, device=settings.device, ticks=settings.steps, console=console)
    print_table(console, rows, peak=1.0)
    if settings.out is not None:
        write_pictures(settings.out, rows)
        console.print(f"pictures: {settings.out}/")
    return rows


def uncached(model: Any, lowering: str) -> Any:
    """The model to compare with: compiled where the others are, with the same settings."""
    if lowering != "inductor":
        return model
    on_gpu = any(parameter.device.type == "cuda" for parameter in model.parameters())
    return torch.compile(model, dynamic=False, options=SIDE_BY_SIDE if on_gpu else None)


def write_pictures(out: Path, rows: Sequence[Row]) -> None:
    """The samples ``[batch, height, width, channels]`` in [0, 1], one strip of pictures a row; of videos, with frames
    behind the batch, the frame in the middle."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    for row in rows:
        assert row.samples is not None
        samples = row.samples[:, row.samples.shape[1] // 2] if row.samples.dim() == 5 else row.samples
        strip = torch.cat(list(samples.float().clamp(0, 1)), dim=1)
        plt.imsave(out / f"{row.name.replace(' ', '-').replace('/', '-')}.png", strip.numpy())


@contextlib.contextmanager
def _stages(progress: Any, task: Any, name: str) -> Iterator[None]:
    """What the compiler is at, beside the bar that it holds up; where there is no terminal to draw bars on, a line for
    each."""
    if not progress.console.is_terminal:
        plain_line(name)
        with shown(plain_line):
            yield
        return
    with shown(lambda text: progress.update(task, description=shortened(text, 28) or name)):
        yield


def _sync(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
