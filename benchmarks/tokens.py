"""Tokens: is there a budget at which computing chosen tokens between full steps beats the best forecast of as much
time? Simulated on the eager models, with oracles as upper bounds.

    python benchmarks/tokens.py forecasts         # the best forecast with each number of full steps: 20 minutes
    python benchmarks/tokens.py oracles           # tokens in every place, by their true error: an hour
    python benchmarks/tokens.py [--models NAME …] # only write the tables

Between full steps what all blocks add to the stream is forecast; of a share of the tokens something else is put there.
An oracle computes the whole step, picks the tokens where the forecast is most wrong (of the guided prediction), and
puts what was computed, so that neither the choice nor what tokens see of others is ever the worse for not having
computed the rest. It is charged those tokens' share of the FLOPs alone, which no kernel reaches. What is charged is
held against the best forecast (rule, schedule, corrector; chosen on another seed) with as many more full steps. PSNR to
the uncached samples of two held-out seeds. ``results/tokens.{csv,md}``.
"""

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from functools import partial as bind
from typing import Any, NamedTuple

import torch
from common import RESULTS
from corrected import moves
from guidance import RULES, Judge
from torch import Tensor, nn
from trained import TRAINED

from toca_compile.demo import emoji_flux, fashion_dit
from toca_compile.ops.clusters import cluster_tokens, pick_tokens, proxies
from toca_compile.policies.anchors import Polynomial
from toca_compile.quality.metrics import psnr

CALIBRATION, SEEDS, SAMPLES = (100,), (0, 1), 4
SHARES = (0.1, 0.25, 0.5)
GUIDANCE = {"fashion_dit": fashion_dit.GUIDANCE, "emoji_flux": emoji_flux.GUIDANCE}
TRIED = {"fashion_dit": ("Newton o2", "Newton o3", "FoCa"), "emoji_flux": ("line", "Taylor o2", "HiCache", "FoCa")}
FULL = {"fashion_dit": (17, 10, 7), "emoji_flux": (10, 6, 4)}  # full steps that tokens are added to: about 3, 5 and 7 ×
COUNTS = {
    "fashion_dit": (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 21, 23, 25, 28, 34),
    "emoji_flux": (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20),
}
FOUND = RESULTS / "tokens.csv"
PARABOLA = 3


@dataclass(frozen=True)
class Base:
    """A forecast of the whole stack: full steps, the rule between them, and the share a full step corrects."""

    full: tuple[int, ...]
    rule: str
    kappa: float


@dataclass(frozen=True)
class Place:
    """Where tokens are computed, which, and what is put there.

    Attributes:
        when: at which steps that are not full: ``each``, ``before`` a full one, the ``first`` or ``last`` fifth.
        blocks: ``all``, the ``first`` or the ``last`` quarter; the others' part stays forecast.
        by: how tokens are chosen. ``error``: the true one now; ``interval``, ``run``: its sum to the next full step or
            over the run, foreseen; ``anywhere``: the largest of all tokens at all steps. Without an oracle: ``missed``
            at the last full step, ``slope`` of the last two, ``frequency`` and ``foreground`` (of the finished
            picture), ``random``.
        half: ``both`` of a guided pair alike, or of one only: ``c``, ``u``; ``c → u``, ``u → c``: the other moves along.
        spread: the change goes to all tokens. ``mean``: that of clusters of true errors; ``direction``: the part of
            each true error along its cluster's; ``nearest``: of one computed token a cluster of like slopes.
        keep: computed tokens enter the history that later steps are forecast from, each with steps of its own.
        partial: tokens see the others as forecast at every block, not as they would be.
    """

    when: str = "each"
    blocks: str = "all"
    by: str = "error"
    half: str = "both"
    spread: str = ""
    keep: bool = False
    partial: bool = False


