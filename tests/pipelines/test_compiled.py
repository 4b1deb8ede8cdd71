"""Transformers that torch.compile has compiled, as a whole or by blocks, before or after."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

import toca_compile
from tests.pipelines import run
from tests.pipelines.builders import kinds, made
from toca_compile import Fora, FullCompute

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def wrapper(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def method(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


@pytest.mark.parametrize("how", [wrapper, method, blocks])
def test_compiled_before(how: Callable[[Any], None], caplog: pytest.LogCaptureFixture) -> None:
    """The model itself is traced, in one graph; what torch.compile made of it is back after ``restore``."""
    pipe, call = made("FLUX")
    plain = run(pipe, call, 4)
    how(pipe)
    compiled = pipe.transformer
    with caplog.at_level(logging.INFO, "toca_compile"):
        toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    said = [r for r in caplog.records if "was compiled by torch.compile before" in r.getMessage()]
    assert len(said) == (how is not blocks)
    assert torch.equal(run(pipe, call, 4), plain)
    pipe.transformer.policy = Fora(50, 3)
    run(pipe, call, 4)
    assert kinds(pipe) == [["frrf"]]
    assert toca_compile.summary(pipe).graphs == 1
    toca_compile.restore(pipe)
    assert pipe.transformer is compiled
    assert torch.equal(run(pipe, call, 4), plain)


def test_compiled_after() -> None:
    """What torch.compile is put around goes on being told of the pipeline's runs."""
    pipe, call = made("FLUX")
    toca_compile.optimize(pipe, Fora(50, 3), lowering="eager")
    first = run(pipe, call, 4)
    for how in (blocks, wrapper):
        how(pipe)
        assert torch.equal(run(pipe, call, 4), first)
        assert kinds(pipe) == [["frrf"]]
    assert toca_compile.summary(pipe).transformers["transformer"].steps["reuse"].calls == 2
    toca_compile.restore(pipe)
    assert not toca_compile.is_optimized(pipe)


TOCA = {"backend": "toca", "options": {"policy": Fora(4, 3), "lowering": "eager"}}


def by_method(pipe: Any) -> None:
    pipe.transformer.compile(**TOCA)


def by_wrapper(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, **TOCA)


@pytest.mark.parametrize("how", [by_method, by_wrapper])
def test_the_backend_is_reached(how: Callable[[Any], None]) -> None:
    """Of a pipeline, and of its transformer."""
    pipe, call = made("FLUX")
    how(pipe)
    run(pipe, call, 4)
    controls = toca_compile.controls(pipe.transformer)
    assert [step.kind.value for step in controls.steps] == ["full", "reuse", "reuse", "full"]
    for report in (toca_compile.explain(pipe), toca_compile.explain(pipe.transformer)):
        assert "Fora(num_steps=4" in str(report)
        assert "FluxTransformer2DModel" in str(report)
    assert toca_compile.summary(pipe).transformers["transformer"].steps["reuse"].calls == 2
    controls.policy = Fora(4, 2)
    run(pipe, call, 4)
    assert [step.kind.value for step in toca_compile.controls(pipe).steps] == ["full", "reuse", "full", "reuse"]
    run(pipe, call, 1)
    controls.reset()
    assert controls.cache_bytes == 0


def test_one_that_another_backend_compiled_is_none_of_ours() -> None:
    pipe, call = made("FLUX")
    method(pipe)
    run(pipe, call, 1)
    with pytest.raises(toca_compile.TocaError, match="controls takes"):
        toca_compile.controls(pipe.transformer)
