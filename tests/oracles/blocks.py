"""FirstBlockCache and DBCache on ``PlainDiT``, literally: the residual of the middle blocks kept between full steps."""

from math import factorial

from torch import Tensor

from tests.models import PlainDiT


class BlockOracle:
    """A sampler's model: call it once a step."""

    def __init__(
        self, model: PlainDiT, first: int, last: int, *, threshold: float | None = None, limit: int | None = None,
        warmup: int = 1, interval: int = 1, order: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.first, self.last = model, first, last
        self.threshold, self.limit, self.warmup, self.interval, self.order = threshold, limit, warmup, interval, order
        self.call, self.last_full = 0, 0
        self.head: Tensor | None = None
        self.kept: list[Tensor] = []
        self.kinds: list[str] = []

    def skips(self, head: Tensor) -> bool:
        """Whether the middle blocks are left out, given what the first ones changed."""
        if self.call < self.warmup:
            return False
        if self.threshold is None:
            return (self.call - self.warmup + 1) % self.interval != 0
        if self.limit is not None and self.call - self.last_full > self.limit:
            return False
        assert self.head is not None
        return float((self.head - head).abs().mean() / self.head.abs().mean()) <= self.threshold

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        start, c = self.model.prepare(x, t, y)
        blocks = list(self.model.blocks)
        h = start
        for block in blocks[: self.first]:
            h = block(h, c)
        head = h - start
        if self.skips(head):
            distance = self.call - self.last_full
            h = h + sum(d * distance**i / factorial(i) for i, d in enumerate(self.kept))
            self.kinds.append("skip")
        else:
            entered = h
            for block in blocks[self.first : len(blocks) - self.last]:
                h = block(h, c)
            fresh = [h - entered]
            for i in range(min(self.order, len(self.kept))):
                fresh.append((fresh[i] - self.kept[i]) / (self.call - self.last_full))
            self.kept, self.head, self.last_full = fresh, head, self.call
            self.kinds.append("full")
        for block in blocks[len(blocks) - self.last :]:
            h = block(h, c)
        self.call += 1
        return self.model.finish(h, c)
