"""One sampling in which tokens are computed between full steps: what ``tokens.py`` studies, on eager models."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from functools import partial as bind
from typing import Any

import torch
from corrected import moves
from guidance import RULES, Judge
from torch import Tensor, nn
from trained import TRAINED

from toca_compile.demo import emoji_flux, fashion_dit
from toca_compile.ops.clusters import cluster_tokens, pick_tokens, proxies
from toca_compile.policies.anchors import Polynomial
from toca_compile.quality.metrics import psnr

GUIDANCE = {"fashion_dit": fashion_dit.GUIDANCE, "emoji_flux": emoji_flux.GUIDANCE}
PARABOLA = 3  # values that it goes through
RADIX = 1024  # above any number of steps


@dataclass(frozen=True)
class Base:
    """A forecast of the whole stack: full steps, the rule between them, and the share that a full step corrects."""

    full: tuple[int, ...]
    rule: str
    kappa: float


@dataclass(frozen=True)
class Place:
    """Where tokens are computed, which, and what is put there.

    Attributes:
        when: at which steps that are not full: ``each``, ``before`` a full one, the ``first`` or ``last`` fifth of the
            run, ``never``.
        blocks: ``all``, the ``first`` or the ``last`` quarter; what the others add stays forecast.
        by: how tokens are chosen. ``error``: the true one now; ``interval``, ``run``: its sum to the next full step or
            over the run, foreseen; ``anywhere``: all above what a share of the tokens of a forecast run is above;
            ``alike``: the same without regard to how far the sampler moves at a step; ``pictures``: of whole pictures.
            Without an oracle: ``guess``, as ``anywhere``, by how far the forecast is from one of a lower order;
            ``missed`` when last computed, ``slope`` of the last two values, ``frequency`` and ``foreground`` (of the
            finished picture), ``random``.
        half: ``both`` of a guided pair alike, or ``c`` or ``u`` alone; ``c → u``, ``u → c``: the other moves along.
        spread: the change goes to all tokens. ``mean``: that of clusters of true errors; ``direction``: the part of
            each true error along its cluster's; ``nearest``: of one computed token a cluster of like slopes.
        as_many: at each step as many as the oracle of ``anywhere`` takes there in the same run, its tokens kept.
        keep: computed tokens enter the history that later steps are forecast from, each with steps of its own.
        sees: what computed tokens see the others as at every block: as they would be, computed too (``all``), as they
            are ``forecast``, or as they were when last computed, whose keys and values are ``cached``.
    """

    when: str = "each"
    blocks: str = "all"
    by: str = "error"
    half: str = "both"
    spread: str = ""
    as_many: bool = False
    keep: bool = False
    sees: str = "all"


NOWHERE = Place("never")
ANYWHERE = ("anywhere", "alike", "pictures", "guess")
FORESEEN = ("interval", "run", *ANYWHERE)


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
        places = RADIX ** torch.arange(self.kept)[:, None, None]
        ways, own = ((self.steps + 1) * places).sum(0).unique(return_inverse=True)  # far faster than of columns
        columns = (ways[:, None] // places.flatten() % RADIX - 1).tolist()
        table = torch.tensor([_weights(rule, kept, tuple(column), step) for column in columns])
        weights = table[own].movedim(-1, 0)[:, None, ..., None]
        return (weights * self.values).sum(0)

    def slope(self) -> Tensor:
        """The whole stack's last value less that before it."""
        return self.values[-1, -1] - self.values[-2, -1]


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
    """A trained model with its uncached samples."""

    def __init__(self, name: str, seeds: Sequence[int], samples: int, first: int = 0) -> None:
        super().__init__(TRAINED[name], seeds, samples, first)
        self.moves, self.guidance = moves(name, self.steps), GUIDANCE[name]
        self.depth = len(self.stack.joint) + len(self.stack.single)
        self.taps = Taps([*self.stack.joint, *self.stack.single])
        self.foreseen: dict[tuple[Base, int], Sampling] = {}  # forecast runs, with what they missed
        self.taken: dict[tuple[Base, int, float], dict[int, float]] = {}  # by the oracle of any step and token

    def run(self, base: Base, place: Place = NOWHERE, share: float = 0.0) -> tuple[float, float]:
        """PSNR in dB, and what was charged, in full steps; means over the seeds."""
        found = []
        for seed in self.seeds:
            if (place.as_many or place.by in FORESEEN) and (base, seed) not in self.foreseen:
                self.foreseen[base, seed] = self.sampling(seed, base, Place())
                self.sampled(seed)
            if place.as_many and (base, seed, share) not in self.taken:
                self.taken[base, seed, share] = self.sampling(seed, base, Place(by="anywhere", keep=True), share).taken
                self.sampled(seed)
            sampling = self.sampling(seed, base, place, share)
            found.append((psnr(self.sampled(seed), self.reference[seed]), sampling.charged))
        dBs, charged = zip(*found, strict=True)
        return statistics.mean(dBs), statistics.mean(charged)

    def sampling(self, seed: int, base: Base, place: Place = NOWHERE, share: float = 0.0) -> "Sampling":
        """Makes the stack do so in the next sampling of a seed."""
        run = self.stack.halves = Sampling(self, seed, base, place, share)
        return run


