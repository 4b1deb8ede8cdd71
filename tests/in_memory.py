"""Exported models without a file and without a compiler: the table and the entries' own graphs, told by sizes as
compiled entries are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from toca_compile import LoadedModel
from toca_compile.compiler.lay_out import Entry
from toca_compile.exported.table import from_json, to_json
from toca_compile.exported.write import trace


def loaded(model: Any, policy: Any, example_inputs: Any, **options: Any) -> LoadedModel:
    """What ``load`` returns of what ``export`` writes."""
    traced = trace(model, policy, example_inputs, **options)
    about, table = from_json(to_json(traced.about, traced.table))
    return LoadedModel(
        about, table, traced.tensors, {name: eager(entry) for name, entry in traced.laid.entries.items()}
    )


def eager(entry: Entry) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """An entry that runs op by op."""
    numbers = [not isinstance(e, torch.Tensor) for e in entry.examples]

    def call(given: list[Tensor]) -> Sequence[Tensor]:
        told = [x.shape[1] - x.shape[2] if number else x for x, number in zip(given, numbers, strict=True)]
        results: Sequence[Tensor] = entry.variant.module(*told)
        return results

    return call
