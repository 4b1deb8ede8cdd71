"""Series: the emission of histories. How a value's last version and what is kept beside it are written, and moved on.

``Dⁱ⁺¹ = (Dⁱ new − Dⁱ old) / steps`` at every step that computes the value, ``Σ Dⁱ·powerᵢ`` at one that forecasts it
(TaylorSeer, section 3.2). Where tokens are also recomputed one by one, each has a history of its own: the steps since
it was last computed stand for the steps since the whole value was.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from toca_compile.ir.history import CacheSpec, History
from toca_compile.ir.state import Number, State
from toca_compile.passes.variants.emit import Builder, Emissions

toca = torch.ops.toca
aten = torch.ops.aten

HISTORIES: "Emissions[type[Series]]" = Emissions()


@HISTORIES.of(History)
class Series:
    """The history of one kept value, in the graph of a variant: here, of the last version alone.

    Args:
        builder: of the graph.
        position: of the site (or of the range's output) whose value it is.
        history: what is kept.
        tokens: where the tokens and the batch lie in the value, if each token has its own history.
    """

    def __init__(
        self, builder: Builder, position: int, history: History, tokens: tuple[int, ...] | None = None
    ) -> None:
        self.builder, self.position, self.history, self.tokens = builder, position, history, tokens

    @property
    def output(self) -> fx.Node:
        """The buffer of the last version."""
        return self.builder.slot(State.OUTPUT, self.position)

    def age(self) -> fx.Node | None:
        """Steps since each token was computed, where each has its own history. To be asked before this step marks
        tokens as fresh."""
        if self.tokens is None:
            return None
        slots = ((State.STAMP, 0), (Number.SINCE, 0), (Number.STEP, 0))
        return self.builder.call(toca.token_age.default, *(self.builder.slot(k, self.position, i) for k, i in slots))

    def forecast(self, age: fx.Node | None = None) -> fx.Node:
        """The value as it is expected now; the buffer itself where nothing moves it."""
        return self.output

    def correction(self, value: fx.Node) -> fx.Node:
        """What a step that computed the value makes up for, before it is kept."""
        raise NotImplementedError

    def keep(self, value: fx.Node, *, moving: bool, age: fx.Node | None = None) -> None:
        """The whole value was computed. ``moving``: what moves it is made too."""
        self.builder.call(toca.store_.default, self.output, value)

    def keep_rows(self, rows: fx.Node, index: fx.Node, age: fx.Node) -> None:
        """Some tokens were computed, each with a history of its own."""
        raise NotImplementedError


@HISTORIES.of(CacheSpec)
class Differences(Series):
    """The last version and its differences."""

    history: CacheSpec

    @property
    def kept(self) -> list[fx.Node]:
        """The buffers, the last version first."""
        orders = range(1, self.history.order + 1)
        return [self.output, *(self.builder.slot(State.HISTORY, self.position, i) for i in orders)]

    def forecast(self, age: fx.Node | None = None) -> fx.Node:
        value, *differences = self.kept
        for order, difference in enumerate(differences, 1):
            power = self.builder.slot(Number.MOVE, self.position, order)
            if age is not None and self.tokens is not None:
                args = (value, difference, age, power, order, *self.tokens)
                value = self.builder.call(toca.forecast_tokens.default, *args)
            else:
                scaled = order if self.history.basis == "taylor" else 0
                value = self.builder.call(toca.forecast.default, value, difference, power, scaled)
        return value

    def keep(self, value: fx.Node, *, moving: bool, age: fx.Node | None = None) -> None:
        fresh = self._differences(value, self.kept, age, self.tokens) if moving else [value]
        for slot, new in reversed(list(zip(self.kept, fresh, strict=False))):
            self.builder.call(toca.store_.default, slot, new)

    def keep_rows(self, rows: fx.Node, index: fx.Node, age: fx.Node) -> None:
        assert self.tokens is not None
        dim, batch_dim, *span = self.tokens
        old = [self.builder.call(toca.gather_tokens.default, kept, index, *self.tokens) for kept in self.kept]
        # Among rows the tokens are one dimension.
        merged = batch_dim - (span[0] - 1 if span and batch_dim > dim else 0)
        rows_age = self.builder.call(aten.gather.default, age, 1, index)
        fresh = self._differences(rows, old, rows_age, (dim, merged))
        for slot, new in zip(self.kept, fresh, strict=True):
            self.builder.call(toca.scatter_tokens_.default, slot, index, new, *self.tokens)

    def _differences(
        self, value: fx.Node, old: Sequence[fx.Node], age: fx.Node | None, tokens: Sequence[int] | None
    ) -> list[fx.Node]:
        """Each difference from the one below it, new and old, after the value itself."""
        fresh = [value]
        for order, before in enumerate(old[:-1], 1):
            op: Any = toca.difference.default
            if age is not None and tokens is not None:
                op, steps = toca.difference_tokens.default, (age, *tokens)
            else:
                steps = (self.builder.slot(Number.KEEP, self.position, order),)
            fresh.append(self.builder.call(op, fresh[-1], before, *steps))
        return fresh


def series_of(
    builder: Builder, position: int, history: History | None, tokens: tuple[int, ...] | None = None
) -> Series:
    """The series of a kept value."""
    assert history is not None
    return HISTORIES.find(history)(builder, position, history, tokens)
