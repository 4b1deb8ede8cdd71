"""What follows from the time, made at export: looked up in the first run, and made anew for all else."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.in_memory import POLICIES, STEPS, written
from tests.models import PlainDiT, randomize
from tests.pipelines import build
from tests.runs import optimized
from tests.sampling import noise, sample
from toca_compile import ExportError, Fora, LoadedModel
from toca_compile.exported.known import as_table
from toca_compile.exported.write import Traced, traces

INPUTS = (noise(), torch.zeros(2, dtype=torch.int64), torch.arange(2))
TIMES = [(STEPS - 1 - i) * 1000 // STEPS for i in range(STEPS)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(PlainDiT(depth=1))


@pytest.fixture(scope="module")
def traced(model: nn.Module) -> Traced:
    return traces(model, POLICIES[2], INPUTS, timesteps=TIMES)[""]


def counted(traced: Traced, calls: Counter[str]) -> LoadedModel:
    """A loaded model that counts what it calls of what follows from the time."""
    own = written(traced)
    timed = {traced.table.calls[i].entry for i in traced.table.timed}

    def counting(name: str, entry: Callable[[list[Tensor]], Sequence[Tensor]]) -> Any:
        def call(given: list[Tensor]) -> Sequence[Tensor]:
            calls[name] += 1
            return entry(given)

        return call

    own._entries = {name: counting(name, e) if name in timed else e for name, e in own._entries.items()}
    return own


def test_known_times_are_looked_up_and_others_computed(model: nn.Module, traced: Traced) -> None:
    calls: Counter[str] = Counter()
    own, live = counted(traced, calls), optimized(model, POLICIES[2])
    for seed in range(2):
        assert torch.equal(sample(own, STEPS, noise(seed=seed)), sample(live, STEPS, noise(seed=seed)))
    assert not calls
    own.reset()
    for t, y in ((999, torch.arange(2)), (TIMES[0], torch.arange(2) + 1)):
        given = noise(), torch.full((2,), t), y
        with torch.no_grad():
            assert torch.equal(own(*given), live(*given))
        assert calls
        calls.clear()
        own.reset()
        live.reset()


def test_other_weights_make_others(traced: Traced) -> None:
    calls: Counter[str] = Counter()
    own, other = counted(traced, calls), randomize(PlainDiT(depth=1), seed=5)
    before = traced.tensors.copy()
    own.update_weights({name: value.clone() for name, value in other.state_dict().items()})
    live = optimized(other, POLICIES[2])
    assert torch.equal(sample(own, STEPS, noise()), sample(live, STEPS, noise()))
    assert calls
    assert before.keys() == traced.tensors.keys()


def test_a_pipeline_knows_its_timesteps() -> None:
    """PixArt's follow from nothing else; those of a class-conditional model do, from labels that nobody knows."""
    pipe, call = build("PixArtAlphaPipeline")
    (made,) = traces(pipe, Fora(6, 3), call | {"num_inference_steps": 6}).values()
    assert len(as_table(made.known).rows) == len(made.known["rows"]) == 6
    pipe, call = build("DiTPipeline")
    (made,) = traces(pipe, Fora(6, 3), call | {"num_inference_steps": 6}).values()
    assert made.table.timed
    assert not made.known


def test_timesteps_that_are_of_no_use(model: nn.Module) -> None:
    batch = {name: {0: torch.export.Dim("batch", min=2, max=5)} for name in "xty"}
    late = INPUTS[0], INPUTS[1] + 500, INPUTS[2]
    for inputs, options, why in (
        (late, {"timesteps": [3.0]}, "must be one of them"),
        (INPUTS, {"timesteps": TIMES, "hoist": False}, "hoist"),
    ):
        with pytest.raises(ExportError, match=why):
            traces(model, Fora(4, 2), inputs, **options)
    with pytest.raises(ExportError, match="has one size"):
        traces(model, Fora(4, 2), INPUTS, dynamic=batch, timesteps=TIMES)
    with pytest.raises(ExportError, match="form='segments'"):
        toca_compile.export(model, Fora(4, 2), INPUTS, "m.pt2", form="program", timesteps=TIMES)
