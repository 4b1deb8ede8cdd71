"""Restrict: a branch on gathered rows, with what varies along the tokens gathered beside them."""

import pytest
import torch
from torch import Tensor, nn

from tests.programs import REUSED, ROWS, Tiny, program_of, variant_of

toca = torch.ops.toca


class Placed(Tiny):
    """Each MLP is told where its tokens are, or what all of them share."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, tokens, 8))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            q, k, v = layer["qkv"](h)[:, None].chunk(3, -1)
            h = h + nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
            h = h + gate * layer["down"](layer["up"](h) + self.places)
        return h


@pytest.mark.parametrize(("tokens", "gathered"), [(6, 2), (1, 1)])
def test_a_table_of_places_is_gathered_with_the_rows(tokens: int, gathered: int) -> None:
    program = program_of(Placed(tokens), torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4))
    graph = variant_of(program, REUSED, ROWS).module.graph
    gathers = [n for n in graph.nodes if n.target is toca.gather_tokens.default]
    assert len(gathers) == gathered
    assert len({n.args[1] for n in gathers}) == 1  # by one selection