PLACES = {
    "every step, by error": Place(),
    "every step, by error up to the next full one": Place(by="interval"),
    "every step, by error of the whole run": Place(by="run"),
    "any step and token, by error": Place(by="anywhere"),
    "every step, by error, kept": Place(keep=True),
    "any step and token, by error, kept": Place(by="anywhere", keep=True),
    "the step before a full one": Place("before"),
    "the first fifth of the run": Place("first"),
    "the last fifth of the run": Place("last"),
    "the first quarter of the blocks": Place(blocks="first"),
    "the last quarter of the blocks": Place(blocks="last"),
    "cluster means of the error": Place(spread="mean"),
    "cluster directions, own lengths": Place(spread="direction"),
    "high-frequency tokens": Place(by="frequency"),
    "foreground tokens": Place(by="foreground"),
    "the conditional half": Place(half="c"),
    "the conditional half, the other moved along": Place(half="c → u"),
    "the unconditional half": Place(half="u"),
    "the unconditional half, the other moved along": Place(half="u → c"),
}


class Past:
    """Of each token the last values of the stack, at cuts of it, and when they were computed."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.steps = torch.empty(0)
        self.values = torch.empty(0)

    def add(self, step: int, value: Tensor, mask: Tensor) -> None:
        """``value``: ``[cuts, batch, tokens, channels]``. ``mask``: of which tokens, ``[batch, tokens]``."""
        if not len(self.steps):
            self.steps = torch.full((self.kept, *mask.shape), -1)
            self.values = torch.zeros(self.kept, *value.shape)
        steps = torch.cat([self.steps[1:], torch.full_like(self.steps[:1], step)])
        values = torch.cat([self.values[1:], value[None]])
        self.steps = torch.where(mask, steps, self.steps)
        self.values = torch.where(mask[..., None], values, self.values)

    def at(self, step: int, rule: str, kept: int) -> Tensor:
        """The forecast by the last ``kept`` values, as one of these."""
        ways, own = self.steps.flatten(1).unique(dim=1, return_inverse=True)
        table = torch.tensor([_weights(rule, kept, tuple(way), step) for way in ways.T.tolist()])
        weights = table[own].T.reshape(self.kept, 1, *self.steps.shape[1:], 1)
        return (weights * self.values).sum(0)


@cache
def _weights(rule: str, kept: int, steps: tuple[int, ...], step: int) -> list[float]:
    known = [s for s in steps if s >= 0][-kept:]
    by = Polynomial() if rule == "parabola" else RULES[rule][0]
    return [0.0] * (len(steps) - len(known)) + by.weights(known, step)


class Taps:
    """What the stream holds before each block, and, for partial tokens, what the others are to hold there."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.seen: list[Tensor] = []
        self.others: tuple[Tensor, Tensor] | None = None
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(bind(self._enter, i), with_kwargs=True)

    def _enter(self, i: int, block: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        stream = given["hidden_states"]
        if i == 0:
            self.start, self.seen = stream, []
            return None
        self.seen.append(stream - self.start)
        if self.others is None:
            return None
        mask, told = self.others
        return args, {**given, "hidden_states": torch.where(mask[..., None], stream, self.start + told[i - 1])}


class Model(Judge):
    """A trained model with its uncached samples and what tokens may be told apart by."""

    def __init__(self, name: str, seeds: Sequence[int], samples: int, first: int = 0) -> None:
        super().__init__(TRAINED[name], seeds, samples, first)
        self.moves, self.guidance = moves(name, self.steps), GUIDANCE[name]
        self.depth = len(self.stack.joint) + len(self.stack.single)
        self.taps = Taps([*self.stack.joint, *self.stack.single])
        self.foreseen: dict[tuple[Base, int], dict[int, Tensor]] = {}

    def run(self, base: Base, place: Place | None, share: float) -> tuple[float, float]:
        """PSNR in dB, and what was charged, in full steps; means over the seeds."""
        found = []
        for seed in self.seeds:
            if place is not None and place.by in ("interval", "run", "anywhere") and (base, seed) not in self.foreseen:
                looked = self.sampling(seed, base, Place(), 0.0)
                self.sampled(seed)
                self.foreseen[base, seed] = looked.missed
            sampling = self.sampling(seed, base, place, share)
            dB = psnr(self.sampled(seed), self.reference[seed])
            found.append((dB, sampling.charged))
        dBs, charged = zip(*found, strict=True)
        return statistics.mean(dBs), statistics.mean(charged)

    def sampling(self, seed: int, base: Base, place: Place | None, share: float) -> "Sampling":
        """Makes the stack do so in the next sampling of a seed."""
        run = self.stack.halves = Sampling(self, base, place, share, seed)
        return run


class Sampling:
    """One run. ``place``: None to forecast alone."""

    def __init__(self, model: Model, base: Base, place: Place | None, share: float, seed: int) -> None:
        self.model, self.base, self.place, self.share, self.seed = model, base, place, share, seed
        depth, kept = model.depth, RULES[base.rule][1]
        quarter = max(1, depth // 4)
        self.cuts, self.cost = (depth,), 1.0
        if place is not None and place.partial:
            self.cuts = tuple(range(1, depth + 1))
        elif place is not None and place.blocks != "all":
            self.cuts = (quarter if place.blocks == "first" else depth - quarter, depth)
            self.cost = quarter / depth
        self.past = Past(max(kept, PARABOLA))
        self.told: dict[int, tuple[Tensor, Tensor]] = {}  # since a token was last computed: what, and of which
        self.missed: dict[int, Tensor] = {}  # of the guided prediction, times how far the sampler moves
        self.step, self.charged = 0, 0.0
        torch.manual_seed(seed)

    def added(self, blocks: Callable[[slice], Tensor], n: int) -> Tensor:
        """What the blocks add to the stream of ``2 n`` samples."""
        step, self.step = self.step, self.step + 1
        told = self.past.at(step, self.base.rule, RULES[self.base.rule][1]) if step else None
        if step in self.base.full or told is None:
            self.charged += 1
            true = self._true(blocks, slice(0, 2 * n))
            if told is not None:
                self._note(step, true[-1] - told[-1], n)
            return self._computed(step, true, true[-1], torch.ones(true.shape[1:3], dtype=torch.bool))
        if not self._active(step):
            self.told[step] = told[-1], torch.ones(told.shape[1:3], dtype=torch.bool)
            return told[-1]
        return self._replaced(step, told, blocks, n)

    def _active(self, step: int) -> bool:
        if self.place is None:
            return False
        fifth = self.model.steps / 5
        return {
            "each": True, "before": step + 1 in self.base.full, "first": step < fifth,
            "last": step >= self.model.steps - fifth,
        }[self.place.when]  # fmt: skip

    def _replaced(self, step: int, told: Tensor, blocks: Callable[[slice], Tensor], n: int) -> Tensor:
        place = self.place
        assert place is not None
        half = {"c": slice(0, n), "u": slice(n, 2 * n), "b": slice(0, 2 * n)}[place.half[0]]
        true = told.clone()
        if not place.partial or place.by == "error":
            true[:, half] = self._true(blocks, half)
        change = self._change(true, told)
        self._note(step, change, n)
        if place.spread in ("mean", "direction"):
            self.charged += self.share
            return told[-1] + self._spread(change, n)
        mask, to = self._nearest(n) if place.spread else (self._chosen(step, n), None)
        mask[: half.start], mask[half.stop :] = False, False
        self.charged += self.cost * float(mask.float().mean())
        if place.partial:
            self.model.taps.others = mask, told
            change = self._change(self._true(blocks, half), told)
            self.model.taps.others = None
        if to is not None:
            return told[-1] + change.gather(1, to[..., None].expand_as(change))
        change = change * mask[..., None]
        value = told[-1] + change
        if "→" in place.half:
            value[slice(n, 2 * n) if half.start == 0 else slice(0, n)] += change[half]
        if place.keep:
            value = self._computed(step, true, value, mask)
        self.told[step] = value, ~mask
        return value

    def _computed(self, step: int, true: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Keeps the tokens of ``mask``, and makes up for what they were told since they were last computed."""
        self.past.add(step, true, mask)
        for i, (told, wrong) in list(self.told.items()) if self.base.kappa else ():
            better = self.past.at(i, "parabola", PARABOLA)[-1]
            share = self.base.kappa * self.model.moves[i] / self.model.moves[step]
            value = value + share * (better - told) * (wrong & mask)[..., None]
            self.told[i] = told, wrong & ~mask
        self.told = {i: (told, wrong) for i, (told, wrong) in self.told.items() if wrong.any()}
        return value

    def _true(self, blocks: Callable[[slice], Tensor], rows: slice) -> Tensor:
        whole = blocks(rows)
        return torch.stack([*(self.model.taps.seen[cut - 1] for cut in self.cuts[:-1]), whole])

    def _change(self, true: Tensor, told: Tensor) -> Tensor:
        change = true - told
        if self.place is None or self.place.blocks == "all":
            return change[-1]
        return change[0] if self.place.blocks == "first" else change[-1] - change[0]

    def _guided(self, pair: Tensor, n: int) -> Tensor:
        """``[n, tokens]``: how long what guidance makes of a pair's halves is."""
        g = 1.0 if self.place is None or self.place.half[0] == "c" else self.model.guidance
        g = 0.0 if self.place is not None and self.place.half[0] == "u" else g
        return (g * pair[:n] + (1 - g) * pair[n:]).norm(dim=-1)

    def _note(self, step: int, missed: Tensor, n: int) -> None:
        self.missed[step] = self._guided(missed, n) * abs(self.model.moves[step])

    def _chosen(self, step: int, n: int) -> Tensor:
        """``[2 n, tokens]``: which tokens are computed, in each picture the same of both halves."""
        assert self.place is not None
        foreseen = self.model.foreseen.get((self.base, self.seed), {})
        if self.place.by == "anywhere":
            between = torch.stack([m for i, m in foreseen.items() if i not in self.base.full])
            return (self.missed[step] > between.quantile(1 - self.share)).repeat(2, 1)
        score = self._score(step, n, foreseen)
        top = score.topk(round(self.share * score.shape[1]), dim=1).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, top, value=True).repeat(2, 1)

    def _score(self, step: int, n: int, foreseen: dict[int, Tensor]) -> Tensor:
        assert self.place is not None
        by = self.place.by
        if by in ("interval", "run"):
            end = min((s for s in self.base.full if s > step), default=self.model.steps) if by == "interval" else None
            return torch.stack([m for i, m in foreseen.items() if end is None or step <= i < end]).sum(0)
        if by == "missed":
            return self.missed[max(s for s in self.base.full if s < step and s in self.missed)]
        if by in ("frequency", "foreground"):
            return token_map(self.model.reference[self.seed], by)
        if by == "slope":
            return self._guided(self.past.values[-1, -1] - self.past.values[-2, -1], n)
        return torch.rand_like(self.missed[step]) if by == "random" else self.missed[step]

    def _clusters(self, features: Tensor, n: int) -> tuple[Tensor, int, Tensor]:
        pair = torch.cat([features[:n], features[n:]], -1)
        order, count = torch.rand(pair.shape[:2]), max(1, round(self.share * pair.shape[1]))
        return cluster_tokens(pair, order, count, 8, 1, 0), count, order

    def _spread(self, change: Tensor, n: int) -> Tensor:
        assert self.place is not None
        cluster, count, _ = self._clusters(change, n)
        member = nn.functional.one_hot(cluster.long(), count).float().repeat(2, 1, 1)
        means = member.mT @ change / member.sum(1).clamp(min=1)[..., None]
        own = member @ means
        if self.place.spread == "mean":
            return own
        along = nn.functional.normalize(own, dim=-1)
        return (change * along).sum(-1, keepdim=True) * along

    def _nearest(self, n: int) -> tuple[Tensor, Tensor]:
        cluster, count, order = self._clusters(self.past.values[-1, -1] - self.past.values[-2, -1], n)
        index = pick_tokens(cluster, order, count, count)
        mask = torch.zeros(cluster.shape, dtype=torch.bool).scatter(1, index, value=True)
        return mask.repeat(2, 1), proxies(cluster, index, count).repeat(2, 1)


def token_map(pictures: Tensor, by: str) -> Tensor:
    """How much of what ``by`` says is at each token, patches of 2×2, of ``[n, channels, h, w]``: ``[n, tokens]``."""
    if by == "frequency":
        unlike = pictures - nn.functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    else:
        border = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]], -1)
        unlike = pictures - border.median(-1).values[..., None, None]
    return nn.functional.avg_pool2d(unlike.square().mean(1), 2).flatten(1)


