"""Series: what is kept of a value beside its last version, and how it is moved on from there.

``Dⁱ⁺¹ = (Dⁱ new − Dⁱ old) / steps`` at every step that computes the value, ``Σ Dⁱ·powerᵢ`` at one that forecasts it
(TaylorSeer, section 3.2). Where tokens are also recomputed one by one, each has a history of its own: the steps since
it was last computed stand for the steps since the whole value was.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

import toca_compile.ops  # noqa: F401  (defines the toca:: ops)
from toca_compile.ir.plan import CacheSpec

toca = torch.ops.toca
aten = torch.ops.aten


class Series:
    """The history of one kept value, in the graph of a variant.

    Args:
        emit: adds a call to the graph.
        slot: the graph's input of a kind and index (the order, of differences and their numbers).
        memory: how many differences there are, and of which kind.
        tokens: where the tokens and the batch lie in the value, if each token has its own history.
    """

    def __init__(
        self,
        emit: Callable[..., fx.Node],
        slot: Callable[[str, int], fx.Node],
        memory: CacheSpec,
        tokens: tuple[int, ...] | None = None,
    ) -> None:
        self.emit, self.slot, self.memory, self.tokens = emit, slot, memory, tokens
        self.kept = [slot("cache", 0), *(slot("diff", i) for i in range(1, memory.order + 1))]

    def age(self) -> fx.Node:
        """Steps since each token was computed. To be asked before this step marks tokens as fresh."""
        return self.emit(toca.token_age.default, self.slot("stamp", 0), self.slot("since", 0), self.slot("step", 0))

    def forecast(self, age: fx.Node | None = None) -> fx.Node:
        """The value as it is expected now; the cache itself where no differences are kept."""
        value = self.kept[0]
        for order, difference in enumerate(self.kept[1:], 1):
            power = self.slot("power", order)
            if age is not None and self.tokens is not None:
                value = self.emit(toca.forecast_tokens.default, value, difference, age, power, order, *self.tokens)
            else:
                scaled = order if self.memory.basis == "taylor" else 0
                value = self.emit(toca.forecast.default, value, difference, power, scaled)
        return value

    def keep(self, value: fx.Node, *, differences: bool, age: fx.Node | None = None) -> None:
        """The whole value was computed."""
        fresh = self._differences(value, self.kept, age, self.tokens) if differences else [value]
        for slot, new in reversed(list(zip(self.kept, fresh, strict=False))):
            self.emit(toca.store_.default, slot, new)

    def keep_rows(self, rows: fx.Node, index: fx.Node, age: fx.Node) -> None:
        """Some tokens were computed."""
        assert self.tokens is not None
        dim, batch_dim, *span = self.tokens
        old = [self.emit(toca.gather_tokens.default, kept, index, *self.tokens) for kept in self.kept]
        # Among rows the tokens are one dimension.
        merged = batch_dim - (span[0] - 1 if span and batch_dim > dim else 0)
        rows_age = self.emit(aten.gather.default, age, 1, index)
        fresh = self._differences(rows, old, rows_age, (dim, merged))
        for slot, new in zip(self.kept, fresh, strict=True):
            self.emit(toca.scatter_tokens_.default, slot, index, new, *self.tokens)

    def _differences(
        self, value: fx.Node, old: Sequence[fx.Node], age: fx.Node | None, tokens: Sequence[int] | None
    ) -> list[fx.Node]:
        """Each difference from the one below it, new and old, after the value itself."""
        fresh = [value]
        for order, before in enumerate(old[:-1], 1):
            steps: tuple[Any, ...] = (self.slot("spacing", order),)
            op = toca.difference.default
            if age is not None and tokens is not None:
                op, steps = toca.difference_tokens.default, (age, *tokens)
            fresh.append(self.emit(op, fresh[-1], before, *steps))
        return fresh
