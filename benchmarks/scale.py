"""Many samples on many devices: workers measured here, GPUs planned on paper.

    python benchmarks/scale.py                            # the plan: predictions, from results/roofline.json; seconds
    python benchmarks/scale.py --workers 1 2              # and samples per second of ``toca_compile.batch`` (needs Ray)
    python benchmarks/scale.py --workers 0 --requests 4   # a small check

A request is sampled by one GPU, and knows nothing of the others: the rate grows with the GPUs, as long as there are
requests for all of them. The plan takes the times of a run from ``roofline.py`` (CUDA graphs, the published rates times
an assumed share) and the caches from ``paper_systems.py``, which counts them. What bounds a step is the largest of its
products, its bytes and the gaps between its launches. Results go to ``benchmarks/results/scale.{json,md}``.

Workers are measured over the later half of their requests, so that their start and tracing, which each does once, are
none of it. On one machine workers share its cores.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, hardware, save

import toca_compile
from toca_compile import Fora
from toca_compile.demo.shipped import folder, load

Rows = list[dict[str, Any]]
GPUS = ("H100", "A100")
COUNTS = (1, 8, 64, 256, 1000)
STEPS = 20


class Pictures:
    """A pipeline of the shipped DiT: a picture of a class."""

    def __init__(self) -> None:
        self.transformer, self.scheduler = load(folder("fashion_dit"), "DiTTransformer2DModel", "DDIMScheduler")

    @property
    def components(self) -> dict[str, Any]:
        """By name."""
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    def __call__(self, num_inference_steps: int, label: int, generator: torch.Generator) -> tuple[torch.Tensor]:
        """The picture, ``[1, channels, height, width]``."""
        config: Any = self.transformer.config
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        x, y = torch.randn(shape, generator=generator), torch.tensor([label])
        self.scheduler.set_timesteps(num_inference_steps)
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                told = self.transformer(x, timestep=t.expand(1), class_labels=y, return_dict=False)[0]
                x = self.scheduler.step(told[:, : shape[1]], t, x).prev_sample
        return (x,)


def measured(workers: int, requests: int) -> dict[str, Any]:
    """Samples per second."""
    given = [{"label": i % 10, "num_inference_steps": STEPS} for i in range(requests)]
    with tempfile.TemporaryDirectory() as out:
        result = toca_compile.batch(Pictures, given, Fora(STEPS, 4), out=out, workers=workers, lowering="eager")
        if result.failed:
            raise SystemExit(str(result))
        done = sorted(path.stat().st_mtime for path in Path(out).glob("*.json"))[requests // 2 :]
    return {"workers": workers, "requests": requests, "samples / s": (len(done) - 1) / (done[-1] - done[0])}


def planned() -> dict[str, Rows]:
    """By system: seconds of a sample, samples per second of many GPUs, caches of a request."""
    times = json.loads((RESULTS / "roofline.json").read_text())
    counted = json.loads((RESULTS / "paper_systems.json").read_text())["FLOPs at the published sizes"]
    caches = {(row["system"], row["policy"]): row for row in counted}
    found: dict[str, Rows] = {}
    for title, steps in times.items():
        name, _, what = title.partition(": ")
        if what != "predicted steps":
            continue
        system = name.partition(",")[0]
        full = next(row for row in steps if row["policy"] == "FullCompute")
        known = [row for key, row in caches.items() if key[0] == system]
        number = round(known[0]["TFLOP uncached"] / full["TFLOP"])  # of steps
        rows = [_row(gpu, "uncached", number * full[f"{gpu} ms, CUDA graphs"] / 1e3, 0.0, [full]) for gpu in GPUS]
        for run in times[f"{name}: predicted runs"]:
            key = (system, run["policy"])
            if run["GPU"] not in GPUS or key not in caches:
                continue
            alone = number * full[f"{run['GPU']} ms, CUDA graphs"] / 1e3
            own = [row for row in steps if row["policy"] == run["policy"]]
            seconds = alone / run["predicted speed-up, CUDA graphs"]
            rows.append(_row(run["GPU"], run["policy"], seconds, caches[key]["cache GB"], own))
        found[f"{name}, {number} steps: predicted"] = rows
    return found


def _row(gpu: str, policy: str, seconds: float, cache: float, steps: Rows) -> dict[str, Any]:
    rates = {f"samples / s on {count}": count / seconds for count in COUNTS}
    bounds = ", ".join(f"{step['step']} by {_bound(gpu, step)}" for step in steps)
    return {"policy": policy, "GPU": gpu, "s a sample": seconds, **rates, "cache GB a request": cache, "bound": bounds}


def _bound(gpu: str, step: dict[str, Any]) -> str:
    """What takes longest in a step."""
    from roofline import ASSUMED
    from roofline import GPUS as PUBLISHED

    card = PUBLISHED[gpu]
    shares = {
        "products": step["TFLOP of products"] / (card.rate * ASSUMED.products),
        "bytes": step["GB moved"] / (card.bandwidth * ASSUMED.memory),
        "launches": step["launches"] * ASSUMED.gap,
    }
    return max(shares, key=lambda name: shares[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="numbers of workers to measure")
    parser.add_argument("--requests", type=int, default=64)
    given = parser.parse_args()
    about = "GPUs are predicted, not measured, from roofline.json and paper_systems.json"
    sections = planned()
    if given.workers:
        title = f"batch on {hardware()}, {os.cpu_count()} cores shared with other work: measured"
        sections = {title: [measured(workers, given.requests) for workers in given.workers], **sections}
    save("scale", "cpu", sections, about=about)


if __name__ == "__main__":
    main()
