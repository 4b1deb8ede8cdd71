"""Select: the indices of the tokens that a step computes, by score, age and place in the picture."""

import torch
from torch import fx

from toca_compile.ir.state import Number, State
from toca_compile.ir.types import Site
from toca_compile.passes.variants.emit import SegmentBuilder

toca = torch.ops.toca
aten = torch.ops.aten


def select(builder: SegmentBuilder, position: int, site: Site) -> fx.Node:
    """The K tokens that matter most, int64 ``[batch, k]``, marked as computed in this step."""
    selector, slot = builder.selector, builder.slot
    stamp, step = slot(State.STAMP, position), slot(Number.STEP, position)
    base = _base(builder, position, site)
    axis = site.axis
    grid = [*axis.grid, axis.offset, axis.frames] if axis.grid and selector.bonus else []
    index = builder.call(
        toca.select_tokens.default, base, stamp, slot(Number.K, position), step, slot(Number.SINCE, position),
        selector.weight, grid, selector.cell, selector.bonus,
    )  # fmt: skip
    builder.call(toca.mark_fresh_.default, stamp, index, step)
    return index


def _base(builder: SegmentBuilder, position: int, site: Site) -> fx.Node:
    """The score before age and place, float32 ``[batch, tokens]``."""
    selector, stamp = builder.selector, builder.slot(State.STAMP, position)
    source = selector.rule.source(site)
    if selector.rule.by_token is not None:
        numbers = (builder.slot(Number.STEP, position), builder.slot(Number.SITE, position))
        return builder.call(getattr(toca, selector.rule.by_token).default, stamp, *numbers, selector.seed)
    if source is None:
        return builder.call(aten._to_copy.default, builder.call(aten.zeros_like.default, stamp), dtype=torch.float32)
    # One buffer must be one input, or the order of its writes and reads is lost.
    owner = next((i for i, s in enumerate(builder.sites) if s.index == source.site), None)
    base = builder.slot(State.SOURCE_SCORE, position) if owner is None else builder.slot(State.SCORE, owner)
    if source.window is not None:
        # The attention runs over more than these tokens.
        base = builder.call(aten.slice.Tensor, base, 1, *source.window)
    return builder.call(toca.unit_scores.default, base)
