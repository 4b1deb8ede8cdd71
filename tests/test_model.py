"""The object that ``optimize`` returns: copies of it."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import toca_compile
from tests.models import diffusers_dit
from tests.pipelines import build, run
from tests.runs import optimized
from tests.sampling import noise
from toca_compile import Fora


def _pickled(opt: Any) -> Any:
    return pickle.loads(pickle.dumps(opt))


def _saved(opt: Any) -> Any:
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, _pickled, _saved])
def test_copies_work_and_share_no_cache(way: Callable[[Any], Any]) -> None:
    model = diffusers_dit()
    opt = optimized(model, Fora(4, 2), grid=(4, 4))

    def sampled(net: Any) -> Tensor:
        x = noise()
        with torch.no_grad():
            for t in (900, 700, 500, 300):
                x = x - net(x, timestep=torch.full((2,), t), class_labels=torch.arange(2)).sample
        return x

    expected = sampled(opt)
    with torch.no_grad():
        opt(noise(seed=4), timestep=torch.full((2,), 900), class_labels=torch.arange(2))
    other = way(opt)
    assert type(other) is type(opt)
    assert other.cache_bytes == 0
    assert other.policy == opt.policy
    assert torch.equal(sampled(other), expected)
    assert toca_compile.explain(other).program.grid == (4, 4)
    if way is not copy.copy:
        assert next(other.parameters()) is not next(opt.parameters())


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, _pickled])
def test_pipelines_are_copied(way: Callable[[Any], Any]) -> None:
    pipe, call = build("DiTPipeline")
    toca_compile.optimize(pipe, Fora(4, 2), lowering="eager")
    expected = run(pipe, call, 4)
    other = way(pipe)
    assert torch.equal(run(other, call, 4), expected)
    assert len(other.transformer.steps) == 4
    assert isinstance(other, type(pipe))
    assert toca_compile.explain(other).schedule == "FRFR"
