"""CacheState: every buffer that lives from step to step, declared once. Allocation, zeroing, bytes, dtype and device
follow from it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from toca_compile.ir.actions import Keep
from toca_compile.ir.program import Program, Stream
from toca_compile.ir.selectors import TokenSelector, by_token
from toca_compile.ir.state import State
from toca_compile.ir.storage import Storage
from toca_compile.ir.types import Site

Buffers = dict[tuple[Any, ...], torch.Tensor]  # of one run, by graph, kind, site and index


def like_buffer(
    kind: State, index: int, site: Site | Stream, keep: Keep, program: Program, selector: TokenSelector
) -> torch.Tensor:
    """A fake tensor of the shape, dtype and device of a site's buffer, or of one of what leaves skipped blocks.
    ``keep``: what is kept of it."""
    seen = seen_buffer(kind, index, site, keep, program, selector)
    storage = storage_of(kind, index, keep)
    return storage.lies(seen) if storage is not None else seen


def seen_buffer(
    kind: State, index: int, site: Site | Stream, keep: Keep, program: Program, selector: TokenSelector
) -> torch.Tensor:
    """The same as an emission sees it, however it lies in memory."""
    return _LIKE[kind](index, site, keep, program, selector)


def storage_of(kind: State, index: int, keep: Keep) -> Storage | None:
    """How a buffer lies in memory, if it holds values of the model."""
    history = keep.history
    if history is None or not kind.holds_values or (kind is State.HISTORY and index in history.numbers_kept):
        return None
    return history.storage


def owner(kind: State, site: Site | Stream, selector: TokenSelector) -> tuple[State, int]:
    """What a buffer is and whose: what a site's tokens are selected by may be measured of another."""
    source = selector.source(site) if kind is State.SOURCE_SCORE and isinstance(site, Site) else None
    return (State.SCORE, source.site) if source is not None else (kind, site.index)


def allocate(buffers: Buffers, name: tuple[Any, ...], like: torch.Tensor) -> torch.Tensor:
    """A run's buffer, made and zeroed when it is first asked for."""
    if name not in buffers:
        # Not inference tensors: those could not be written by a later step outside inference mode.
        with torch.inference_mode(False):
            buffers[name] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    return buffers[name]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Their size in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _output(index: int, site: Site | Stream, keep: Keep, program: Program, selector: TokenSelector) -> torch.Tensor:
    return _kept(site.output, keep)


def _history(index: int, site: Site | Stream, keep: Keep, program: Program, selector: TokenSelector) -> torch.Tensor:
    assert keep.history is not None
    return keep.history.buffers(_kept(site.output, keep))[index - 1]


def _stale_input(index: int, site: Site, keep: Keep, program: Program, selector: TokenSelector) -> torch.Tensor:
    assert site.row_proof is not None
    return _kept(site.row_proof.stale_inputs[index], keep)


def _keys(index: int, site: Site, keep: Keep, program: Program, selector: TokenSelector) -> torch.Tensor:
    assert site.query_proof is not None
    return _kept(site.query_proof.dense_inputs[index], keep)


def _stamp(index: int, site: Site, keep: Keep, program: Program, selector: TokenSelector) -> torch.Tensor:
    assert program.types is not None
    return by_token(site, program.types, site.axis.size, torch.int32)


def _score(index: int, site: Site, keep: Keep, program: Program, selector: TokenSelector) -> torch.Tensor:
    assert program.types is not None
    return selector.measured(site, program.types)[index]


def _source_score(index: int, site: Site, keep: Keep, program: Program, selector: TokenSelector) -> torch.Tensor:
    source = program.sites[owner(State.SOURCE_SCORE, site, selector)[1]]
    return _score(index, source, keep, program, selector)


def _kept(node: fx.Node, keep: Keep) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return (keep.history.storage if keep.history is not None else Storage()).seen(value)


_LIKE: dict[State, Callable[[int, Any, Keep, Program, TokenSelector], torch.Tensor]] = {
    State.OUTPUT: _output,
    State.CHANGE: _output,
    State.HISTORY: _history,
    State.STALE_INPUT: _stale_input,
    State.KEYS: _keys,
    State.STAMP: _stamp,
    State.SCORE: _score,
    State.SOURCE_SCORE: _source_score,
}
