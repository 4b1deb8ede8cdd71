"""Which policy at which budget: searched on a few samples of each trained model, judged on others, then timed.

    python benchmarks/what_to_use.py judge  # eager, PSNR: about 20 minutes on 2 cores
    python benchmarks/what_to_use.py time   # those that were best, compiled: about 10 minutes, with nothing beside it

Candidates are one forecast of all blocks by every rule there is, and every way to lay the full steps. At each budget of
FLOPs the three that are best on one calibration seed are judged on three seeds of other classes or prompts, beside as
few steps without caching as cost the same. ``results/what_to_use.{json,md}``.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from functools import partial as bind
from typing import Any

import torch
from common import RESULTS, interleaved
from torch import Tensor
from trained import TRAINED, Trained

import toca_compile
from toca_compile import FullCompute
from toca_compile.policies import Anchors, Composition, EndAligned, Every, Rule, SkipBlocks, Spread
from toca_compile.policies.anchors import Chebyshev, Foca, Hermite, Polynomial, Taylor
from toca_compile.policies.storage import load_policy, save_policy
from toca_compile.quality.metrics import psnr

BUDGETS = (2, 3, 4, 5, 7)
FALLS_SHORT = 0.88  # of the budget: runs of few full steps have one more, or none
CALIBRATION, SEEDS, SAMPLES = 100, (0, 1, 2), 4
FOUND = RESULTS / "what_to_use.json"
RULES: dict[str, tuple[Any, int]] = {
    "reused": (Polynomial(), 1), "line": (Polynomial(), 2), "Newton o2": (Polynomial(), 3),
    "Newton o3": (Polynomial(), 4), "Taylor o2": (Taylor(), 3), "HiCache": (Hermite(), 3), "FoCa": (Foca(), 3),
    "Spectrum": (Chebyshev(local=0.5), 6),
}  # fmt: skip


def candidates(steps: int, budget: int) -> Iterator[tuple[str, Composition]]:
    """Every rule with every schedule."""
    schedules = {
        f"Every({budget})": Every(budget), f"Spread({budget})": Spread(budget),
        f"Spread({budget}, 0.9)": Spread(budget, 0.9), f"EndAligned({budget}, 1)": EndAligned(budget, 1),
        f"EndAligned({budget}, 2)": EndAligned(budget, 2),
    }  # fmt: skip
    told = set()
    for when, laid in schedules.items():
        if (full := Composition(steps, laid).full_steps()) in told:  # of some lengths several are one
            continue
        told.add(full)
        for name, (weights, kept) in RULES.items():
            rule = Rule(SkipBlocks(do=Anchors(weights, kept)))
            yield f"{name}, {when}", Composition(steps, laid, (rule,)).for_run(steps, guided=False)


class Judge:
    """One trained model, traced once, with its uncached samples."""

    def __init__(self, trained: Trained) -> None:
        self.steps = trained.steps
        self.model, self.sampler = trained.load()
        self.held_out, self.other = trained.load(first=SAMPLES)
        self.opt = toca_compile.optimize(self.model, FullCompute(), lowering="eager")
        self.reference = {CALIBRATION: self.sampled(self.model, self.steps, CALIBRATION)}
        self.reference |= {seed: self.sampled(self.model, self.steps, seed) for seed in SEEDS}

    def sampled(self, model: Any, steps: int, seed: int) -> Tensor:
        """Samples of one seed: other classes or prompts than those of the calibration."""
        sampler = self.sampler if seed == CALIBRATION else self.other
        samples: Tensor = sampler(model, steps, seed, SAMPLES)
        return samples

    def at(self, policy: Composition, seed: int) -> float:
        """PSNR in dB to the uncached samples."""
        self.opt.policy = policy
        return psnr(self.sampled(self.opt, self.steps, seed), self.reference[seed])

    def speedup(self) -> float:
        """Of the FLOPs, in the last sampling."""
        return toca_compile.explain(self.opt).flop_speedup()

    def fewer(self, steps: int) -> list[float]:
        """The same of fewer steps without caching, held out."""
        return [psnr(self.sampled(self.model, steps, seed), self.reference[seed]) for seed in SEEDS]


def judge(name: str, found: dict[str, Any]) -> None:
    """The three best policies of one model at each budget."""
    of = Judge(TRAINED[name])
    for budget in BUDGETS:
        if f"{name} {budget}" in found:  # by an earlier run
            continue
        rows = []
        for told, policy in candidates(of.steps, budget):
            dB = of.at(policy, CALIBRATION)
            rows.append((dB, of.speedup(), told, policy))
            print(f"{name} {budget}: {told}: {rows[-1][1]:.2f} × {dB:.2f} dB", flush=True)
        best = sorted((row for row in rows if row[1] >= FALLS_SHORT * budget), key=lambda row: -row[0])[:3]
        held = [[of.at(policy, seed) for seed in SEEDS] for *_, policy in best]
        first = max(range(len(held)), key=lambda i: statistics.mean(held[i]))
        save_policy(best[first][3], RESULTS.parent / "policies" / f"{name}-{budget}.json")
        found[f"{name} {budget}"] = {
            "rows": [
                {"policy": told, "flops": flops, "calibration": dB, "held out": values}
                for (dB, flops, told, _), values in zip(best, held, strict=True)
            ],
            "steps": round(of.steps / best[first][1]),
            "fewer": of.fewer(round(of.steps / best[first][1])),
        }
        FOUND.write_text(json.dumps(found, indent=1) + "\n")


def time(name: str, found: dict[str, Any], repeats: int) -> None:
    """Latency of the best at each budget against the compiled model, in turns."""
    trained = TRAINED[name]
    model, sampler = trained.load()
    baseline = torch.compile(model, dynamic=False)
    for budget in BUDGETS:
        policy = load_policy(RESULTS.parent / "policies" / f"{name}-{budget}.json")
        opt = toca_compile.optimize(model, policy)
        runs = {
            what: bind(sampler, of, trained.steps, CALIBRATION, SAMPLES)
            for what, of in (("baseline", baseline), ("opt", opt))
        }
        for run in (*runs.values(), runs["opt"]):
            run()
        median = interleaved(runs, repeats)
        found[f"{name} {budget}"]["seconds"] = [median["baseline"], median["opt"]]
        FOUND.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name} {budget}: {median}", flush=True)


def table(found: dict[str, Any]) -> None:
    """``results/what_to_use.md``."""
    lines = [
        "# What to use",
        "",
        f"The best of {len(RULES) * 5} policies at each budget of FLOPs: chosen on one seed, PSNR to the uncached "
        f"samples on {len(SEEDS)} seeds of other classes or prompts ({SAMPLES} samples each, mean ± spread of the "
        "seeds), beside as few steps without caching as cost the same. Latency: 2 cores of a Xeon, both compiled, "
        "medians of turns. Small models, trained here: for yours `toca_compile.evaluate` makes such a table, and "
        "`toca_compile.plan` may find more. Each is in `benchmarks/policies/`, for `toca_compile.load_policy`. Written "
        "by `python benchmarks/what_to_use.py`.",
    ]
    for name, trained in TRAINED.items():
        lines += ["", f"## {trained.title}", "", f"{trained.sampling}, {trained.steps} steps.", ""]
        lines += [
            "| budget | forecast, full steps | FLOPs × | latency × | PSNR dB | fewer steps | next best |",
            "|" + " --- |" * 7,
        ]
        for budget in BUDGETS:
            row = found.get(f"{name} {budget}")
            if row is None:
                continue
            first, *others = sorted(row["rows"], key=lambda r: -statistics.mean(r["held out"]))
            others = [other for other in others if other["held out"] != first["held out"]]
            before, after = row.get("seconds", (0.0, 0.0))
            faster = f"{before / after:.2f}" if after else "–"
            next_best = f"{others[0]['policy']}: {statistics.mean(others[0]['held out']):.1f}" if others else "–"
            lines.append(
                f"| {budget} × | **{first['policy']}** | {first['flops']:.2f} | {faster} "
                f"| **{_spread(first['held out'])}** | {_spread(row['fewer'])} ({row['steps']}) | {next_best} |"
            )
    (RESULTS / "what_to_use.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Judge, time, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", choices=["judge", "time", []], help="nothing: only write the table")
    parser.add_argument("--models", choices=list(TRAINED), nargs="+", default=list(TRAINED))
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    with torch.no_grad():
        for name in given.models:
            if "judge" in given.work:
                judge(name, found)
            if "time" in given.work:
                time(name, found, given.repeats)
    table(found)


if __name__ == "__main__":
    main()
