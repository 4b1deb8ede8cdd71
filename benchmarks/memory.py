"""Peak memory of a sampling against the compiled model's own: is it that plus the declared caches?

    python benchmarks/memory.py                         # about 15 minutes on 2 cores: all is compiled
    python benchmarks/memory.py --models flux --device cuda

The peak is of what a sampling allocates beyond weights and inputs, everything compiled before: on a CPU the running sum
of the allocator's events, on a GPU what its allocator says. The goal is the model's own peak, the declared caches and
5 %: with the weights in both, as memory is bought, and without, which small models cannot hide behind. Results go to
``benchmarks/results/memory.{json,md}``.
"""

import argparse
from collections.abc import Callable
from functools import partial as bind
from typing import Any

import torch
from clock import MODELS
from common import save
from paper_systems import System, sample
from torch.profiler import ProfilerActivity, profile

import toca_compile
from toca_compile import BlockCache, Fora, FullCompute, TaylorSeer, ToCa

STEPS = 8
POLICIES: dict[str, Any] = {
    "nothing reused (FullCompute)": FullCompute(),
    "Fora": Fora(STEPS, 3),
    "ToCa, attention": ToCa(STEPS, 3, 0.1),
    "TaylorSeer, order 1": TaylorSeer(STEPS, 3, 1),
    "TaylorSeer, order 1, in bfloat16": TaylorSeer(STEPS, 3, 1, cache_dtype="bfloat16"),
    "TaylorSeer, order 1, in float8": TaylorSeer(STEPS, 3, 1, cache_dtype="float8_e4m3fn"),
    "blocks, order 1": BlockCache(STEPS, 0, interval=3, order=1),
}
Rows = list[dict[str, Any]]


def peak(call: Callable[[], Any], device: str) -> int:
    """Bytes that a call has allocated at once, at most, beyond what was there before."""
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.accelerator.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    events: Any = profiled.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(system: System, device: str) -> Rows:
    """A row for each policy."""
    torch._dynamo.reset()
    baseline = torch.compile(system.model, dynamic=False)
    run = bind(sample, system, baseline, STEPS)
    run()
    own = peak(run, device)
    weights = sum(p.numel() * p.element_size() for p in system.model.parameters())
    rows: Rows = []
    for name, policy in POLICIES.items():
        opt: Any = toca_compile.optimize(system.model, policy)
        run = bind(sample, system, opt, STEPS)
        run()  # compiles every variant
        run()  # whose timesteps have rows of the conditioning now
        opt.reset()
        most, caches = peak(run, device), toca_compile.explain(opt).cache_bytes
        rows.append({
            "model": system.name,
            "policy": name,
            "weights MB": weights / 1e6,
            "compiled MB": own / 1e6,
            "cached MB": most / 1e6,
            "declared caches MB": caches / 1e6,
            "share of (weights + compiled + declared), goal 1.05": (weights + most) / (weights + own + caches),
            "without weights": most / (own + caches),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure the chosen models and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    for name in given.models:
        with torch.device(given.device):
            system = MODELS[name]()
        with torch.no_grad():
            save("memory", given.device, {f"{system.name}, {system.size}": measure(system, given.device)})


if __name__ == "__main__":
    main()
