"""Which policy at which budget: searched on a few samples of each trained model, judged on others, then timed.

    python benchmarks/what_to_use.py judge  # eager, PSNR: about an hour on 2 cores
    python benchmarks/what_to_use.py time   # those that were best, compiled: about 10 minutes, with nothing beside it

Candidates are one forecast of all blocks by every rule there is, and every way to lay the full steps. Of some rules, at
the two schedules that they are best with, a computed step also makes up for a share of what was wrong before it, by as
much as the sampler moves at each step, or, with the best share, all steps alike ("even"). At each budget of FLOPs, of
the three that are best on one calibration seed, that which is best on two is judged on three seeds of other classes or
prompts, beside the best that corrects nothing, and as few steps without caching as cost the same.
``results/what_to_use.{json,md}``.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial as bind
from typing import Any, NamedTuple

import torch
from common import RESULTS, interleaved
from torch import Tensor
from trained import TRAINED, Trained

import toca_compile
from toca_compile import FullCompute
from toca_compile.ir.signature import Signature
from toca_compile.policies import Anchors, Composition, EndAligned, Every, Rule, SkipBlocks, Spread
from toca_compile.policies.anchors import Chebyshev, Foca, Hermite, Polynomial, Taylor
from toca_compile.policies.storage import load_policy, save_policy
from toca_compile.quality.metrics import psnr

BUDGETS = (2, 3, 4, 5, 7)
FALLS_SHORT = 0.88  # of the budget: runs of few full steps have one more, or none
CALIBRATION, SEEDS, SAMPLES = (100, 101), (0, 1, 2), 4
FOUND = RESULTS / "what_to_use.json"
RULES: dict[str, tuple[Any, int]] = {
    "reused": (Polynomial(), 1), "line": (Polynomial(), 2), "Newton o2": (Polynomial(), 3),
    "Newton o3": (Polynomial(), 4), "Taylor o2": (Taylor(), 3), "HiCache": (Hermite(), 3), "FoCa": (Foca(), 3),
    "Spectrum": (Chebyshev(local=0.5), 6),
}  # fmt: skip
CORRECTED = ("Newton o2", "Newton o3", "HiCache", "FoCa")
BEHIND = 8  # dB of the best, beyond which a rule is not corrected: that gains less
SHARES = {"¼": 0.25, "½": 0.5, "¾": 0.75}


class Tried(NamedTuple):
    """A policy with its PSNR on the calibration seed."""

    dB: float
    flops: float
    rule: str
    when: str
    corrected: str
    policy: Composition

    @property
    def name(self) -> str:
        return f"{self.rule}{self.corrected}, {self.when}"


def plain(steps: int, budget: int) -> Iterator[tuple[str, str, Composition]]:
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
            yield name, when, Composition(steps, laid, (rule,)).for_run(steps, guided=False)


def corrected(tried: Tried) -> Iterator[tuple[str, Composition]]:
    """The same, corrected."""
    for told, share in SHARES.items():
        do = Anchors(*RULES[tried.rule], correct=share)
        yield f" corrected {told}", replace(tried.policy, rules=(Rule(SkipBlocks(do=do)),))


def evened(tried: Tried) -> tuple[str, str, str, Composition]:
    """The same, corrected as if the sampler moved as far at each step."""
    policy = tried.policy.for_call(Signature(moves=(1.0,) * tried.policy.num_steps))
    return tried.rule, tried.when, f"{tried.corrected} even", policy


class Judge:
    """One trained model, traced once, with its uncached samples."""

    def __init__(self, trained: Trained) -> None:
        self.steps = trained.steps
        self.model, self.sampler = trained.load()
        self.held_out, self.other = trained.load(first=SAMPLES)
        self.opt = toca_compile.optimize(self.model, FullCompute(), lowering="eager")
        self.reference = {seed: self.sampled(self.model, self.steps, seed) for seed in (*CALIBRATION, *SEEDS)}

    def sampled(self, model: Any, steps: int, seed: int) -> Tensor:
        """Samples of one seed: other classes or prompts than those of the calibration."""
        sampler = self.sampler if seed in CALIBRATION else self.other
        samples: Tensor = sampler(model, steps, seed, SAMPLES)
        return samples

    def at(self, policy: Composition, seed: int) -> float:
        """PSNR in dB to the uncached samples."""
        self.opt.policy = policy
        return psnr(self.sampled(self.opt, self.steps, seed), self.reference[seed])

    def tried(self, rule: str, when: str, way: str, policy: Composition) -> Tried:
        """A policy on the first calibration seed."""
        row = Tried(self.at(policy, CALIBRATION[0]), self.speedup(), rule, when, way, policy)
        print(f"{row.name}: {row.flops:.2f} × {row.dB:.2f} dB", flush=True)
        return row

    def best(self, rows: list[Tried]) -> list[Tried]:
        """The three best on the first calibration seed, the best on both in front."""
        return sorted(sorted(rows, reverse=True)[:3], key=lambda row: -row.dB - self.at(row.policy, CALIBRATION[1]))

    def judged(self, row: Tried) -> dict[str, Any]:
        """What there is to say of a policy."""
        held_out = [self.at(row.policy, seed) for seed in SEEDS]
        return {"policy": row.name, "flops": row.flops, "calibration": row.dB, "held out": held_out}

    def speedup(self) -> float:
        """Of the FLOPs, in the last sampling."""
        return toca_compile.explain(self.opt).flop_speedup()

    def fewer(self, steps: int) -> list[float]:
        """The same of fewer steps without caching, held out."""
        return [psnr(self.sampled(self.model, steps, seed), self.reference[seed]) for seed in SEEDS]


def judge(name: str, found: dict[str, Any]) -> None:
    """The best policies of one model at each budget."""
    of = Judge(TRAINED[name])
    for budget in BUDGETS:
        if f"{name} {budget}" in found:  # by an earlier run
            continue
        rows = [of.tried(rule, when, "", policy) for rule, when, policy in plain(of.steps, budget)]
        rows = [row for row in rows if row.flops >= FALLS_SHORT * budget]
        for rule in CORRECTED:
            of_rule = sorted((row for row in rows if row.rule == rule), reverse=True)[:2]
            for row in of_rule if of_rule[0].dB > max(rows).dB - BEHIND else []:
                own = [of.tried(rule, row.when, way, policy) for way, policy in corrected(row)]
                rows += own
                if not TRAINED[name].flow:  # whose steps are of one length
                    rows.append(of.tried(*evened(max(own))))
        best, as_it_is = of.best(rows), of.best([row for row in rows if not row.corrected])
        save_policy(best[0].policy, RESULTS.parent / "policies" / f"{name}-{budget}.json")
        steps = round(of.steps / best[0].flops)
        found[f"{name} {budget}"] = {
            "rows": [of.judged(row) for row in best], "plain": of.judged(as_it_is[0]), "steps": steps,
            "fewer": of.fewer(steps),
        }  # fmt: skip
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
            what: bind(sampler, of, trained.steps, CALIBRATION[0], SAMPLES)
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
        f"The best of {len(RULES) * 5} policies at each budget of FLOPs, and of the better of them corrected: of the "
        "three that were best on one seed that which is best on two. PSNR to the uncached samples on "
        f"{len(SEEDS)} seeds of other classes or prompts ({SAMPLES} samples each, mean ± spread of the seeds), beside "
        "the best of those that correct nothing, chosen in the same way, and as few steps without caching as cost the "
        "same. *Corrected*: by that share, `Anchors(…, correct=…)`; *even*: with all steps alike. Latency: 2 cores of "
        "an EPYC, both compiled, medians of turns. Small models, trained here: for yours `toca_compile.evaluate` makes "
        "such a table, and `toca_compile.plan` may find more. Each is in `benchmarks/policies/`, for "
        "`toca_compile.load_policy`. Written by `python benchmarks/what_to_use.py`.",
    ]
    for name, trained in TRAINED.items():
        lines += ["", f"## {trained.title}", "", f"{trained.sampling}, {trained.steps} steps.", ""]
        lines += [
            "| budget | forecast, full steps | FLOPs × | latency × | PSNR dB | not corrected | fewer steps "
            "| next best |",
            "|" + " --- |" * 8,
        ]
        for budget in BUDGETS:
            row = found.get(f"{name} {budget}")
            if row is None:
                continue
            first, *others = row["rows"]
            others = [other for other in others if other["held out"] != first["held out"]]
            as_it_is = row["plain"]
            before, after = row.get("seconds", (0.0, 0.0))
            faster = f"{before / after:.2f}" if after else "–"
            next_best = f"{others[0]['policy']}: {statistics.mean(others[0]['held out']):.1f}" if others else "–"
            lines.append(
                f"| {budget} × | **{first['policy']}** | {first['flops']:.2f} | {faster} "
                f"| **{_spread(first['held out'])}** | {as_it_is['policy']}: {_spread(as_it_is['held out'])} "
                f"| {_spread(row['fewer'])} ({row['steps']}) | {next_best} |"
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
