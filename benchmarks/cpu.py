"""CPU benchmark: does the clock fall as much as the FLOPs do, against a baseline compiled by the same Inductor?

    python benchmarks/cpu.py                     # all parts, about 40 minutes on 2 cores
    python benchmarks/cpu.py --parts partial     # some of: partial, scores, queries, runs, forecasts, …

All ratios come from one process with interleaved repeats. Results go to ``benchmarks/results/cpu.{json,md}``.
"""

import argparse
from functools import partial as bind
from typing import Any

import torch
from common import arguments, dit, interleaved, save

import toca_compile
from toca_compile import BlockCache, Composition, Fora, FullCompute, TaylorSeer, ToCa, preset
from toca_compile.policies import Every, Queries, Rule, Selector, Share

LONG = 10**6  # steps of a run that a benchmark never finishes: every call after the first is the same cached step
Rows = list[dict[str, Any]]


def cached(model: Any, ratio: float, inputs: dict[str, Any]) -> Any:
    """The model optimised and brought to its first cached step."""
    opt = toca_compile.optimize(model, ToCa(num_steps=64, interval=64, fresh_ratio=ratio, schedule="constant"))
    for _ in range(3):
        opt(**inputs)
    return opt


def partial(repeats: int) -> Rows:
    """Partial-step time over full-step time (compiled baseline) against the FLOP ratio."""
    rows: Rows = []
    for size, width in ((32, 384), (32, 1152), (64, 384), (64, 1152)):
        torch._dynamo.reset()
        model, inputs = dit(width, 4, size), arguments(2, size)
        baseline = torch.compile(model, dynamic=False)
        baseline(**inputs)
        full = toca_compile.optimize(model, FullCompute())
        full(**inputs)
        ratios = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)
        opts = {r: cached(model, r, inputs) for r in ratios}
        calls: dict[Any, Any] = {"baseline": bind(baseline, **inputs), "full": bind(full, **inputs)}
        calls |= {r: bind(o, **inputs) for r, o in opts.items()}
        median = interleaved(calls, repeats)
        for r, opt in opts.items():
            report = toca_compile.explain(opt)
            flops = float(report.flops("partial" if r else "reuse")) / float(report.flops("full"))
            clock = median[r] / median["baseline"]
            rows.append(
                {
                    "tokens": size * size // 4,
                    "width": width,
                    "K/n": r,
                    "FLOP ratio": flops,
                    "time ratio": clock,
                    "target": 1.1 * flops + 0.01,
                    "met": clock <= 1.1 * flops + 0.01,
                    "full step / baseline": median["full"] / median["baseline"],
                    "baseline ms": 1e3 * median["baseline"],
                }
            )
            print(rows[-1], flush=True)
    return rows


def scores(repeats: int) -> Rows:
    """What keeping caches and scores costs a full step: exact column sums, and every 4th query row."""
    rows: Rows = []
    for size, width, batch in ((32, 1152, 2), (64, 1152, 2), (136, 384, 1)):
        torch._dynamo.reset()
        model, inputs = dit(width, 4, size), arguments(batch, size)
        baseline = torch.compile(model, dynamic=False)
        baseline(**inputs)
        settings: dict[str, Any] = {
            "stored": Fora(2, 2),
            "stored, exact scores": ToCa(num_steps=2, interval=2, fresh_ratio=0.1, schedule="constant"),
            "stored, scores by every 4th row": ToCa(
                num_steps=2, interval=2, fresh_ratio=0.1, schedule="constant", score_stride=4
            ),
        }
        opts = {name: toca_compile.optimize(model, policy) for name, policy in settings.items()}

        def full_step(opt: Any, inputs: dict[str, Any] = inputs) -> None:
            opt._session.control.reset()
            opt(**inputs)

        for opt in opts.values():
            full_step(opt)
        calls = {"baseline": bind(baseline, **inputs)} | {name: bind(full_step, o) for name, o in opts.items()}
        median = interleaved(calls, repeats)
        rows += [
            {
                "tokens": size**2 // 4,
                "width": width,
                "full step": name,
                "time / baseline": median[name] / median["baseline"],
            }
            for name in opts
        ]
        print(rows[-3:], flush=True)
    return rows


def queries(repeats: int) -> Rows:
    """A step whose attention is partial and whose MLPs are reused, over a full one, for each way to have the keys."""
    rows: Rows = []
    for size in (32, 64):
        torch._dynamo.reset()
        model, inputs = dit(1152, 4, size), arguments(2, size)
        baseline = torch.compile(model, dynamic=False)
        baseline(**inputs)
        opts = {}
        for keys in ("fresh", "update", "keep"):
            for share in (1 / 8, 1 / 2):
                rule = Rule(Queries(keys), kinds=("self_attention",))
                which = Selector("random")
                policy = Composition(64, Every(64), (rule,), which=which, how_many=Share(share))
                opts[keys, share] = toca_compile.optimize(model, policy)
                for _ in range(3):
                    opts[keys, share](**inputs)
        calls: dict[Any, Any] = {"baseline": bind(baseline, **inputs)}
        median = interleaved(calls | {name: bind(opt, **inputs) for name, opt in opts.items()}, repeats)
        for (keys, share), opt in opts.items():
            report = toca_compile.explain(opt)
            rows.append(
                {
                    "tokens": size * size // 4,
                    "keys": keys,
                    "K/n": share,
                    "FLOP ratio": float(report.flops("partial")) / float(report.flops("full")),
                    "time ratio": median[keys, share] / median["baseline"],
                }
            )
            print(rows[-1], flush=True)
    return rows


