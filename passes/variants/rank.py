"""Rank: the emission of the selector by rank: the tokens that matter most, by score, age and place in the picture."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from toca_compile.ir.selectors import Selector, TokenSelector
from toca_compile.ir.state import Number, State
from toca_compile.ir.types import AxisTypes, RowProof, Site
from toca_compile.passes.variants.compute import places
from toca_compile.passes.variants.emit import SegmentBuilder
from toca_compile.passes.variants.measure_scores import OF_ATTENTION, OF_ROWS, can_measure_rows, check_score
from toca_compile.passes.variants.select import SELECTIONS, Selection

toca = torch.ops.toca
aten = torch.ops.aten


@SELECTIONS.of(Selector)
class Ranked(Selection):
    """The K tokens that score highest."""

    def __init__(self, builder: SegmentBuilder, position: int, site: Site) -> None:
        super().__init__(builder, position, site)
        assert isinstance(builder.selector, Selector)
        self.selector = builder.selector

    @staticmethod
    def check(selector: TokenSelector, source: Site, types: AxisTypes) -> None:
        assert isinstance(selector, Selector)
        if source.attention:
            check_score(source.attention[-1], selector.score, types)

    def measure(self, expected: Callable[[], fx.Node]) -> Sequence[fx.Node]:
        """float32 ``[batch, tokens]``, by the last attention of the site or by what its forecast missed: s1 and the
        norms before normalisation, 1 + s2's entropy."""
        builder, site = self.builder, self.site
        if self.selector.score in OF_ATTENTION:
            measured = OF_ATTENTION[self.selector.score]
            return [measured(builder.call, builder.env, site, self.selector, builder.types)]
        missed = builder.call(aten.sub.Tensor, builder.env[site.output], expected())
        norms = builder.call(toca.token_norm.default, missed, *places(site))
        size = [builder.types.factors.size(site.batch), site.axis.size]
        return [builder.call(aten.reshape.default, norms, size)]

    def agreed(self, value: fx.Node) -> fx.Node:
        """The sum: each has some of the heads, or all of them, and only the order counts."""
        return self.builder.agreed(value, self.builder.types.groups, "sum")

    def measure_rows(self, proof: RowProof, values: Mapping[fx.Node, fx.Node]) -> Sequence[fx.Node]:
        measured = OF_ROWS.get(self.selector.score)
        if measured is None or not can_measure_rows(self.site, proof):
            return ()
        return [measured(self.builder.call, values, self.site, self.selector, self.builder.types)]

    def choose(self) -> fx.Node:
        selector, slot = self.selector, self.builder.slot
        stamp, step = slot(State.STAMP, self.position), slot(Number.STEP, self.position)
        base, axis = self._base(), self.site.axis
        grid = [*axis.grid, axis.offset, axis.frames] if axis.grid and selector.bonus else []
        return self.builder.call(
            toca.select_tokens.default, base, stamp, slot(Number.K, self.position), step,
            slot(Number.SINCE, self.position), selector.weight, grid, selector.cell, selector.bonus,
        )  # fmt: skip

    def _base(self) -> fx.Node:
        """The score before age and place, float32 ``[batch, tokens]``."""
        selector, builder, at = self.selector, self.builder, self.position
        stamp = builder.slot(State.STAMP, at)
        source = selector.source(self.site)
        if selector.rule.by_token is not None:
            numbers = (builder.slot(Number.STEP, at), builder.slot(Number.SITE, at))
            return builder.call(getattr(toca, selector.rule.by_token).default, stamp, *numbers, selector.seed)
        if source is None:
            zeros = builder.call(aten.zeros_like.default, stamp)
            return builder.call(aten._to_copy.default, zeros, dtype=torch.float32)
        base = self.source()
        if source.window is not None:
            # The attention runs over more than these tokens.
            base = builder.call(aten.slice.Tensor, base, 1, *source.window)
        return builder.call(toca.unit_scores.default, base)
