"""Inline: graphs inside the graph, autocast and transforms as ops of one graph."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.programs import program_of
from tests.versions import LOSES_TRANSFORMS

aten = torch.ops.aten


class Layered(nn.Module):
    """A checkpoint, an autocast, and a table that ``torch.vmap`` makes, where torch sees it."""

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(torch.sin, x, use_reentrant=False)
        with torch.autocast("cpu", torch.bfloat16):
            x = x @ x
        return x.float() + (x.sum(1) if LOSES_TRANSFORMS else torch.vmap(lambda row: row.sum())(x))


def test_one_graph_of_ops() -> None:
    program = program_of(Layered(), torch.randn(3, 3))
    calls = [n for n in program.module.graph.nodes if n.op == "call_function"]
    assert {n.target for n in calls} >= {aten.sin.default, aten.matmul.default}
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in calls)
    product = next(n for n in calls if n.target is aten.matmul.default)
    assert product.meta["val"].dtype == torch.bfloat16
