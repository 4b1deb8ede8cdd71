"""FindScores: whose attention ranks a site's tokens."""

import torch
from torch import Tensor, nn

from tests.programs import program_of, reading_program
from toca_compile.ir.program import Program
from toca_compile.ir.types import ScoreSource


def test_an_mlp_asks_the_attention_of_its_own_block(program: Program) -> None:
    assert [s.score_by_keys for s in program.sites] == [ScoreSource(i) for i in (0, 0, 2, 2)]
    assert all(s.score_by_queries is None for s in program.sites)  # queries and keys are the same tokens


def test_words_that_are_read_rank_no_tokens() -> None:
    """A cross-attention has the site's tokens as queries alone."""
    sites = reading_program().sites
    assert [s.score_by_keys for s in sites] == [None, None]
    assert [s.score_by_queries for s in sites] == [ScoreSource(0)] * 2


class Joined(nn.Module):
    """Registers before a picture, and words before both in one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, registers: Tensor, words: Tensor) -> Tensor:
        x = torch.cat([registers, x], 1)
        q, k, v = self.qkv(torch.cat([words, x], 1))[:, None].chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0, 5:])
        return x + self.mlp(x).relu()


def test_tokens_that_are_joined_are_found_among_the_keys() -> None:
    inputs = torch.randn(2, 12, 8), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    sites = program_of(Joined(), *inputs).sites
    assert [s.score_by_keys for s in sites] == [ScoreSource(0, (5, 20))] * 2
