"""Exported models without a file and without a compiler: the table and the entries' own graphs, told by sizes as
compiled entries are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from toca_compile import (
    BlockCache,
    ClusCa,
    Composition,
    DuCa,
    Fora,
    FullCompute,
    LoadedModel,
    TaylorSeer,
    TaylorToCa,
    ToCa,
)
from toca_compile.compiler.lay_out import Entry
from toca_compile.exported.as_one import as_one
from toca_compile.exported.table import from_json, to_json
from toca_compile.exported.whole import CompiledSteps, WholeModel
from toca_compile.exported.write import Traced, traces
from toca_compile.policies import Anchors, Hermite, Listed, Rule

STEPS = 8
POLICIES = [
    FullCompute(),
    Fora(STEPS, 3),
    ToCa(STEPS, interval=4, fresh_ratio=0.3),
    ToCa(STEPS, interval=4, fresh_ratio=0.3, score="attention"),
    DuCa(STEPS, 3, fresh_ratio=0.3),
    ClusCa(STEPS, 4, clusters=4),
    TaylorSeer(STEPS, 3, 2),
    TaylorSeer(STEPS, 3, 2, basis="newton"),
    TaylorToCa(STEPS, 4, 2, 0.3, keys="fresh", mlp=False, update=False),
    Composition(STEPS, Listed((0, 1, 4)), (Rule(Anchors(Hermite(0.5), 3)),)),
    BlockCache(STEPS, first=0, interval=3, order=2, basis="newton"),
    BlockCache(STEPS, threshold=0.5),
    BlockCache(STEPS, threshold=0.5, limit=2, order=1),
]
"""A policy of each kind."""


def loaded(model: Any, policy: Any, example_inputs: Any, **options: Any) -> LoadedModel:
    """What ``load`` returns of what ``export`` writes."""
    (traced,) = traces(model, policy, example_inputs, **options).values()
    return written(traced)


def written(traced: Traced) -> LoadedModel:
    """The same of one transformer."""
    about, table = from_json(to_json(traced.about, traced.table))
    return LoadedModel(
        about, table, traced.tensors, {name: eager(entry) for name, entry in traced.laid.entries.items()}, traced.known
    )


def whole(model: Any, policy: Any, example_inputs: Any, **options: Any) -> LoadedModel:
    """What ``load`` returns of what ``export(form="program")`` writes."""
    (traced,) = traces(model, policy, example_inputs, in_memory=True, **options).values()
    one = as_one(traced)
    about, table = from_json(to_json(traced.about, one.table))
    assert table.whole is not None
    steps = CompiledSteps(table, lambda given: one.module(*given), traced.tensors, torch.device("cpu"))
    return WholeModel(about, table, traced.tensors, steps, table.whole.inputs)


def eager(entry: Entry) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """An entry that runs op by op."""
    numbers = [not isinstance(e, torch.Tensor) for e in entry.examples]

    def call(given: list[Tensor]) -> Sequence[Tensor]:
        told = [x.shape[1] - x.shape[2] if number else x for x, number in zip(given, numbers, strict=True)]
        results: Sequence[Tensor] = entry.variant.module(*told)
        return results

    return call
