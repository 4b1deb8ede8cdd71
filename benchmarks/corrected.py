"""Corrected: what it gains to mend, at a computed step, what the steps left out before it did wrong; simulated on the
eager models.

    python benchmarks/corrected.py [--models NAME …] [--seeds 3 4] [--samples 4]

Between computed steps p and j what all blocks add to the stream is forecast, from computed steps up to p. At j it is
known better what it was at the steps i between: the polynomial through the values at j and before, at i. The sampler
has moved the picture by Δσᵢ times what it was told at i, so that j, which moves it by Δσⱼ, is told ::

    R'ⱼ = Rⱼ + κ Σᵢ (Δσᵢ / Δσⱼ) (R̃ᵢ − R̂ᵢ)

R̂ what was forecast and R̃ what is known now, both weighted sums of kept values, so that the whole is one. That is the
corrector of a predictor-corrector method (UniPC, arXiv 2302.04867, has one without a further evaluation), here for
steps of the sampler that the model was left out of. κ < 1, since Rⱼ was computed where the picture was wrong, and part
of its error answers that already. σ is √((1 − ᾱ) / ᾱ) for DDIM and the schedule's own with flow matching; ``even``
takes all Δσ to be alike, as ``Anchors(correct=κ)`` does where no scheduler tells them. PSNR to the uncached samples;
nothing is timed. ``results/tried.md`` has the rows.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from guidance import RULES, Judge
from torch import Tensor
from trained import TRAINED

from toca_compile.demo import emoji_flux, fashion_dit
from toca_compile.policies import Level
from toca_compile.policies.anchors import Polynomial
from toca_compile.quality.metrics import psnr

KAPPAS = (0.0, 0.25, 0.5, 0.75, 1.0)
KEPT = 3  # values that a polynomial goes through


class Corrected:
    """One run. ``moves``: by how much the sampler moves the picture at each step."""

    def __init__(self, full: Sequence[int], rule: str, moves: Sequence[float], kappa: float) -> None:
        self.full, self.rule, self.moves, self.kappa = full, rule, moves, kappa
        self.step = 0
        self.known: dict[int, Tensor] = {}
        self.told: dict[int, Tensor] = {}  # since the last computed step

    def added(self, blocks: Callable[[slice], Tensor], n: int) -> Tensor:
        """What the blocks add to the stream of ``2 n`` samples."""
        step, self.step = self.step, self.step + 1
        if step not in self.full:
            by, kept = RULES[self.rule]
            self.told[step] = self._sum(by, kept, step)
            return self.told[step]
        value = self.known[step] = blocks(slice(0, 2 * n))
        for i, told in self.told.items() if self.kappa else ():
            better = self._sum(Polynomial(), KEPT, i)
            value = value + self.kappa * (self.moves[i] / self.moves[step]) * (better - told)
        self.told.clear()
        return value

    def _sum(self, by: Any, kept: int, step: int) -> Tensor:
        anchors = sorted(self.known)[-kept:]
        weights = by.weights(anchors, step)
        return torch.stack([w * self.known[at] for w, at in zip(weights, anchors, strict=True)]).sum(0)


def moves(name: str, steps: int) -> list[float]:
    """By how much the sampler of a trained model moves its picture at each step, up to a factor of the picture's."""
    if name == "emoji_flux":
        scheduler = emoji_flux.load(emoji_flux.default_model())[1]
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        sigmas = scheduler.sigmas
    else:
        scheduler = fashion_dit.load(fashion_dit.default_model())[1]
        scheduler.set_timesteps(steps)
        times = [*scheduler.timesteps.tolist(), -1]
        kept = torch.stack([scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod for t in times])
        sigmas = ((1 - kept) / kept).sqrt()
    found: list[float] = sigmas.diff().tolist()
    return found


def main() -> None:
    """Sample every row, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(TRAINED), nargs="+", default=list(TRAINED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["Newton o2", "FoCa", "HiCache"])
    parser.add_argument("--levels", nargs="+", default=["balanced", "fast", "max"])
    given = parser.parse_args()
    for name in given.models:
        trained = TRAINED[name]
        judge = Judge(trained, given.seeds, given.samples)
        own, even = moves(name, trained.steps), [1.0] * trained.steps
        print(f"\n## corrected: {trained.title}, {trained.steps} steps, {trained.sampling}\n")
        heads = [*(f"κ = {kappa:g}" for kappa in KAPPAS), "κ = 0.5, even"]
        print(f"| steps computed | forecast by | {' | '.join(heads)} |\n|" + " --- |" * (2 + len(heads)))
        for level in given.levels:
            full = Level(level, trained.steps).full_steps()
            for rule in given.rules:
                found = []
                for kappa, by in (*((kappa, own) for kappa in KAPPAS), (0.5, even)):
                    each = []
                    for seed in given.seeds:
                        judge.stack.halves = Corrected(full, rule, by, kappa)
                        each.append(psnr(judge.sampled(seed), judge.reference[seed]))
                    found.append(statistics.mean(each))
                told = " | ".join(f"{dB:.1f}" for dB in found)
                print(f"| {len(full)} ({level}) | {rule} | {told} |", flush=True)


if __name__ == "__main__":
    main()