class Row(NamedTuple):
    """One line of the results. ``full``: full steps. ``charged``: in full steps."""

    model: str
    place: str
    full: int
    share: float
    charged: float
    dB: float
    base: str


def laid(steps: int, count: int) -> dict[str, tuple[int, ...]]:
    """So many full steps, from the first to the last but one: evenly, or the second at once."""
    last = steps - 2
    even = {round(i * last / (count - 1)) for i in range(count)}
    second = {0, *(round(1 + i * (last - 1) / (count - 2)) for i in range(count - 1))}
    return {"even": tuple(sorted(even)), "second": tuple(sorted(second))}


def based(told: str, steps: int, count: int) -> Base:
    """The forecast that a row names."""
    rule, kappa, when = told.split(", ")
    return Base(laid(steps, count)[when], rule, float(kappa))


def forecasts(name: str, rows: list[Row]) -> Iterator[Row]:
    """With each number of full steps the forecast that is best on the calibration seed, held out."""
    judge, other = Model(name, CALIBRATION, SAMPLES), Model(name, SEEDS, SAMPLES, SAMPLES)
    for count in COUNTS[name]:
        if any(row[:3] == (name, "forecast", count) for row in rows):
            continue
        ways = [f"{r}, {k}, {w}" for r in TRIED[name] for k in (0.0, 0.25, 0.5) for w in laid(judge.steps, count)]
        best = max(ways, key=lambda way: judge.run(based(way, judge.steps, count), None, 0)[0])
        dB, charged = other.run(based(best, judge.steps, count), None, 0)
        yield Row(name, "forecast", count, 0, charged, dB, best)


