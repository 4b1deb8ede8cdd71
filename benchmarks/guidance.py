"""Guidance: what it gains to treat the two halves of a guided batch apart, simulated on the eager models.

    python benchmarks/guidance.py [--models NAME …] [--seeds 100] [--samples 4]

The prediction is c + (g − 1) · (c − u), of the conditional half c and the other, u. What all blocks add to the stream
is forecast for c and for c − u, each by a rule of its own; some steps compute both halves, some c alone (half the cost:
u is then c less the forecast of c − u), the others none. Rows of one cost are held against both halves by one rule,
computed as often as that costs. PSNR to the uncached samples; nothing is timed, and nothing here is a policy.
``results/tried.md`` has the rows.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from trained import TRAINED, Trained

from toca_compile.policies.anchors import Foca, Hermite, Polynomial, Taylor
from toca_compile.quality.metrics import psnr

Steps = Sequence[int]
RULES: dict[str, tuple[Any, int]] = {
    "reused": (Polynomial(), 1), "line": (Polynomial(), 2), "Newton o2": (Polynomial(), 3),
    "Newton o3": (Polynomial(), 4), "Taylor o2": (Taylor(), 3), "HiCache": (Hermite(), 3), "FoCa": (Foca(), 3),
}  # fmt: skip
COSTS = {"fashion_dit": (25, 17, 10), "emoji_flux": (14, 10, 7)}


class Run(Protocol):
    """One sampling, in which something else may be added than what the blocks compute."""

    def added(self, blocks: Callable[[slice], Tensor], n: int) -> Tensor:
        """What the blocks add to the stream of ``2 n`` samples. ``blocks``: computes it of some of them."""
        ...


class Halves:
    """One run in which the halves are treated apart. ``both``, ``one``: the steps that compute both halves, or at least
    the first of them, ``lead``, which is the conditional one unless ``swapped``."""

    def __init__(self, both: Steps, one: Steps, rule: str, apart: str, swapped: bool = False) -> None:
        self.both, self.one, self.rule, self.apart, self.swapped = both, one, rule, apart, swapped
        self.step = 0
        self.led: dict[int, Tensor] = {}
        self.between: dict[int, Tensor] = {}

    def added(self, blocks: Callable[[slice], Tensor], n: int) -> Tensor:
        """What the blocks add to the stream of ``2 n`` samples. ``blocks``: computes it of some of them."""
        step, lead = self.step, slice(n, 2 * n) if self.swapped else slice(0, n)
        self.step += 1
        if step in self.both:
            value = blocks(slice(0, 2 * n))
            self.led[step] = value[lead]
            self.between[step] = value[lead] - value[slice(0, n) if self.swapped else slice(n, 2 * n)]
            return value
        if step in self.one:
            self.led[step] = blocks(lead)
        led = self.led[step] if step in self.led else self._forecast(self.led, self.rule)
        other = led - self._forecast(self.between, self.apart)
        return torch.cat([other, led] if self.swapped else [led, other])

    def _forecast(self, known: dict[int, Tensor], rule: str) -> Tensor:
        by, kept = RULES[rule]
        anchors = sorted(known)[-kept:]
        weights = by.weights(anchors, self.step - 1)
        return torch.stack([w * known[at] for w, at in zip(weights, anchors, strict=True)]).sum(0)


class Stack(nn.Module):
    """All blocks of a DiT or a FLUX of diffusers as one, in their place."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.halves: Run | None = None
        self.joint: list[nn.Module] = list(model.transformer_blocks)
        self.single: list[nn.Module] = list(getattr(model, "single_transformer_blocks", ()))
        if not self.single:
            self.norm1 = self.joint[0].norm1  # the DiT's last layer reads its embedding
        model.transformer_blocks, model.single_transformer_blocks = nn.ModuleList([self]), nn.ModuleList()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **given: Any) -> Any:
        x, text, count = hidden_states, encoder_hidden_states, len(hidden_states)

        def blocks(own: slice) -> Tensor:
            h, told = x[own], text[own] if text is not None else None
            more = {k: v[own] if isinstance(v, Tensor) and len(v) == count else v for k, v in given.items()}
            for block in (*self.joint, *self.single):
                made = block(hidden_states=h, encoder_hidden_states=told, **more)
                told, h = made if self.single else (None, made)
            return h - x[own]

        value = x + (blocks(slice(None)) if self.halves is None else self.halves.added(blocks, count // 2))
        return (text, value) if self.single else value


class Judge:
    """A trained model with its uncached samples. ``first``: class or prompt that a batch begins with."""

    def __init__(self, trained: Trained, seeds: Sequence[int], samples: int, first: int = 0) -> None:
        self.steps, self.seeds, self.samples = trained.steps, seeds, samples
        self.model, self.sampler = trained.load(first=first)
        self.stack = Stack(self.model)
        self.reference = {seed: self.sampled(seed) for seed in seeds}

    def sampled(self, seed: int) -> Tensor:
        """The samples of a seed, as the stack computes them now."""
        pictures: Tensor = self.sampler(self.model, self.steps, seed, self.samples)
        return pictures

    def at(self, both: Steps, one: Steps, rule: str, apart: str, swapped: bool = False) -> float:
        """PSNR in dB."""
        found = []
        for seed in self.seeds:
            self.stack.halves = Halves(both, one, rule, apart, swapped)
            found.append(psnr(self.sampled(seed), self.reference[seed]))
        return statistics.mean(found)

    def even(self, count: int) -> list[int]:
        """So many steps, from the first to the last but one."""
        return sorted({round(i * (self.steps - 2) / (count - 1)) for i in range(count)})


def table(judge: Judge, cost: int) -> None:
    """The rows of one cost, in steps that compute both halves."""

    def row(what: str, both: Steps, one: Steps, rule: str, others: Sequence[str], swapped: bool = False) -> None:
        costs = len(both) + (len(set(one) - set(both))) / 2
        found = {apart: judge.at(both, one, rule, apart, swapped) for apart in others}
        told = ", ".join(f"{apart} {dB:.1f}" for apart, dB in sorted(found.items(), key=lambda item: -item[1]))
        print(f"| {cost} | {what} | {len(both)} | {len(one) or len(both)} | {costs:g} | {told} |", flush=True)

    full = judge.even(cost)
    same = {rule: judge.at(full, (), rule, rule) for rule in RULES}
    best = max(same, key=lambda rule: same[rule])
    told = ", ".join(f"{rule} {dB:.1f}" for rule, dB in sorted(same.items(), key=lambda item: -item[1]))
    print(f"| {cost} | both halves by one rule | {cost} | {cost} | {cost} | {told} |", flush=True)
    row(f"c by {best}, c − u by", full, (), best, [rule for rule in RULES if rule != best])
    row(f"u by {best}, c − u by", full, (), best, ["reused", "line"], swapped=True)
    apart = ("reused", "line", "FoCa")
    for share in (0.5, 0.8):
        one, count = judge.even(2 * cost - round(share * cost)), round(share * cost)
        both = sorted({one[round(i * (len(one) - 1) / (count - 1))] for i in range(count)})
        row(f"c by {best} and oftener, c − u by", both, one, best, apart)
    for where, share in (("first", 0.5), ("last", 0.5)):
        for total in range(cost, 2 * cost):  # as many evenly spaced steps as cost that much
            one = judge.even(total)
            first = where == "first"
            inside = [s for s in one[2:] if (s < share * judge.steps if first else s >= (1 - share) * judge.steps)]
            both = sorted(set(one) - set(inside[::2]))
            if len(both) + (len(one) - len(both)) / 2 >= cost:
                break
        row(f"of the {where} {share:.0%} every other step c alone, by {best}, c − u by", both, one, best, apart)


def main() -> None:
    """Sample every row of every cost, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(TRAINED), nargs="+", default=list(TRAINED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--costs", type=int, nargs="*", default=[])
    given = parser.parse_args()
    for name in given.models:
        trained = TRAINED[name]
        judge = Judge(trained, given.seeds, given.samples)
        print(f"\n## guidance: {trained.title}, {trained.steps} steps, {trained.sampling}\n")
        print(
            "| as much as | what | both halves | one half | cost | PSNR dB, by the rule for c − u |\n|" + " --- |" * 6
        )
        for cost in given.costs or COSTS[name]:
            table(judge, cost)


if __name__ == "__main__":
    main()
