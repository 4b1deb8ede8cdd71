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
from toca_compile.ir.anchors import Weights
from toca_compile.ir.plan import Plan
from toca_compile.ir.state import State
from toca_compile.ir.types import Site
from toca_compile.policies.anchors import Foca, Given, Hermite, Polynomial
from toca_compile.policies.base import CachingPolicy
from toca_compile.policies.composition import Composition, Rule, SkipBlocks
from toca_compile.policies.hyca import ByChannel
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


def channel_rules(
    model: Any,
    sampler: Sampler,
    full: Sequence[int],
    *,
    kept: int = 3,
    settings: SearchSettings = DEFAULTS,
    **overrides: Any,
) -> ByChannel:
    """HyCa's groups of channels (arXiv 2510.04188) and the rule of each, from one uncached run: channels are told apart
    by k-means (as many groups as there are rules) on how much what the blocks add changes from step to step, and how
    much that change does, each as a share of what is added; a group takes the rule with the least squared error.

    Args:
        model, sampler, settings, overrides: as of ``magnitudes``.
        full, kept: as of ``least_squares``.

    Returns:
        For ``Anchors(by=…, kept)`` of all blocks.

    Raises:
        TocaError: the model's blocks cannot be skipped, their streams have different numbers of channels, or a sampling
            has another number of steps.
    """
    settings = overridden(settings, overrides)
    Listed(tuple(full))
    with _added(model, sampler, 0, settings) as values:
        widths = {s.shape[-1] for streams in values for s in streams}
        if len(widths) != 1:
            raise TocaError(f"channels are grouped for all streams at once, and these have {sorted(widths)}")
        run = torch.stack([torch.cat([s.double().flatten(0, -2) for s in streams]) for streams in values])
    return rules_of(run, full, kept)


def rules_of(run: Tensor, full: Sequence[int], kept: int) -> ByChannel:
    """The same of what was added at each step, ``[steps, tokens, channels]``."""
    sizes = [run.diff(n=order, dim=0).abs().mean((0, 1)) for order in range(min(3, len(run)))]
    told = torch.stack([(size / (sizes[0] + 1e-12) + 1e-12).log() for size in sizes[1:]], 1)
    groups = _groups((told - told.mean(0)) / (told.std(0) + 1e-12), len(_SOLVERS))
    errors = torch.zeros(len(_SOLVERS), run.shape[-1], dtype=run.dtype)
    for step in set(range(len(run))) - set(full):
        anchors = [f for f in full if f < step][-kept:]
        for i, rule in enumerate(_SOLVERS):
            weights = torch.tensor(rule.weights(anchors, step), dtype=run.dtype)
            errors[i] += (torch.tensordot(weights, run[anchors], 1) - run[step]).square().sum(0)
    best = [int(errors[:, groups == group].sum(1).argmin()) for group in range(len(_SOLVERS))]
    used = sorted({best[group] for group in groups.tolist()})
    return ByChannel(tuple(_SOLVERS[i] for i in used), tuple(used.index(best[group]) for group in groups.tolist()))


_SOLVERS: tuple[Weights, ...] = (Polynomial(1), Polynomial(2), Polynomial(3), Foca(), Hermite())


def _groups(told: Tensor, count: int, rounds: int = 20) -> Tensor:
    """K-means of rows, from such as are evenly spread by the first of what is told: the group of each."""
    order = told[:, 0].argsort()
    centres = told[order[torch.linspace(0, len(told) - 1, count).round().long()]]
    for _ in range(rounds):
        groups = torch.cdist(told, centres).argmin(1)
        means = [told[groups == i].mean(0) if (groups == i).any() else centres[i] for i in range(count)]
        centres = torch.stack(means)
    return groups


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
    # Else Dynamo compiles it anew at each step, for what it has seen so far.
    hook = parts[0].register_forward_hook(torch.compiler.disable(look))
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
