"""CUDA benchmark: equivalence first, then time. One command for a machine with a GPU.

    python benchmarks/gpu.py            # writes benchmarks/results/gpu.{json,md}

1. The rewritten graphs on CUDA against the dense reference, fp32 and bf16, eager and Inductor, with CUDA graphs and
   without: the third run, in which each step is a replay.
2. DiT-XL/2 with random bf16 weights at 256² and 512² (256 and 1024 tokens), batch 2 and 32: full, partial and
   end-to-end times against the compiled baseline, both with ``mode="reduce-overhead"``.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial as bind
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import arguments, begun, dit, interleaved, save

import toca_compile
from toca_compile import FullCompute, ToCa, preset

Rows = list[dict[str, Any]]


def equivalence() -> Rows:
    """Largest relative difference of a 12-step run from the dense reference in the same dtype."""
    rows: Rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for lowering, mode in product(("eager", "inductor"), ("default", "reduce-overhead")):
            torch._dynamo.reset()
            model = dit(144, 3, 16, "cuda", dtype)
            policy = ToCa(num_steps=12, interval=4, fresh_ratio=0.3, schedule="constant", bonus=0.0, score="none")
            runs = {}
            for way in ("dense", lowering):
                opt = toca_compile.optimize(model, policy, lowering=way, mode="default" if way == "dense" else mode)
                for _ in range(1 if way == "dense" else 3):
                    runs[way] = sampled(opt, dtype)
            graphs = toca_compile.explain(opt).cuda_graphs
            error = (runs[lowering] - runs["dense"]).norm() / runs["dense"].norm()
            bound = 1e-4 if dtype is torch.float32 else 3e-2
            rows.append(
                {
                    "dtype": str(dtype),
                    "lowering": lowering,
                    "CUDA graphs": graphs,
                    "error": float(error),
                    "passed": bool(error < bound and (graphs > 0) == (mode == "reduce-overhead")),
                }
            )
            print(rows[-1], flush=True)
    return rows


def sampled(opt: Any, dtype: torch.dtype) -> torch.Tensor:
    """What the model said at each of 12 steps."""
    inputs = arguments(2, 16, "cuda", dtype)
    x, outs = inputs.pop("hidden_states"), []
    x = torch.ones_like(x) * torch.linspace(-1, 1, x.shape[-1], device="cuda", dtype=dtype)
    for _ in range(12):
        out = opt(hidden_states=x, **inputs).sample
        x = x - 0.05 * out[:, :4]
        outs.append(out.float())
    return torch.stack(outs)


def run(model: Any, inputs: dict[str, Any], steps: int) -> None:
    """The model calls of a sampling, at timesteps that lie where the model does."""
    own = inputs | {"timestep": None}
    for t in begun(model, torch.linspace(999, 0, steps, device="cuda").long()):
        own["timestep"] = t.expand(len(inputs["timestep"]))
        model(**own)


def by_kind(opt: Any, inputs: dict[str, Any], steps: int) -> dict[str, float]:
    """Median seconds of each kind of step in a run, as the run itself records them."""
    run(opt, inputs, steps)
    times: dict[str, list[float]] = {}
    for record in opt.steps:
        times.setdefault(record.kind.value, []).append(record.seconds)
    return {kind: statistics.median(seconds) for kind, seconds in times.items()}


def speed(repeats: int) -> Rows:
    """Step and run times with CUDA graphs on for both."""
    rows: Rows = []
    for size in (32, 64):
        for batch in (2, 32):
            torch._dynamo.reset()
            model = dit(1152, 28, size, "cuda", torch.bfloat16)
            inputs = arguments(batch, size, "cuda", torch.bfloat16)
            baseline = torch.compile(model, dynamic=False, mode="reduce-overhead")
            for _ in range(4):
                baseline(**inputs)
            for name in ("dit-xl-2/ddim-50", "dit-xl-2/ddpm-250"):
                opt = toca_compile.optimize(model, preset(name), mode="reduce-overhead")
                launched = toca_compile.optimize(model, preset(name))
                steps = preset(name).num_steps
                for _ in range(3):  # a step is run, then recorded, then replayed
                    run(opt, inputs, steps)
                run(launched, inputs, steps)
                kinds = by_kind(opt, inputs, steps)
                report = toca_compile.explain(opt)
                calls: dict[Any, Callable[[], Any]] = {
                    "baseline": bind(baseline, **inputs),
                    "baseline run": bind(run, baseline, inputs, steps),
                    "run": bind(run, opt, inputs, steps),
                    "launched run": bind(run, launched, inputs, steps),
                }
                median = interleaved(calls, repeats, "cuda")
                clock, flops = median["baseline run"] / median["run"], report.flop_speedup()
                rows.append(
                    {
                        "tokens": size * size // 4,
                        "batch": batch,
                        "preset": name,
                        "steps": str(report.step_counts),
                        "CUDA graphs": report.cuda_graphs,
                        "baseline step ms": 1e3 * median["baseline"],
                        **{f"{kind} step / baseline": kinds[kind] / median["baseline"] for kind in kinds},
                        "FLOP speed-up": flops,
                        "latency speed-up": clock,
                        "ratio": clock / flops,
                        "without CUDA graphs": median["baseline run"] / median["launched run"],
                        "cache MB": opt.cache_bytes / 2**20,
                    }
                )
                print(rows[-1], flush=True)
                del opt, launched, calls
                torch.cuda.empty_cache()
    return rows


def main() -> int:
    """Equivalence, then speed; 1 where an equivalence fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only-equivalence", action="store_true")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    with torch.inference_mode():
        same = equivalence()
        # A plain full pass through our path must cost what the baseline's does.
        toca_compile.optimize(dit(144, 2, 16, "cuda"), FullCompute())(**arguments(2, 16, "cuda"))
        fast = [] if given.only_equivalence else speed(given.repeats)
    save("gpu", "cuda", {"equivalence": same, "speed": fast})
    return 0 if all(r["passed"] for r in same) else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
