"""What each level costs and keeps: the trained models sampled at several numbers of steps.

    python benchmarks/levels.py [--models NAME …] [--steps 4 8 20 28 50] [--seeds 0 1] [--samples 4] [--out FILE.md]
    python benchmarks/levels.py --rules --seeds 3 4 --out FILE.md  # each level's steps, forecast by other rules

PSNR to the uncached samples of the same steps, in dB for values in [−1, 1], mean over seeds; and how many steps each
level computes. Nothing is timed. Beside each level stand the schedules that it was chosen among: another warm-up, full
steps counted from the start, and a last step that is computed, or is not where the level's is.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from trained import TRAINED, Trained

import toca_compile
from toca_compile.ir.plan import Policy
from toca_compile.policies import LEVELS, Anchors, Composition, Every, FullCompute, Level, Listed, Rule, SkipBlocks
from toca_compile.policies.anchors import Foca, Hermite, Polynomial, Taylor
from toca_compile.policies.schedules import end_aligned_steps
from toca_compile.quality.metrics import psnr

Alternatives = Mapping[str, Composition | None]  # to a level, by name; None where there is none of this level


def main() -> None:
    """Parse, sample, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(TRAINED), nargs="+", default=list(TRAINED))
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20, 28, 50])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/levels.md"))
    parser.add_argument("--levels", choices=LEVELS, nargs="+", default=LEVELS)
    parser.add_argument("--rules", action="store_true", help="other rules in the place of other schedules")
    given = parser.parse_args()
    lines = [
        f"# Levels on the trained models\n\n{len(given.seeds)} seeds of {given.samples} samples, PSNR in dB to the "
        "uncached samples (steps computed in brackets). Written by `python benchmarks/levels.py`."
    ]
    for name in given.models:
        alternatives = _by_rule if given.rules else _by_schedule
        lines += _section(TRAINED[name], given, alternatives)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _by_schedule(level: Level) -> Alternatives:
    """The schedules that a level was chosen among."""
    steps, interval, warmup = level.num_steps, level.when.interval, level.when.warmup
    return {
        "warm-up + 1": _listed(level, end_aligned_steps(steps, interval, warmup + 1)),
        "warm-up − 1": _listed(level, end_aligned_steps(steps, interval, warmup - 1)) if warmup > 1 else None,
        "from the start": _composed(level, Every(interval, warmup)),
        "last step as well, or not": _listed(level, sorted({*level.full_steps()} ^ {steps - 1})),
    }


def _by_rule(level: Level) -> Alternatives:
    """The level's own steps, forecast by each rule."""
    rules = {
        "line": (Polynomial(), 2), "Newton o2": (Polynomial(), 3), "Newton o3": (Polynomial(), 4),
        "Taylor o2": (Taylor(), 3), "HiCache": (Hermite(), 3), "FoCa": (Foca(), 3),
    }  # fmt: skip
    return {
        name: replace(level.choices[0], rules=(Rule(SkipBlocks(do=Anchors(by, kept))),))
        for name, (by, kept) in rules.items()
    }


def _section(trained: Trained, given: argparse.Namespace, alternatives: Callable[[Level], Alternatives]) -> list[str]:
    """One model's table."""
    model, sampler = trained.load()
    opt = toca_compile.optimize(model, FullCompute(), lowering="eager")

    def sampled(policy: Policy, steps: int) -> list[torch.Tensor]:
        opt.policy = policy
        return [sampler(opt, steps, seed, given.samples) for seed in given.seeds]

    others = tuple(alternatives(Level("balanced", 50)))
    lines = [
        f"\n## {trained.title}\n\n{trained.sampling}.\n",
        f"| steps | level | the level | {' | '.join(others)} |",
        "|---|---|---|" + "---|" * len(others),
    ]
    for steps in given.steps:
        base = sampled(FullCompute(), steps)
        for name in given.levels:
            level = Level(name, steps, trained.flow)
            if len(level.full_steps()) == steps:
                lines.append(f"| {steps} | {name} | all computed{' |' * (len(others) + 1)}")
                continue
            policies = (level, *alternatives(level).values())
            row = ["–" if p is None else _cell(base, sampled(p, steps), p) for p in policies]
            lines.append(f"| {steps} | {name} | {' | '.join(row)} |")
            print(lines[-1], flush=True)
    return lines


def _composed(level: Level, when: Every | Listed) -> Composition:
    return replace(level.choices[0], when=when)


def _listed(level: Level, full: tuple[int, ...] | list[int]) -> Composition:
    return _composed(level, Listed(tuple(full)))


def _cell(base: list[torch.Tensor], found: list[torch.Tensor], policy: Level | Composition) -> str:
    if all(torch.equal(a, b) for a, b in zip(base, found, strict=True)):
        return f"the model itself ({len(policy.full_steps())})"
    mean = statistics.mean(psnr(a, b) for a, b in zip(base, found, strict=True))
    return f"{mean:.1f} ({len(policy.full_steps())})"


if __name__ == "__main__":
    main()