def runs(repeats: int) -> Rows:
    """Whole samplings at DiT-XL/2 width and four of its layers, 256 tokens, guidance pair."""
    model, inputs = dit(1152, 4, 32), arguments(2, 32)
    policies: dict[str, Any] = {name: preset(name) for name in ("dit-xl-2/ddim-50", "dit-xl-2/ddpm-250")}
    return _runs(model, inputs, policies, repeats)


def forecasts(repeats: int) -> Rows:
    """The same with forecasts: of every site, and of the whole stack of blocks."""
    model, inputs = dit(1152, 4, 32), arguments(2, 32)
    policies: dict[str, Any] = {}
    for n in (3, 5):
        policies[f"TaylorSeer o2 N={n}"] = TaylorSeer(50, n, 2)
        policies[f"blocks, Newton o2 N={n}"] = BlockCache(50, 0, interval=n, order=2, basis="newton")
    return _runs(model, inputs, policies, repeats)


def _runs(model: Any, inputs: dict[str, Any], policies: dict[str, Any], repeats: int) -> Rows:
    rows: Rows = []
    for name, policy in policies.items():
        torch._dynamo.reset()
        baseline, opt = torch.compile(model, dynamic=False), toca_compile.optimize(model, policy)
        opt(**inputs)
        report = toca_compile.explain(opt)
        opt.reset()

        def run(f: Any, steps: int = policy.num_steps) -> None:
            for _ in range(steps):
                f(**inputs)

        run(baseline, 2)
        run(opt)
        calls = {"baseline": bind(run, baseline), "opt": bind(run, opt)}
        median = interleaved(calls, repeats)
        clock, flops = median["baseline"] / median["opt"], report.flop_speedup()
        rows.append(
            {
                "policy": name,
                "FLOP speed-up": flops,
                "latency speed-up": clock,
                "ratio": clock / flops,
                "target": 0.92,
                "cache MB": opt.cache_bytes / 2**20,
                "baseline s": median["baseline"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def dispatch(repeats: int) -> Rows:
    """Cost of one more block call beyond its arithmetic: blocks so small that nothing else is left."""
    times: dict[tuple[str, int], float] = {}
    for depth in (4, 28):
        torch._dynamo.reset()
        model, inputs = dit(64, depth, 4), arguments(1, 4)
        baseline, full = torch.compile(model, dynamic=False), toca_compile.optimize(model, FullCompute())
        reuse = toca_compile.optimize(model, Fora(10**4, 10**4))
        calls = {name: bind(f, **inputs) for name, f in (("whole", baseline), ("full", full), ("reuse", reuse))}
        for call in calls.values():
            for _ in range(20):
                call()
        times |= {(name, depth): t for name, t in interleaved(calls, 50 * repeats).items()}
    per = {name: (times[name, 28] - times[name, 4]) / 24 * 1e6 for name in ("whole", "full", "reuse")}
    rows: Rows = [
        {
            "µs per block": "whole graph compiled", "total": per["whole"], "dispatch": 0.0
        },
        {"µs per block": "full variant", "total": per["full"], "dispatch": per["full"] - per["whole"]},
        {"µs per block": "reuse variant", "total": per["reuse"], "dispatch": per["reuse"]},
    ]  # fmt: skip
    print(rows, flush=True)
    return rows


def host(repeats: int) -> Rows:
    """A step that computes no branch, of models so small that little but the host's work is left: it should not grow
    with the depth."""
    rows: Rows = []
    for depth in (12, 28, 57):
        torch._dynamo.reset()
        model, inputs = dit(64, depth, 4), arguments(1, 4)
        policies = {"reuse": Fora(10**4, 10**4), "skip": BlockCache(10**4, 0, interval=10**4)}
        opts = {name: toca_compile.optimize(model, policy) for name, policy in policies.items()}
        calls = {name: bind(opt, **inputs) for name, opt in opts.items()}
        for call in calls.values():
            for _ in range(20):
                call()
        median = interleaved(calls, 50 * repeats)
        rows.append({"depth": depth, **{f"{name} step µs": 1e6 * t for name, t in median.items()}, "target": 150.0})
        print(rows[-1], flush=True)
    return rows


PARTS = {
    "partial": partial, "scores": scores, "queries": queries, "runs": runs, "forecasts": forecasts,
    "dispatch": dispatch, "host": host,
}  # fmt: skip


def main() -> None:
    """Run the chosen parts and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    with torch.inference_mode():
        sections = {name: PARTS[name](3 if name in ("runs", "forecasts") else given.repeats) for name in given.parts}
    save("cpu", "cpu", sections)


if __name__ == "__main__":
    main()