class Sampling:
    """One run. ``charged``: so far, in full steps."""

    def __init__(self, model: Model, seed: int, base: Base, place: Place, share: float) -> None:
        self.model, self.seed, self.base, self.place, self.share = model, seed, base, place, share
        self.rule, self.kept = base.rule, RULES[base.rule][1]
        depth, quarter = model.depth, max(1, model.depth // 4)
        self.cost = 1.0 if place.blocks == "all" else quarter / depth  # all blocks cost alike
        self.cuts: tuple[int, ...] = (depth,)  # after so many blocks the stream is looked at
        if place.sees != "all":
            self.cuts = tuple(range(1, depth + 1))
        elif place.blocks != "all":
            self.cuts = (quarter if place.blocks == "first" else depth - quarter, depth)
        self.past = Past(max(self.kept, PARABOLA))
        self.told: dict[int, tuple[Tensor, Tensor]] = {}  # since a token was last computed: what, and of which
        self.missed: dict[int, Tensor] = {}  # of the guided prediction, times how far the sampler moves
        self.guess: dict[int, Tensor] = {}  # how far that is from one of a lower order
        self.last = torch.zeros(())  # what was missed of each token when it was computed
        self.taken: dict[int, float] = {}  # shares of the tokens
        self.step, self.charged = 0, 0.0
        torch.manual_seed(seed)

    def added(self, blocks: Callable[[slice], Tensor], n: int) -> Tensor:
        """What the blocks add to the stream of ``2 n`` samples."""
        step, self.step = self.step, self.step + 1
        told = self.past.at(step, self.rule, self.kept) if step else None
        if step in self.base.full or told is None:
            self.charged += 1
            true = self._true(blocks, slice(0, 2 * n))
            if told is not None:
                self.missed[step] = self.last = self._guided(true[-1] - told[-1], n, step)
            return self._computed(step, true, true[-1], torch.ones(true.shape[1:3], dtype=torch.bool))
        if self._here(step):
            return self._replaced(step, told, blocks, n)
        self.told[step] = told[-1], torch.ones(told.shape[1:3], dtype=torch.bool)
        return told[-1]

    def _here(self, step: int) -> bool:
        fifth = self.model.steps / 5
        return {
            "each": True, "before": step + 1 in self.base.full, "first": step < fifth,
            "last": step >= self.model.steps - fifth, "never": False,
        }[self.place.when]  # fmt: skip

    def _replaced(self, step: int, told: Tensor, blocks: Callable[[slice], Tensor], n: int) -> Tensor:
        place = self.place
        half = {"c": slice(0, n), "u": slice(n, 2 * n), "b": slice(0, 2 * n)}[place.half[0]]
        true = told.clone()
        if place.sees == "all" or place.by in ("error", "anywhere"):  # an oracle of the choice alone
            true[:, half] = self._true(blocks, half)
        change = self._change(true, told)
        self.missed[step] = self._guided(change, n, step)
        lower = self.past.at(step, *(("reused", 1) if self.rule == "line" else ("line", 2)))
        self.guess[step] = self._guided(told[-1] - lower[-1], n, step)
        if place.spread in ("mean", "direction"):
            self.charged += self.share
            mask, value = torch.zeros(told.shape[1:3], dtype=torch.bool), told[-1] + self._spread(change, n)
        else:
            mask, to = self._nearest(n) if place.spread else (self._chosen(step, n), None)
            mask[: half.start], mask[half.stop :] = False, False
            self.taken[step] = float(mask.float().mean())
            self.charged += self.cost * self.taken[step]
            if place.sees != "all":
                self.model.taps.others = mask, told if place.sees == "forecast" else self.past.values[-1]
                true[:, half] = self._true(blocks, half)
                self.model.taps.others = None
                change = self._change(true, told)
                self.missed[step] = self._guided(change, n, step)
            self.last = torch.where(mask[:n], self.missed[step], self.last)
            if to is None:
                change = change * mask[..., None]
            else:
                change = change.gather(1, to[..., None].expand_as(change))
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
        return torch.stack([*(self.model.taps.seen[after - 1] for after in self.cuts[:-1]), whole])

    def _change(self, true: Tensor, told: Tensor) -> Tensor:
        change = true - told
        if self.place.blocks == "all":
            return change[-1]
        return change[0] if self.place.blocks == "first" else change[-1] - change[0]

    def _guided(self, pair: Tensor, n: int, step: int) -> Tensor:
        """``[n, tokens]``: how far a pair, or the half that alone is computed, moves the picture at a step."""
        g = {"c": 1.0, "u": 0.0}.get(self.place.half[0], self.model.guidance)
        return (g * pair[:n] + (1 - g) * pair[n:]).norm(dim=-1) * abs(self.model.moves[step])

    def _chosen(self, step: int, n: int) -> Tensor:
        """``[2 n, tokens]``: which tokens are computed, in each picture the same of both halves."""
        if self.place.by in ANYWHERE and not self.place.as_many:
            name = "guess" if self.place.by == "guess" else "missed"
            foreseen = self.model.foreseen[self.base, self.seed]
            of = [abs(move) if self.place.by == "alike" else 1.0 for move in self.model.moves]
            then = torch.stack([m / of[i] for i, m in getattr(foreseen, name).items() if i not in self.base.full])
            now = getattr(self, name)[step] / of[step]
            if self.place.by == "pictures":
                then, now = then.mean(-1), now.mean(-1, keepdim=True).expand_as(now)
            return (now > then.quantile(1 - self.share)).repeat(2, 1)
        score = self._score(step, n)
        share = self.model.taken[self.base, self.seed, self.share][step] if self.place.as_many else self.share
        top = score.topk(round(share * score.shape[1]), dim=1).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, top, value=True).repeat(2, 1)

    def _score(self, step: int, n: int) -> Tensor:
        by, full = self.place.by, self.base.full
        if by in ("interval", "run"):
            end = min((s for s in full if s > step), default=self.model.steps)
            there = range(step, end) if by == "interval" else range(self.model.steps)
            missed = self.model.foreseen[self.base, self.seed].missed
            return torch.stack([m for i, m in missed.items() if i in there]).sum(0)
        if by == "missed":
            return self.last.expand_as(self.missed[step])
        if by in ("frequency", "foreground"):
            return token_map(self.model.reference[self.seed], by)
        if by == "guess":
            return self.guess[step]
        if by == "slope":
            return self._guided(self.past.slope(), n, step)
        return torch.rand_like(self.missed[step]) if by == "random" else self.missed[step]

    def _clusters(self, features: Tensor, n: int) -> tuple[Tensor, int, Tensor]:
        pair = torch.cat([features[:n], features[n:]], -1)
        order, count = torch.rand(pair.shape[:2]), max(1, round(self.share * pair.shape[1]))
        return cluster_tokens(pair, order, count, 8, 1, 0), count, order

    def _spread(self, change: Tensor, n: int) -> Tensor:
        cluster, count, _ = self._clusters(change, n)
        member = nn.functional.one_hot(cluster.long(), count).float().repeat(2, 1, 1)
        own = member @ (member.mT @ change / member.sum(1).clamp(min=1)[..., None])
        if self.place.spread == "mean":
            return own
        along = nn.functional.normalize(own, dim=-1)
        return (change * along).sum(-1, keepdim=True) * along

    def _nearest(self, n: int) -> tuple[Tensor, Tensor]:
        cluster, count, order = self._clusters(self.past.slope(), n)
        index = pick_tokens(cluster, order, count, count)
        mask = torch.zeros(cluster.shape, dtype=torch.bool).scatter(1, index, value=True)
        return mask.repeat(2, 1), proxies(cluster, index, count).repeat(2, 1)


def token_map(pictures: Tensor, by: str) -> Tensor:
    """How much of what ``by`` names there is at each token, a patch of 2×2: ``[n, c, h, w]`` to ``[n, tokens]``.
    ``foreground``: how far from the border's median; ``frequency``: how far from the pixels around."""
    if by == "frequency":
        unlike = pictures - nn.functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    else:
        border = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]], -1)
        unlike = pictures - border.median(-1).values[..., None, None]
    return nn.functional.avg_pool2d(unlike.square().mean(1), 2).flatten(1)
