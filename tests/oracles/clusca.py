"""ClusCa, literally: every token has a cluster, differences, and the step at which it was last computed."""

from collections.abc import Callable
from math import factorial

import torch
from torch import Tensor

from tests.models import JointDiT, PlainDiT
from tests.oracles.tokens import rows, wide


def hashed(token: int, step: int, site: int, seed: int) -> int:
    """24 random bits of a token, a step and a site."""
    x = token * 0x9E3779B1 + (step + 1) * 0x85EBCA77 + (site + 1) * 0xC2B2AE3D + (seed + 1) * 0x27D4EB2F
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x %= 1 << 32
        x = (x ^ (x >> 16)) * multiplier
    x %= 1 << 32
    return (x ^ (x >> 15)) >> 8


def k_means(points: Tensor, clusters: int, rounds: int, order: list[int]) -> tuple[list[int], float]:
    """The cluster of each of one sample's tokens ``[tokens, features]``, beginning with the tokens highest in order;
    and by how much at least a token was nearer to its centre than to the next, at any time."""
    points = points.double()
    begin = sorted(range(len(points)), key=lambda i: (-order[i], i))[:clusters]
    centres = [points[i] for i in begin]
    labels: list[int] = []
    margin = float("inf")
    for _ in range(rounds):
        if labels:
            own = [[points[i] for i, label in enumerate(labels) if label == c] for c in range(clusters)]
            centres = [torch.stack(o).mean(0) if o else c for o, c in zip(own, centres, strict=True)]
        distances = [[float((p - c).norm()) for c in centres] for p in points]
        labels = [min(range(clusters), key=row.__getitem__) for row in distances]
        margin = min(margin, *(second - first for first, second, *_ in map(sorted, distances)))
    return labels, margin


