"""The published predictors, literally: on tensors, from the values of the full steps themselves."""

from collections.abc import Callable
from math import factorial
from typing import Any

import torch
from torch import Tensor

from tests.models import PlainDiT

Anchor = tuple[int, Tensor]  # step and value, oldest first
Predictor = Callable[[list[Anchor], int], Tensor]


def newton(anchors: list[Anchor], step: int) -> Tensor:
    """Divided differences."""
    at, table = [a for a, _ in anchors], [h.double() for _, h in anchors]
    total, product = 0 * table[0], 1.0
    columns = [list(table)]
    for order in range(1, len(at)):
        last = columns[-1]
        columns.append([(last[i + 1] - last[i]) / (at[i + order] - at[i]) for i in range(len(last) - 1)])
    for order, column in enumerate(columns):
        total = total + column[-1] * product
        product *= step - at[-1 - order]
    return total


def slopes(anchors: list[Anchor]) -> list[Tensor]:
    """TaylorSeer's table: each full step's differences from those of the full step before."""
    table: list[Tensor] = []
    for n, (at, value) in enumerate(anchors):
        fresh = [value.double()]
        for i, old in enumerate(table):
            fresh.append((fresh[i] - old) / (at - anchors[n - 1][0]))
        table = fresh
    return table


def taylor(anchors: list[Anchor], step: int) -> Tensor:
    x = step - anchors[-1][0]
    return torch.stack([d * x**i / factorial(i) for i, d in enumerate(slopes(anchors))]).sum(0)


def hicache(scale: float) -> Predictor:
    def predict(anchors: list[Anchor], step: int) -> Tensor:
        x = torch.tensor(scale * (step - anchors[-1][0]), dtype=torch.float64)
        terms = []
        for i, d in enumerate(slopes(anchors)):
            hermite = torch.special.hermite_polynomial_h(x, i)
            terms.append(d / factorial(i) * scale**i * hermite)
        return torch.stack(terms).sum(0)

    return predict


def foca(anchors: list[Anchor], step: int) -> Tensor:
    """Heun's recursion from the oldest anchor but one on, its own forecasts among the history."""
    if len(anchors) == 1:
        return anchors[0][1].double()
    known = {at: h.double() for at, h in anchors}
    steps = sorted(known)
    track = {steps[0]: known[steps[0]], steps[1]: known[steps[1]]}
    for at in range(steps[1] + 1, step + 1):
        full = max(s for s in steps if s < at)
        earlier = max(s for s in steps if s < full)
        slope = (known[full] - known[earlier]) / (full - earlier)
        first = at == steps[1] + 1
        change = slope if first else track[at - 1] - track[at - 2]
        track[at] = known.get(at, known[full] + (at - full) / 2 * (slope + change))
    return track[step]


def spectrum(degree: int, ridge: float, steps: int, local: float) -> Predictor:
    def basis(at: Tensor) -> Tensor:
        time = 2 * at.double() / steps - 1
        return torch.stack([torch.special.chebyshev_polynomial_t(time, k) for k in range(degree + 1)], -1)

    def predict(anchors: list[Anchor], step: int) -> Tensor:
        x = basis(torch.tensor([at for at, _ in anchors]))
        h = torch.stack([value.double().flatten() for _, value in anchors])
        fit = torch.linalg.solve(x.T @ x + ridge * torch.eye(degree + 1, dtype=torch.float64), x.T @ h)
        found = (basis(torch.tensor([step])) @ fit).reshape(anchors[0][1].shape)
        if local and len(anchors) > 1:
            (a, ha), (b, hb) = anchors[-2:]
            line = hb.double() + (hb.double() - ha.double()) / (b - a) * (step - b)
            return (1 - local) * found + local * line
        return found

    return predict


def dmd(ridge: float) -> Predictor:
    """By the singular values of the snapshots and the eigenvalues of what takes each to the next."""

    def predict(anchors: list[Anchor], step: int) -> Tensor:
        at, last = [a for a, _ in anchors], anchors[-1][1].double()
        even = 1
        while even < len(at) and at[-even] - at[-even - 1] == at[-1] - at[-2]:
            even += 1
        if even < 2:
            return last
        shots = torch.stack([h.double().flatten() for _, h in anchors[-even:]], 1)
        u, s, v = torch.linalg.svd(shots[:, :-1], full_matrices=False)
        onward = shots[:, 1:] @ v.T * (s / (s**2 + ridge * shots.square().sum(0).max()))
        values, vectors = torch.linalg.eig(u.T @ onward)
        modes = onward.to(values.dtype) @ vectors
        amounts = torch.linalg.pinv(modes) @ shots[:, -1].to(values.dtype)
        root = (values**2) ** (0.5 * (step - at[-1]) / (at[-1] - at[-2]))
        return (modes @ (root * amounts)).real.reshape(last.shape)

    return predict


class AnchorOracle:
    """``PlainDiT`` as a sampler's model: call it once a step. Full at the steps ``full``; between them every branch
    (or what all blocks add to the stream) is predicted from its values at the last ``kept`` full steps."""

    def __init__(self, model: PlainDiT, full: tuple[int, ...], kept: int, predict: Predictor, *, blocks: bool) -> None:
        self.model, self.full, self.kept, self.predict, self.blocks = model, full, kept, predict, blocks
        self.step = 0
        self.history: dict[Any, list[Anchor]] = {}

    def branch(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        if self.step in self.full:
            value = compute()
            self.history[key] = [*self.history.get(key, []), (self.step, value)][-self.kept :]
            return value
        return self.predict(self.history[key], self.step).float()

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.model.prepare(x, t, y)
        h = h + self.branch("blocks", lambda: self.run(h, c) - h) if self.blocks else self.run(h, c)
        self.step += 1
        return self.model.finish(h, c)

    def run(self, h: Tensor, c: Tensor) -> Tensor:
        """All blocks."""
        for i, block in enumerate(self.model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).unsqueeze(1).chunk(6, dim=-1)
            for name, norm, shift, scale, gate in (
                ("attn", block.norm1, shift1, scale1, gate1), ("mlp", block.norm2, shift2, scale2, gate2),
            ):  # fmt: skip
                y = norm(h) * (1 + scale) + shift

                def compute(y: Tensor = y, block: Any = block, attends: bool = name == "attn") -> Tensor:
                    made: Tensor = block.attention(y) if attends else block.mlp(y)
                    return made

                # As one stack the blocks are only run where they are computed.
                h = h + gate * (compute() if self.blocks else self.branch((name, i), compute))
        return h
