"""Narrow: of a linear layer that makes several things, a step computes the features that it needs."""

import torch
from torch import Tensor, nn

from tests.programs import Tiny, program_of
from toca_compile.passes.variants.narrow import Piece, pieces


class Cut(Tiny):
    """Queries, keys and values are cut from one layer's output before anything else happens to it."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            q, k, v = (part[:, None] for part in layer["qkv"](h).chunk(3, -1))
            h = h + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
            h = h + gate * layer["down"](nn.functional.relu(layer["up"](h)))
        return h


def test_queries_alone_need_a_third_of_the_rows() -> None:
    program = program_of(Cut(), torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4))
    assert program.types is not None
    node = {n.name: n for n in program.module.graph.nodes}
    linear, split = node["linear"], node["split"]
    q, k, v = (node[name] for name in ("getitem", "getitem_1", "getitem_2"))
    assert pieces({linear, split, q}, program.types) == {q: Piece(linear, 0, 4)}
    assert pieces({linear, split, k, v}, program.types) == {k: Piece(linear, 4, 4), v: Piece(linear, 8, 4)}
    assert pieces({linear, split, q, k, v}, program.types) == {}  # all of it
    assert pieces({node["linear_1"], node["relu"]}, program.types) == {}  # nothing is cut
