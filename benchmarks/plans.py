"""Plans against even spacing, by the finished sample: searched on some classes or prompts, judged on others.

    python benchmarks/plans.py fashion_dit:10 emoji_flux:7 [--trials 200] [--seconds 900] [--samples 4]

Searches a plan for each model and number of full steps (on one seed of the first classes or prompts), writes it to
``plans/``, and samples three other seeds of other classes or prompts with it, with each rule at even spacing, with the
level of as many full steps, if there is one, and with the schedules of DPCache and CEM under the best rule of the
calibration. A model of pictures of any size is asked for larger ones, too, with the plan of those that it was made
for. Eager; nothing is timed. Goes on where an earlier run stopped; ``results/plans.md`` is written from all
plans that are there.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS
from rich.console import Console
from torch import Tensor
from trained import TRAINED

import toca_compile
from toca_compile import PlanningSettings, load_policy, save_policy
from toca_compile.ir.plan import Policy
from toca_compile.policies import LEVELS, Anchors, Composition, FullCompute, Level, Listed, Planned, Rule, SkipBlocks
from toca_compile.quality.calibration import least_squares
from toca_compile.quality.metrics import psnr
from toca_compile.quality.planning import RULES, _Recorded

PLANS = Path(__file__).resolve().parent / "plans"
SEEDS = (0, 1, 2)
SIDES = {"emoji_flux": 48}  # in pixels, of larger pictures
SAMPLES = {"fashion_dit": 6, "emoji_flux": 4}  # a seed: as many as there are classes or prompts beside four


def main() -> None:
    """Search, judge, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", help="MODEL:FULL_STEPS")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--judge-only", action="store_true", help="take the plans that are there")
    parser.add_argument("--out", type=Path, default=Path("toca-plans"))
    given = parser.parse_args()
    PLANS.mkdir(exist_ok=True)
    for text in given.wanted:
        name, budget = text.split(":")
        model, sampler = TRAINED[name].load()
        settings = PlanningSettings(
            steps=TRAINED[name].steps, samples=given.samples, trials=given.trials, seconds=given.seconds,
            console=Console(width=160),
        )  # fmt: skip
        plan, held_out = PLANS / f"{name}-{budget}.json", PLANS / f"{name}-{budget}.held-out.json"
        if given.judge_only:
            found = load_policy(plan)
            assert isinstance(found, Planned)
        else:
            found = toca_compile.plan(model, sampler, budget=int(budget), out=given.out / name, settings=settings)
        known = plan.exists() and held_out.exists() and load_policy(plan) == found
        save_policy(found, plan)
        judged = judge(name, found, settings, json.loads(held_out.read_text()) if known else {})
        held_out.write_text(json.dumps(judged, indent=1) + "\n")
    table()


def judge(
    name: str, found: Planned, settings: PlanningSettings, judged: dict[str, list[float]]
) -> dict[str, list[float]]:
    """PSNR in dB on held-out seeds and classes or prompts, one a seed, by row. ``judged``: those that are known."""
    steps, budget = found.num_steps, len(found.full)
    model, sampler = TRAINED[name].load(first=settings.samples)
    even = tuple(round(i * steps / budget) for i in range(budget))

    def composed(full: tuple[int, ...], rule: Any) -> Composition:
        return Composition(steps, Listed(full), (Rule(SkipBlocks(do=Anchors(rule, found.kept))),))

    rows: dict[str, Policy] = {"the plan": found.anyway("sampler")}
    rows |= {f"even, {_told(rule)}": composed(even, rule) for rule in RULES}
    rows["the plan's steps, FoCa"] = composed(found.full, RULES[-1])
    rows["even, the plan's weights"] = replace(found, full=even)
    recorded = _Recorded(*TRAINED[name].load(), settings)
    for what, full in (("DPCache", recorded.dpcache(budget)), ("CEM", recorded.cem(budget))):
        rows |= {f"{what}, {_told(rule)}": composed(full, rule) for rule in (RULES[1], RULES[2], RULES[-1])}
    fitted = least_squares(*TRAINED[name].load(), even, kept=found.kept, settings=settings)
    rows["even, L2P's weights by least squares"] = composed(even, fitted)
    for level in LEVELS:
        own = Level(level, steps, TRAINED[name].flow)
        if len(own.full_steps()) in (budget, budget + 1):
            rows[f'"{level}" ({len(own.full_steps())} full)'] = own

    opt = toca_compile.optimize(model, FullCompute(), lowering="eager")

    def compare(rows: dict[str, Policy], sampler: Any, suffix: str = "") -> None:
        def sampled(policy: Policy) -> list[Tensor]:
            opt.policy = policy
            return [sampler(opt, steps, seed, SAMPLES[name]) for seed in SEEDS]

        missing = {row + suffix: policy for row, policy in rows.items() if row + suffix not in judged}
        base = sampled(FullCompute()) if missing else []
        for row, policy in missing.items():
            judged[row] = [psnr(a, b) for a, b in zip(sampled(policy), base, strict=True)]
            print(f"{name} {budget}: {row}: {statistics.mean(judged[row]):.2f}", flush=True)

    compare(rows, sampler)
    if name in SIDES:
        larger = TRAINED[name].load(first=settings.samples, side=SIDES[name])[1]
        kept = {row: policy for row, policy in rows.items() if row.startswith(("the plan", "even", '"'))}
        any_size = {row: p.anyway("sampler", "size") if isinstance(p, Planned) else p for row, p in kept.items()}
        compare(any_size, larger, f", {SIDES[name]} pixels")
    return judged


def _told(rule: Any) -> str:
    names = {1: "reused", 2: "line", 3: "Newton o2"}
    return names.get(getattr(rule, "last", None) or 0) or {"Hermite": "HiCache", "Foca": "FoCa"}.get(
        type(rule).__name__, type(rule).__name__
    )


def table() -> None:
    """``results/plans.md``, from the plans and what was judged."""
    samples = ", ".join(f"{count} of {TRAINED[name].title}" for name, count in SAMPLES.items())
    lines = [
        "# Plans searched by the finished sample\n\nPSNR in dB to the uncached samples. Calibration: one seed of the "
        f"first four classes or prompts. Held out: {len(SEEDS)} seeds of others ({samples}), mean and "
        "spread over the seeds. All rows compute the same number of steps, but for levels. Written by "
        "`python benchmarks/plans.py`."
    ]
    for path in sorted(PLANS.glob("*.held-out.json")):
        plan = path.with_name(path.name.replace(".held-out", ""))
        found, judged = load_policy(plan), json.loads(path.read_text())
        assert isinstance(found, Planned)
        trained = TRAINED[plan.stem.rsplit("-", 1)[0]]
        told = ", ".join(f"{name} {value:.1f}" for name, value in found.found.items())
        lines.append(
            f"\n## {trained.title}: {len(found.full)} full steps of {found.num_steps}\n\n{trained.sampling}. On the "
            f"calibration samples: {told}. Full steps {', '.join(map(str, found.full))}.\n\n"
            "| held out | PSNR dB | ± |\n| --- | --- | --- |"
        )
        for row, values in sorted(judged.items(), key=lambda item: -statistics.mean(item[1])):
            lines.append(f"| {row} | {statistics.mean(values):.2f} | {statistics.stdev(values):.2f} |")
    (RESULTS / "plans.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