class Branches:
    """What each branch of a model gives in a step, and which tokens it chose."""

    def __init__(
        self, interval: int, clusters: int, gamma: float, *, order: int, update: bool, warmup: int, rounds: int = 5,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.interval, self.clusters, self.gamma, self.order, self.update = interval, clusters, gamma, order, update
        self.warmup, self.rounds, self.seed = warmup, rounds, seed
        self.call = self.cached = self.made = 0
        self.table: dict[int, list[Tensor]] = {}
        self.when: dict[int, Tensor] = {}
        self.labels: dict[int, list[list[int]]] = {}
        self.chosen: dict[int, Tensor] = {}  # in the last step

    def begin(self) -> None:
        self.full = self.call < self.warmup or self.cached == self.interval - 1
        self.cached = 0 if self.full else self.cached + 1
        self.chosen = {}

    def end(self) -> None:
        if self.full:
            self.made = min(self.order, self.made + 1) if self.call >= max(1, self.warmup - 1) else 0
        self.call += 1

    def __call__(self, site: int, x: Tensor, run: Callable[[Tensor], Tensor], tokenwise: bool) -> Tensor:
        """The branch ``run`` of the stream ``x``; ``tokenwise``: on some rows of it alone, between full steps."""
        if self.full:
            return self.all(site, x, run(x))
        age = (self.call - self.when[site]).float()[..., None]
        terms = [d * age**i / factorial(i) for i, d in enumerate(self.table[site][: self.made + 1])]
        value = torch.stack(terms).sum(0)
        return self.some(site, value, x, run) if tokenwise else value

    def all(self, site: int, x: Tensor, value: Tensor) -> Tensor:
        tokens, order = range(x.shape[1]), self.order
        old = self.table.get(site, [torch.zeros_like(value)] * (order + 1))
        age = (self.call - self.when[site]).float()[..., None] if site in self.when else torch.ones(1)
        makes = self.call >= max(1, self.warmup - 1)
        self.table[site] = self.differences(value, old, age) if makes else [value, *old[1:]]
        self.when[site] = torch.full(value.shape[:2], self.call)
        begin = [hashed(i, 0, site, self.seed) for i in tokens]
        self.labels[site] = [k_means(sample, min(self.clusters, len(tokens)), self.rounds, begin)[0] for sample in x]
        return value

    def some(self, site: int, value: Tensor, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        drawn = [hashed(i, self.call, site, self.seed) for i in range(x.shape[1])]
        firsts: list[dict[int, int]] = []  # of each sample, the token of each cluster
        for labels in self.labels[site]:
            best: dict[int, int] = {}
            for i in sorted(range(len(labels)), key=lambda i: (-drawn[i], i)):
                best.setdefault(labels[i], i)
            firsts.append(best)
        assert all(len(best) == self.clusters for best in firsts)  # else more would be drawn
        chosen = torch.tensor([sorted(best.values()) for best in firsts])
        self.chosen[site] = chosen
        fresh = run(rows(x, chosen))
        moved = value.scatter(1, wide(chosen, value.shape[-1]), fresh)
        result = moved.clone()
        for b, labels in enumerate(self.labels[site]):
            for i, label in enumerate(labels):
                told = moved[b, firsts[b][label]]
                result[b, i] = self.gamma * told + (1 - self.gamma) * moved[b, i]
        if self.update:
            age = (self.call - self.when[site]).float()[..., None]
            new = self.differences(fresh, [rows(d, chosen) for d in self.table[site]], rows(age, chosen))
            at = [wide(chosen, d.shape[-1]) for d in self.table[site]]
            self.table[site] = [d.scatter(1, i, f) for d, i, f in zip(self.table[site], at, new, strict=True)]
            self.table[site][0] = self.table[site][0] + (result - moved)
            self.when[site] = self.when[site].scatter(1, chosen, self.call)
        return result

    def differences(self, value: Tensor, old: list[Tensor], age: Tensor) -> list[Tensor]:
        fresh = [value]
        for i in range(self.order):
            fresh.append((fresh[i] - old[i]) / age)
        return fresh


class PlainOracle:
    """``PlainDiT``, once a step."""

    def __init__(self, model: PlainDiT, branches: Branches) -> None:
        self.model, self.branches = model, branches

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.branches.begin()
        h, c = self.model.prepare(x, t, y)
        for i, block in enumerate(self.model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).unsqueeze(1).chunk(6, dim=-1)

            def attend(z: Tensor, block=block, shift=shift1, scale=scale1) -> Tensor:  # type: ignore[no-untyped-def]
                return block.attention(block.norm1(z) * (1 + scale) + shift)

            def feed(z: Tensor, block=block, shift=shift2, scale=scale2) -> Tensor:  # type: ignore[no-untyped-def]
                return block.mlp(block.norm2(z) * (1 + scale) + shift)

            h = h + gate1 * self.branches(2 * i, h, attend, tokenwise=False)
            h = h + gate2 * self.branches(2 * i + 1, h, feed, tokenwise=True)
        self.branches.end()
        return self.model.finish(h, c)


class JointOracle:
    """``JointDiT``, once a step. What words gain in the last block nothing reads: it is no branch."""

    def __init__(self, model: JointDiT, branches: Branches) -> None:
        self.model, self.branches = model, branches

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.branches.begin()
        words, patches, c = self.model.prepare(x, t, text)
        *first, last = self.model.blocks
        for i, block in enumerate(first):
            both = block.attention(words, patches, c)
            words, patches = (
                z + self.branches(4 * i + s, z, lambda _, own=both[s]: own, tokenwise=False)
                for s, z in enumerate((words, patches))
            )
            words, patches = (
                z + self.branches(4 * i + 2 + s, z, lambda r, s=s, block=block: block.mlp(s, r, c), tokenwise=True)
                for s, z in enumerate((words, patches))
            )
        both, at = last.attention(words, patches, c), 4 * len(first)
        patches = patches + self.branches(at, patches, lambda _: both[1], tokenwise=False)
        patches = patches + self.branches(at + 1, patches, lambda r: last.mlp(1, r, c), tokenwise=True)
        self.branches.end()
        return self.model.head(patches)
