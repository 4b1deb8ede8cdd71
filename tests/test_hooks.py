"""Hooks around the forward of layers, as libraries and users put them there."""

import functools
from typing import Any

import pytest
import torch
from torch import nn

import toca_compile
from tests.models import PlainDiT, randomize
from tests.runs import TIMES, kinds, optimized, steps
from tests.sampling import noise
from toca_compile import Fora, FullCompute, NoSiteError, TocaError
from toca_compile.hooks import hooked


def around(module: nn.Module, before: Any, after: Any = lambda out: out) -> None:
    """Replace the forward of one object, as libraries do."""
    forward = module.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        before()
        return after(forward(*args, **kwargs))

    module.forward = watched


def test_what_can_be_traced_is() -> None:
    model = randomize(PlainDiT())
    blocks: Any = model.blocks
    for block in blocks:
        around(block.mlp, lambda: None, lambda out: 2 * out)
    assert [one.path for one in hooked(model)] == [f"blocks.{i}.mlp" for i in range(len(blocks))]
    wanted = steps(model, noise(), TIMES[:3])
    opt = optimized(model, FullCompute())
    assert torch.equal(steps(opt, noise(), TIMES[:3]), wanted)
    opt.policy = Fora(8, 4)
    steps(opt, noise(), TIMES)
    assert kinds(opt) == "frrrfrrr"


def test_what_cannot_is_named() -> None:
    calls = []

    def count() -> None:
        calls.append(1)

    count = torch.compiler.disable(count)

    model = randomize(PlainDiT())
    layers = [(path, m) for path, m in model.named_modules() if not list(m.children())]
    for _, layer in layers:
        around(layer, count)
    opt = optimized(model, Fora(8, 4))
    with pytest.raises(NoSiteError) as error:
        steps(opt, noise(), TIMES[:1])
    assert f"the first on {layers[0][0]}" in str(error.value)
    assert type(layers[0][1]).__name__ in str(error.value)  # the function wrapped
    assert "remove them" in str(error.value)
    assert "right module" not in str(error.value)
    calls.clear()
    wanted = steps(model, noise(), TIMES[:2])
    alone = len(calls)
    calls.clear()
    opt = optimized(model, Fora(8, 4), strict=False)
    assert torch.equal(steps(opt, noise(), TIMES[:2]), wanted)
    assert len(calls) == alone


class Offload:
    """A hook of a library that brings weights in when a layer runs."""


def test_weights_that_are_elsewhere_while_tracing() -> None:
    model = randomize(PlainDiT())
    layer: Any = model.head
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    forward = type(layer).forward
    layer.to("meta")
    layer._hf_hook = Offload()
    layer.forward = lambda x: torch.func.functional_call(Bare(layer), weights, (x,))

    class Bare(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.weight, self.bias = inner.weight, inner.bias

        def forward(self, x: torch.Tensor) -> Any:
            return forward(self, x)

    wanted = steps(model, noise(), TIMES[:2])
    with pytest.raises(TocaError, match="weights of head are there only while that layer runs, brought in by Offload"):
        steps(optimized(model, Fora(8, 4)), noise(), TIMES[:2])
    assert torch.equal(steps(optimized(model, Fora(8, 4), strict=False), noise(), TIMES[:2]), wanted)


def test_the_models_own_context_is_entered_too() -> None:
    """diffusers' pipelines say which guidance pass a call is, and the model may have use for it."""
    entered = []

    class Own(PlainDiT):
        def cache_context(self, name: str) -> Any:
            entered.append(name)
            return torch.no_grad()

    model = randomize(Own())
    for opt in (optimized(model), toca_compile.enable_cache(model, Fora(8, 4), lowering="eager")):
        with opt.cache_context("cond"):
            opt(noise(), torch.full((2,), 900), torch.arange(2))
        assert toca_compile.controls(opt).steps[-1].context == "cond"
    assert entered == ["cond", "cond"]
    toca_compile.restore(model)
