"""EasyCache, DiCache and SpeCa on ``PlainDiT``, literally."""

from collections.abc import Callable, Sequence
from math import factorial
from typing import Any

import torch
from torch import Tensor

from tests.models import PlainDiT
from tests.sampling import noise, sample

STEPS = 20


def size(x: Tensor) -> float:
    return float(x.double().abs().mean())


class Loop:
    """A sampler's model that says for each call whether it was computed."""

    def __init__(self, model: PlainDiT, steps: int, **settings: Any) -> None:
        self.model, self.steps, self.kinds = model, steps, []  # type: PlainDiT, int, list[str]
        self.full: list[int] = []
        self.total = 0.0
        self.__dict__.update(settings)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.model.prepare(x, t, y)
        step = len(self.kinds)
        out, computed = self.step(step, h, c)
        self.kinds.append("full" if computed else "skip")
        if computed:
            self.full.append(step)
        return self.model.finish(out, c)

    def blocks(self, h: Tensor, c: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        for block in list(self.model.blocks)[start:end]:
            h = block(h, c)
        return h

    def step(self, step: int, h: Tensor, c: Tensor) -> tuple[Tensor, bool]:
        raise NotImplementedError


class EasyLoop(Loop):
    """The published loop, with the stream for the latents and what leaves the blocks for the output."""

    threshold: float
    warmup: int
    limit: int | None = None
    rate: float | None = None
    before: Tensor | None = None
    ends: tuple[Tensor, Tensor] | None = None

    def step(self, step: int, h: Tensor, c: Tensor) -> tuple[Tensor, bool]:
        if step < self.warmup or step == self.steps - 1:
            skips = False
        elif self.limit is not None and step - self.full[-1] > self.limit:
            skips = False
        elif self.rate is None or self.before is None or self.ends is None:
            skips = False
        else:
            self.total += self.rate * size(h - self.before) / size(self.ends[1])
            skips = self.total < self.threshold
        self.before = h
        if skips:
            assert self.ends is not None
            return h + (self.ends[1] - self.ends[0]), False
        out, self.total = self.blocks(h, c), 0.0
        if self.ends is not None:
            self.rate = size(out - self.ends[1]) / size(h - self.ends[0])
        self.ends = h, out
        return out, True


class DiLoop(Loop):
    """The published loop; what is mixed is what the blocks behind the probe added."""

    threshold: float
    probe: int
    warmup: int
    before: Tensor | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.added: list[Tensor] = []
        self.probes: list[Tensor] = []
        self.shares: list[float] = []

    def step(self, step: int, h: Tensor, c: Tensor) -> tuple[Tensor, bool]:
        inner = self.blocks(h, c, 0, self.probe)
        skips = False
        if step >= self.warmup:
            assert self.before is not None
            self.total += size(inner - self.before) / size(self.before)
            skips = self.total < self.threshold
        self.before = inner
        if skips:
            if len(self.added) < 2:
                return inner + self.added[-1], False
            gone = size(inner - h - self.probes[-2]) / size(self.probes[-1] - self.probes[-2])
            self.shares.append(gone)
            share = min(max(gone, 1.0), 1.5)
            return inner + self.added[-2] + share * (self.added[-1] - self.added[-2]), False
        out, self.total = self.blocks(inner, c, self.probe), 0.0
        self.added.append(out - inner)
        self.probes.append(inner - h)
        return out, True


class SpeLoop(Loop):
    """Drafts by TaylorSeer's series, held against the last block; a refused step is computed."""

    threshold: float
    decay: float
    floor: float
    drafts: int
    limit: int | None
    order: int
    warmup: int
    last: int

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.series: dict[str, list[Tensor]] = {"stack": [], "last": []}
        self.errors: list[float] = []

    def draft(self, name: str, step: int) -> Tensor:
        x = step - self.full[-1]
        return torch.stack([d.double() * x**i / factorial(i) for i, d in enumerate(self.series[name])]).sum(0).float()

    def keep(self, name: str, step: int, value: Tensor) -> None:
        fresh, old = [value], self.series[name]
        for i in range(min(self.order, len(old))):
            fresh.append((fresh[i] - old[i]) / (step - self.full[-1]))
        self.series[name] = fresh

    def step(self, step: int, h: Tensor, c: Tensor) -> tuple[Tensor, bool]:
        cut = len(self.model.blocks) - self.last
        since = step - self.full[-1] if self.full else 0
        if step >= self.warmup and (self.limit is None or since <= self.limit):
            inner = h + self.draft("stack", step)
            out = self.blocks(inner, c, cut)
            error = size(self.draft("last", step) - (out - inner)) / size(out - inner)
            if since > self.drafts:
                self.errors.append(error)
            bound = max(self.threshold * self.decay ** (step / self.steps), self.floor)
            if since <= self.drafts or error <= bound:
                return out, False
        inner = self.blocks(h, c, 0, cut)
        out = self.blocks(inner, c, cut)
        self.keep("stack", step, inner - h)
        self.keep("last", step, out - inner)
        return out, True


def same_loop(dit: tuple[Any, Any], policy: Any, make: Callable[[Any], Loop]) -> Loop:
    """The run of a policy is that of its oracle, twice: nothing of the first may reach the second."""
    model, opt = dit
    opt.policy = policy
    for seed in (0, 0, 3):
        oracle, x = make(model), noise(2, (6, 10), seed=seed)
        expected = sample(oracle, STEPS, x)
        torch.testing.assert_close(sample(opt, STEPS, x), expected, rtol=1e-4, atol=1e-4)
        assert [r.kind.value for r in opt.steps] == oracle.kinds
    return oracle


def decide(loops: Sequence[Loop]) -> None:
    """The settings are such that they decide: some skip more than others, and gaps are uneven."""
    assert len({tuple(loop.kinds) for loop in loops}) > 1
    gaps = ["".join(k[0] for k in loop.kinds).strip("f").split("f") for loop in loops]
    assert any(len({*map(len, gap)}) > 1 for gap in gaps)
