"""What the benchmarks share: models with random weights, interleaved timing, result files."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from toca_compile.lowerings.inductor import SIDE_BY_SIDE

if torch.cuda.is_available():
    for _name, _value in SIDE_BY_SIDE.items():  # for what is compared with as for us
        setattr(torch._inductor.config, _name, _value)

RESULTS = Path(__file__).resolve().parent / "results"


def dit(width: int, depth: int, size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers DiT on latents of ``size``² (size²/4 tokens), random weights; DiT-XL/2 is width 1152, depth 28."""
    from diffusers import DiTTransformer2DModel

    head = 72 if width % 72 == 0 else 64
    torch.manual_seed(0)
    model: Any = DiTTransformer2DModel(
        num_attention_heads=width // head,
        attention_head_dim=head,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        patch_size=2,
        sample_size=size,
        num_embeds_ada_norm=1000,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return model.eval().to(device, dtype)


def arguments(batch: int, size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One call's inputs: a fixed timestep, so that every call is the next step of one run."""
    return {
        "hidden_states": torch.randn(batch, 4, size, size, device=device, dtype=dtype),
        "timestep": torch.full((batch,), 500, device=device),
        "class_labels": torch.arange(batch, device=device) % 1000,
    }


def begun(model: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """A sampling's timesteps, of which an optimised model is told, as a pipeline tells it those of its scheduler."""
    return cast(torch.Tensor, model.begin(timesteps)) if hasattr(model, "begin") else timesteps


_SPREADS: list[float] = []  # of what was timed in this process: half of the middle half's width, over the median


def interleaved(calls: Mapping[Any, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[Any, float]:
    """Median seconds of each call, all called in turn ``repeats`` times."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            sync(device)
            start = time.perf_counter()
            call()
            sync(device)
            times[name].append(time.perf_counter() - start)
    for seconds in times.values():
        if len(seconds) > 2:
            low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
            _SPREADS.append((high - low) / 2 / middle)
    return {name: statistics.median(t) for name, t in times.items()}


def sync(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.accelerator.synchronize()


def hardware(device: str = "cpu") -> str:
    """What the numbers were measured on."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a markdown table."""
    if not rows:
        return ""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(_cell(row[h]) for h in head) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(
    name: str, device: str, sections: Mapping[str, Sequence[Mapping[str, Any]]], *, about: str | None = None
) -> None:
    """Write ``results/name.json`` and ``.md``, keeping other sections from the same hardware, and print the latter. The
    JSON also says how far repeats of one call lay apart (``noise``), which ``compare.py`` asks. ``about``: what the
    numbers are, where nothing was timed."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    noise, earlier = statistics.median(_SPREADS or [0.0]), before.pop("noise", 0.0)
    where = about or hardware(device)
    if before.pop("hardware", None) == where:
        noise, sections = max(noise, earlier), {**before, **sections}
    path.write_text(json.dumps({"hardware": where, "noise": noise, **sections}, indent=1) + "\n")
    text = f"# {name}\n\n{about or 'Measured on: ' + where}.\n"
    for title, rows in sections.items():
        text += f"\n## {title}\n\n{table(rows)}\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
