"""Layouts: how tokens lie in a picture, where the graph does not show it but what the model is called with does.

Models that are handed packed latents ``[batch, tokens, channels]`` are told where each token lies, for their positional
embedding; others that are split into several graphs unfold the latents in the first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from toca_compile.ir.factors import Factors
from toca_compile.ir.types import Layout, Site, TokenAxis

_COLUMNS = 4  # of a table of positions at most: which picture, frame, row, column


def layouts_of(inputs: Iterable[Any], patch: tuple[int, int] | None) -> tuple[Layout, ...]:
    """What inputs say of the layout of tokens: tables of positions ``[(batch), tokens, 2 to 4]``, and where the model
    says into which ``patch`` it cuts latents, those. Read once for each graph, as it is traced."""
    found: dict[Layout, None] = {}
    for value in inputs:
        if (
            type(value) is not torch.Tensor
            or value.layout != torch.strided
            or value.dim() < 2
            or not value.numel()
            or value.is_meta
            or value.is_complex()
        ):
            continue
        layout = None
        if value.shape[-1] in range(2, _COLUMNS + 1):
            layout = _of_table(value)
        elif patch is not None and value.dim() in (4, 5) and value.is_floating_point():
            layout = _of_latents(value.shape, patch)
        if layout is not None:
            found[layout] = None
    return tuple(found)


def lay_out(sites: Sequence[Site], factors: Factors, layouts: Sequence[Layout]) -> tuple[Site, ...]:
    """The sites, with the grid of those axes whose graph shows none."""
    return tuple(replace(s, axis=_laid_out(s.axis, factors, layouts)) for s in sites) if layouts else tuple(sites)


def _laid_out(axis: TokenAxis, factors: Factors, layouts: Sequence[Layout]) -> TokenAxis:
    offset = 0
    for part in factors.segments(axis.factors) if axis.grid is None else ():
        size = factors.size(part)
        layout = next((x for x in layouts if x.tokens == size), None)
        if layout is not None:
            return replace(axis, grid=(layout.height, layout.width), offset=offset, frames=layout.frames)
        offset += size
    return axis


def _of_table(table: torch.Tensor) -> Layout | None:
    """Rows that number a picture's places line by line, in the last two columns; several pictures may follow."""
    places = table.reshape(-1, *table.shape[-2:])[0, :, -2:].double().cpu()
    starts = (places[:, 1] == places[0, 1]).nonzero().flatten().tolist()
    width = starts[1] if len(starts) > 1 else 0
    if width < 2:
        return None
    number = torch.arange(len(places))
    lines = torch.stack([number // width, number % width], dim=-1) + places[0]
    differs = (lines != places).any(-1).nonzero().flatten().tolist()
    height = (differs[0] if differs else len(places)) // width
    if height < 2:
        return None
    pictures = places.split(height * width)
    frames = next((i for i, p in enumerate(pictures) if not torch.equal(p, pictures[0])), len(pictures))
    return Layout(len(places), height, width, frames)


def _of_latents(shape: Sequence[int], patch: tuple[int, int]) -> Layout | None:
    """Latents ``[batch, channels, (frames), height, width]``."""
    height, width = shape[-2] // patch[0], shape[-1] // patch[1]
    frames = shape[-3] if len(shape) == 5 else 1
    if height < 2 or width < 2:
        return None
    return Layout(frames * height * width, height, width, frames)
