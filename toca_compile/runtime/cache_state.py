"""CacheState: every buffer that lives from step to step, declared once. Allocation, zeroing, bytes, dtype and device
follow from it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from toca_compile.ir.plan import Plan
from toca_compile.ir.program import Program
from toca_compile.ir.state import State
from toca_compile.ir.types import Site

Buffers = dict[tuple[Any, ...], torch.Tensor]  # of one run, by graph, kind, site and index


def like_buffer(kind: State, index: int, site: Site, program: Program, plan: Plan) -> torch.Tensor:
    """A fake tensor of the shape, dtype and device of a site's buffer."""
    return _LIKE[kind](index, site, program, plan)


def owner(kind: State, site: Site, plan: Plan) -> tuple[State, int]:
    """What a buffer is and whose: the score that ranks a site's tokens is that of the site whose attention tells it."""
    source = plan.selector.rule.source(site) if kind is State.SOURCE_SCORE else None
    return (State.SCORE, source.site) if source is not None else (kind, site.index)


def allocate(buffers: Buffers, name: tuple[Any, ...], like: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A run's buffer, made and zeroed when it is first asked for."""
    if name not in buffers:
        example = like()
        # Not inference tensors: those could not be written by a later step outside inference mode.
        with torch.inference_mode(False):
            buffers[name] = torch.zeros(example.shape, dtype=example.dtype, device=example.device)
    return buffers[name]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Their size in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _output(index: int, site: Site, program: Program, plan: Plan) -> torch.Tensor:
    history = plan.keep(site.index).history
    return _kept(site.output.meta["val"], history.dtype if history is not None else None)


def _history(index: int, site: Site, program: Program, plan: Plan) -> torch.Tensor:
    history = plan.keep(site.index).history
    assert history is not None
    return history.buffers(_output(0, site, program, plan))[index - 1]


def _stale_input(index: int, site: Site, program: Program, plan: Plan) -> torch.Tensor:
    assert site.row_proof is not None
    return _kept(site.row_proof.stale_inputs[index].meta["val"], plan.memory.dtype)


def _keys(index: int, site: Site, program: Program, plan: Plan) -> torch.Tensor:
    assert site.query_proof is not None
    return _kept(site.query_proof.dense_inputs[index].meta["val"], plan.memory.dtype)


def _stamp(index: int, site: Site, program: Program, plan: Plan) -> torch.Tensor:
    return _by_token(site, program, site.axis.size, torch.int32)


def _score(index: int, site: Site, program: Program, plan: Plan) -> torch.Tensor:
    assert program.types is not None
    return _by_token(site, program, program.types.factors.size(plan.selector.rule.tokens(site)), torch.float32)


def _source_score(index: int, site: Site, program: Program, plan: Plan) -> torch.Tensor:
    return _score(0, program.sites[owner(State.SOURCE_SCORE, site, plan)[1]], program, plan)


def _by_token(site: Site, program: Program, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    assert program.types is not None
    output: torch.Tensor = site.output.meta["val"]
    return output.new_empty([program.types.factors.size(site.batch), tokens], dtype=dtype)


def _kept(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value.new_empty(value.shape, dtype=dtype)


_LIKE: dict[State, Callable[[int, Site, Program, Plan], torch.Tensor]] = {
    State.OUTPUT: _output,
    State.HISTORY: _history,
    State.STALE_INPUT: _stale_input,
    State.KEYS: _keys,
    State.STAMP: _stamp,
    State.SCORE: _score,
    State.SOURCE_SCORE: _source_score,
}
