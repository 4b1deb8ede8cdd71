"""CUDA benchmark: equivalence first, then time. One command for a machine with a GPU.

    python benchmarks/gpu.py            # writes benchmarks/results/gpu.{json,md}

1. The rewritten graphs on CUDA against the dense reference, fp32 and bf16, eager and Inductor.
2. DiT-XL/2 with random bf16 weights at 256² and 512² (256 and 1024 tokens), batch 2 and 32: full, partial and
   end-to-end times against the compiled baseline. The baseline runs with CUDA graphs (``mode="reduce-overhead"``). Ours
   captures each distinct step of the plan as one CUDA graph.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial as bind
from pathlib import Path
from typing import Any

import torch
from common import arguments, dit, interleaved, save

import toca_compile
from toca_compile import FullCompute, ToCa, preset

Rows = list[dict[str, Any]]


def equivalence() -> Rows:
    """Largest relative difference of a 12-step run from the dense reference in the same dtype."""
    rows: Rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for lowering in ("eager", "inductor"):
            torch._dynamo.reset()
            model = dit(144, 3, 16, "cuda", dtype)
            policy = ToCa(num_steps=12, interval=4, fresh_ratio=0.3, schedule="constant", bonus=0.0, score="none")
            runs = {}
            for way in ("dense", lowering):
                opt = toca_compile.optimize(model, policy, lowering=way)
                inputs = arguments(2, 16, "cuda", dtype)
                x, outs = inputs.pop("hidden_states"), []
                x = torch.ones_like(x) * torch.linspace(-1, 1, x.shape[-1], device="cuda", dtype=dtype)
                for _ in range(12):
                    out = opt(hidden_states=x, **inputs).sample
                    x = x - 0.05 * out[:, :4]
                    outs.append(out.float())
                runs[way] = torch.stack(outs)
            error = (runs[lowering] - runs["dense"]).norm() / runs["dense"].norm()
            bound = 1e-4 if dtype is torch.float32 else 3e-2
            rows.append(
                {"dtype": str(dtype), "lowering": lowering, "error": float(error), "passed": bool(error < bound)}
            )
            print(rows[-1], flush=True)
    return rows


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as one CUDA graph: its inputs and buffers keep their addresses, so a replay is the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def in_turn(calls: Sequence[Callable[[], Any]]) -> None:
    """One after the other."""
    for call in calls:
        call()


def at_step(opt: Any, index: int) -> Callable[[], Any]:
    """The compiled graph's own call at one step of the plan, with static inputs."""
    executor = opt._session.executors[0]
    run = next(iter(opt._session.control.runs))
    key = next(iter(run.last))
    inputs = opt._captured_inputs

    def call() -> Any:
        run.step, run.last[key] = index, index - 1
        return executor._execute(inputs, run, key)

    return call


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
                opt = toca_compile.optimize(model, preset(name))
                steps = preset(name).num_steps
                record_inputs(opt)
                for _ in range(steps + 1):  # the last step frees its run's caches; the next one is replayed
                    opt(**inputs)
                report = toca_compile.explain(opt)
                replays = [graphed(at_step(opt, i)) for i in range(steps)]
                planned = [step.kind.value for step in report.plans[0].steps]
                first = {kind: planned.index(kind) for kind in report.step_counts}
                calls: dict[Any, Callable[[], Any]] = {
                    "baseline": bind(baseline, **inputs),
                    "baseline run": bind(in_turn, [bind(baseline, **inputs)] * steps),
                    "run": bind(in_turn, replays),
                    "eager-dispatch run": bind(in_turn, [bind(opt, **inputs)] * steps),
                }
                calls |= {kind: replays[i] for kind, i in first.items()}
                median = interleaved(calls, repeats, "cuda")
                clock, flops = median["baseline run"] / median["run"], report.flop_speedup()
                rows.append(
                    {
                        "tokens": size * size // 4,
                        "batch": batch,
                        "preset": name,
                        "steps": str(report.step_counts),
                        "baseline step ms": 1e3 * median["baseline"],
                        **{f"first {kind} step / baseline": median[kind] / median["baseline"] for kind in first},
                        "FLOP speed-up": flops,
                        "latency speed-up": clock,
                        "ratio": clock / flops,
                        "without CUDA graphs": median["baseline run"] / median["eager-dispatch run"],
                        "cache MB": opt.cache_bytes / 2**20,
                    }
                )
                print(rows[-1], flush=True)
                del opt, replays, calls
                torch.cuda.empty_cache()
    return rows


def record_inputs(opt: Any) -> None:
    """Keep the flat inputs that Dynamo hands to the executor: the addresses that a CUDA graph replays."""
    from toca_compile.runtime.executor import Executor

    original = Executor.__call__

    def call(self: Any, *args: Any) -> Any:
        object.__setattr__(opt, "_captured_inputs", args)
        Executor.__call__ = original  # type: ignore[method-assign]
        return original(self, *args)

    Executor.__call__ = call  # type: ignore[method-assign]


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
