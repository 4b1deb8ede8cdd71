"""FusedScores: an attention and its scores in one op, where both are of the same map."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from toca_compile.ir.program import Variant
from toca_compile.lowerings.fused_scores import fuse_scores
from toca_compile.lowerings.inductor import lower

aten = torch.ops.aten
toca = torch.ops.toca


def graph_of(attention: dict[str, Any], received: tuple[Any, ...]) -> fx.GraphModule:
    """An attention of three inputs and its scores, each doubled."""
    graph = fx.Graph()
    query, key, value = (graph.placeholder(name) for name in "qkv")
    out = graph.call_function(aten.scaled_dot_product_attention.default, (query, key, value), attention)
    scores = graph.call_function(toca.attention_received.default, (query, key, *received))
    graph.output(tuple(graph.call_function(aten.mul.Tensor, (x, 2.0)) for x in (out, scores)))
    return fx.GraphModule({}, graph)


@pytest.fixture
def inputs() -> list[Tensor]:
    return [torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize(
    ("attention", "received"),
    [({}, (None, None, False, 1)), ({"scale": 0.3, "is_causal": True}, (None, 0.3, True, 4))],
)
def test_both_are_one(attention: dict[str, Any], received: tuple[Any, ...], inputs: list[Tensor]) -> None:
    module = graph_of(attention, received)
    wanted = module(*inputs)
    fuse_scores(module.graph)
    module.graph.lint()
    module.recompile()
    targets = [node.target for node in module.graph.nodes]
    assert toca.attention_and_received.default in targets
    assert aten.scaled_dot_product_attention.default not in targets
    for ours, theirs in zip(module(*inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("attention", "received"),
    [
        ({"scale": 0.3}, (None, None, False, 1)),
        ({"is_causal": True}, (None, None, False, 1)),
        ({"enable_gqa": True}, (None, None, False, 1)),
        ({"dropout_p": 0.5}, (None, None, False, 1)),
    ],
)
def test_another_map_is_left_alone(attention: dict[str, Any], received: tuple[Any, ...]) -> None:
    module = graph_of(attention, received)
    before = str(module.graph)
    fuse_scores(module.graph)
    assert str(module.graph) == before


@pytest.mark.inductor
def test_through_inductor(inputs: list[Tensor]) -> None:
    module = graph_of({}, (None, None, False, 1))
    compiled = lower(Variant(module, (0, 1, 2), ()), inputs)
    for ours, wanted in zip(compiled(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(ours, wanted)
