"""Requests that arrive at any time: the engine against one at a time, uncached batches, and batches that are fixed.

    python benchmarks/engine.py [--models dit flux] [--requests 12] [--out FILE.md]

Requests of several lengths arrive by a Poisson process, at shares of what fixed batches can do at most. The clock is
the processor time of this process, on one thread, and stands still while nobody waits: what else the machine does is
left out. All graphs are lowered without a compiler, and warm. Latencies are from arrival to result.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toca_compile import Engine, FullCompute, Request
from toca_compile.demo import fashion_dit
from toca_compile.policies.given import checked_policy
from toca_compile.serving.requests import Scheduled

STEPS = (10, 16, 24)
LOADS = (0.5, 0.8, 0.95, 1.2)
SIZES = (1, 2, 4, 8)

Make = Callable[[int], Request]


def dit() -> tuple[Any, Make]:
    """The shipped DiT, with guidance."""
    model, scheduler = fashion_dit.load(fashion_dit.default_model())
    sampler, none = Scheduled(scheduler, step={"eta": 0.0}), torch.tensor([model.config.num_embeds_ada_norm])

    def make(number: int) -> Request:
        noise = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(number))
        label = {"class_labels": torch.tensor([number % 10])}
        return Request(noise, label, STEPS[number % len(STEPS)], 1.5, {"class_labels": none}, number, sampler)

    return model, make


def flux() -> tuple[Any, Make]:
    """A small FLUX with random weights, 64 patches and 8 words."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    ids = torch.zeros(8, 8, 3)
    ids[..., 1], ids[..., 2] = torch.arange(8)[:, None], torch.arange(8)[None]
    shared = {"img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(8, 3)}

    def make(number: int) -> Request:
        given = torch.Generator().manual_seed(number)
        noise, words = torch.randn(1, 64, 16, generator=given), torch.randn(1, 8, 32, generator=given)
        text = {"encoder_hidden_states": words, "pooled_projections": torch.randn(1, 32, generator=given)}
        return Request(noise, text | shared, STEPS[number % len(STEPS)], seed=number)

    return model, make


@dataclass(frozen=True)
class Way:
    """How requests are served: by which policy, how many may be at work, and whether a batch is done before the next
    begins."""

    policy: Any
    most: int
    fixed: bool = False


def ways(policy: Any) -> dict[str, Way]:
    """The engine, and what it is held against."""
    return {
        "engine": Way(policy, 1 << 30),
        "one at a time": Way(policy, 1),
        "fixed batches": Way(policy, SIZES[-1], fixed=True),
        "engine, uncached": Way(FullCompute(), 1 << 30),
    }


def served(engine: Engine, way: Way, make: Make, arrivals: Sequence[float]) -> list[float]:
    """When each request was done."""
    now, done, waiting = 0.0, [0.0] * len(arrivals), list(range(len(arrivals)))
    working: dict[int, Any] = {}
    while waiting or working:
        if not (way.fixed and working):
            for number in [n for n in waiting if arrivals[n] <= now][: way.most - len(working)]:
                waiting.remove(number)
                working[number] = engine.submit(make(number), way.policy)
        if not working:
            now = arrivals[waiting[0]]
            continue
        began = time.process_time()
        engine.tick()
        now += time.process_time() - began
        finished = [n for n, ticket in working.items() if ticket.done()]
        if way.fixed and len(finished) < len(working):
            continue  # nobody has a result before all have
        for number in finished:
            working.pop(number).result()
            done[number] = now
    return done


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Arrivals at a rate."""
    draw, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        found.append(now)
    return found


def measure(name: str, policy: Any, count: int) -> list[str]:
    """The lines of a model's table."""
    model, make = {"dit": dit, "flux": flux}[name]()
    engine = Engine(model, policy, lowering="eager", sizes=SIZES)
    for meant in (policy, FullCompute()):
        engine.warm_up(make(0), STEPS, meant)
    for way in ways(policy).values():  # memory is touched once
        served(engine, way, make, [0.0] * SIZES[-1])
    lines = [f"### {name}, {count} requests of {', '.join(map(str, STEPS))} steps", ""]
    lines += ["| | requests a second, all there at once | " + " | ".join(f"p50 / p95 at {x:.0%}" for x in LOADS) + " |"]
    lines += ["| --- |" + " --- |" * (1 + len(LOADS))]
    most = {n: count / max(served(engine, way, make, [0.0] * count)) for n, way in ways(policy).items()}
    known = engine.graphs, engine.variants
    for label, way in ways(policy).items():
        cells = [f"{most[label]:.2f}"]
        for load in LOADS:
            arrivals = poisson(load * most["fixed batches"], count, seed=1)
            times = [end - at for end, at in zip(served(engine, way, make, arrivals), arrivals, strict=True)]
            cuts = statistics.quantiles(times, n=20, method="inclusive")
            cells.append(f"{statistics.median(times):.2f} / {cuts[-1]:.2f} s")
        lines.append(f"| {label} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    assert (engine.graphs, engine.variants) == known  # nothing was compiled on the way
    told = engine.statistics
    rows = f"{told.samples / told.calls:.2f} requests a call, {told.padded / told.samples:.1%} of rows nobody's"
    lines += ["", f"{rows}, {engine.cache_bytes / 2**20:.0f} MiB of caches at most.", ""]
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["dit", "flux"], choices=("dit", "flux"))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--policy", default="balanced")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Continuous batching with caches", "",
        f"`python benchmarks/engine.py`, torch {torch.__version__}, policy `{given.policy}`, batches of at most "
        f"{SIZES[-1]} requests; seconds are of the processor, one thread. Loads: shares of what fixed batches do.", "",
    ]  # fmt: skip
    for name in given.models:
        lines += measure(name, checked_policy(given.policy), given.requests)
    print("\n".join(lines))
    if given.out is not None:
        given.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
