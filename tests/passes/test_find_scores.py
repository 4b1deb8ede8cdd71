"""FindScores: whose attention ranks a site's tokens."""

from tests.programs import reading_program
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