def oracles(name: str, rows: list[Row]) -> Iterator[Row]:
    """Every place with every share of tokens, held out."""
    model = Model(name, SEEDS, SAMPLES, SAMPLES)
    best = {row.full: row.base for row in rows if row[:2] == (name, "forecast")}
    for what, place in PLACES.items():
        for count in FULL[name]:
            for share in SHARES:
                if any(row[:4] == (name, what, count, share) for row in rows):
                    continue
                dB, charged = model.run(based(best[count], model.steps, count), place, share)
                yield Row(name, what, count, share, charged, dB, best[count])


def gain(row: Row, rows: Sequence[Row]) -> float:
    """Of a row over the best forecast that costs as much, in dB: between two numbers of full steps, on the line."""
    known = sorted((r.full, r.dB) for r in rows if r[:2] == (row.model, "forecast"))
    best = [(full, max(dB for f, dB in known if f <= full)) for full, _ in known]
    for (before, low), (after, high) in zip(best, best[1:], strict=False):
        if before <= row.charged <= after:
            return row.dB - low - (high - low) * (row.charged - before) / (after - before)
    raise ValueError(f"no forecast of {row.charged} full steps was sampled")


def read() -> list[Row]:
    """What earlier runs found."""
    if not FOUND.exists():
        return []
    with FOUND.open(newline="") as file:
        kinds = Row.__annotations__.values()
        return [Row(*(kind(cell) for kind, cell in zip(kinds, line, strict=True))) for line in [*csv.reader(file)][1:]]


def write(row: Row) -> None:
    """Appends a row, so that two runs may write at once."""
    begun = FOUND.exists()
    with FOUND.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([row] if begun else [Row._fields, row])
    print(row, flush=True)


def main() -> None:
    """Sample, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", choices=["forecasts", "oracles", []])
    parser.add_argument("--models", choices=list(TRAINED), nargs="+", default=list(TRAINED))
    given = parser.parse_args()
    for name in given.models:
        for work in (forecasts, oracles):
            if work.__name__ in given.work:
                for row in work(name, read()):
                    write(row)


if __name__ == "__main__":
    main()
