"""What policies need to be told of a model and its sampler, measured in one uncached run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from toca_compile.api import controls, optimize, restore
from toca_compile.diffusers import is_pipeline, transformers_of
from toca_compile.errors import TocaError
from toca_compile.ir.plan import Plan
from toca_compile.ir.state import State
from toca_compile.ir.types import Site
from toca_compile.policies.anchors import Given
from toca_compile.policies.base import CachingPolicy
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.when import Listed
from toca_compile.quality.evaluation import Sampler
from toca_compile.quality.settings import SearchSettings, overridden

DEFAULTS = SearchSettings()


def magnitudes(
    model: Any, sampler: Sampler, *, first: int = 0, settings: SearchSettings = DEFAULTS, **overrides: Any
) -> tuple[float, ...]:
    """MagCache's ratios: the mean over tokens of how long the vector is that the blocks add to each, as a share of how
    long it was at the step before; 1 for the first step. For ``MagCache(ratios=…)``.

    Args:
        model: the uncached model, in eval mode, or a diffusers pipeline with one transformer, which is given back as it
            was.
        sampler: samples with it; with a pipeline it is given the pipeline and calls it.
        first: blocks that every step will compute, whose share is left out.
        settings: steps, seeds (the first counts), how many samples, the lowering.
        **overrides: single settings by name, instead of those in ``settings``.

    Returns:
        One number a step. With guidance in two passes, of the first pass.

    Raises:
        TocaError: the model's blocks cannot be skipped, or a sampling has another number of steps.
    """
    settings = overridden(settings, overrides)
    with _added(model, sampler, first, settings) as values:
        found = [1.0]
        for before, now in pairwise(values):
            found.append(float((_lengths(now) / (_lengths(before) + 1e-8)).mean()))
    return tuple(found)


def least_squares(
    model: Any,
    sampler: Sampler,
    full: Sequence[int],
    *,
    kept: int = 3,
    settings: SearchSettings = DEFAULTS,
    **overrides: Any,
) -> Given:
    """L2P's weights (arXiv 2604.26365) by their closed form: of each step that is not full, those of the last ``kept``
    full ones with the least squared error of what the blocks add, in one uncached run.

    Errors of one step are not those of the picture: ``benchmarks/results/plans.md`` has what such weights keep of it on
    the trained models of this repository.

    Args:
        model, sampler, settings, overrides: as of ``magnitudes``.
        full: the full steps, as rising call indices with 0 among them.
        kept: as in ``Anchors``.

    Raises:
        TocaError: the model's blocks cannot be skipped, or a sampling has another number of steps.
    """
    settings = overridden(settings, overrides)
    Listed(tuple(full))
    rows: list[tuple[float, ...]] = []
    with _added(model, sampler, 0, settings) as values:
        flat = [torch.cat([s.double().flatten() for s in streams]) for streams in values]
        for step, value in enumerate(flat):
            anchors = [f for f in full if f < step][-kept:]
            if step in full:
                rows.append(())
                continue
            known = torch.stack([flat[f] for f in anchors], 1)
            solved = torch.linalg.lstsq(known.T @ known, (known.T @ value)[:, None], driver="gelsd").solution
            rows.append(tuple(solved[:, 0].tolist()))
    return Given(tuple(rows))


def _lengths(streams: list[Tensor]) -> Tensor:
    return torch.cat([s.float().norm(dim=-1).flatten() for s in streams])


@contextmanager
def _added(model: Any, sampler: Sampler, first: int, settings: SearchSettings) -> Iterator[list[list[Tensor]]]:
    """What the blocks added at each step of a run, stream by stream."""
    parts = list(transformers_of(model).values()) if is_pipeline(model) else [model]
    if len(parts) != 1 or not isinstance(parts[0], nn.Module):
        raise TocaError(f"it takes a model or a pipeline with one transformer, not {type(model).__name__}")
    seen: dict[str, list[list[Tensor]]] = {}

    def look(*_: Any) -> None:
        run = session.control.running
        if run is not None:
            sites = len(session.executors[0].program.sites)
            kept = [b for (*_, kind, of, _), b in run.buffers.items() if kind is State.OUTPUT and of >= sites]
            seen.setdefault(run.context, []).append([b.clone() for b in kept])

    net = optimize(model, _Keeping(settings.steps, first), lowering=settings.lowering)
    session = controls(net)._session
    hook = parts[0].register_forward_hook(look)
    try:
        sampler(net, settings.steps, settings.seeds[0], settings.samples)
        values = next(iter(seen.values()), [])
        if len(values) != settings.steps:
            raise TocaError(
                f"a sampling in {settings.steps} steps called the model {len(values)} times in its first pass"
            )
        yield values
    finally:
        hook.remove()
        if is_pipeline(model):
            restore(model)


@dataclass(frozen=True)
class _Keeping(CachingPolicy):
    """All steps compute, and what the blocks add is kept for one more, which never comes."""

    num_steps: int
    first: int

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        every = Listed(tuple(range(self.num_steps)))
        return Composition(self.num_steps + 1, every, (Rule(SkipBlocks(self.first)),)).plan(sites)
