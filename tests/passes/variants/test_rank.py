"""Rank: what a full step measures and a later one reads, and rows that tell it anew."""

import pytest

from tests.programs import REUSED, ROWS, variant_of
from toca_compile.ir.actions import Compute, Keep
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Form, Program
from toca_compile.ir.selectors import Selector

SCORED = Form(Compute(), Keep(CacheSpec(), score=1))


def text(program: Program, *forms: Form, selector: Selector) -> str:
    return print_graph(variant_of(program, *forms, selector=selector).module.graph)


@pytest.mark.parametrize(("score", "made"), [("attention", "attention_received"), ("error", "token_norm")])
def test_a_score_is_kept_before_the_value_that_it_compares_with(program: Program, score: str, made: str) -> None:
    told = text(program, SCORED, REUSED, selector=Selector(score))
    assert told.index(f"toca.{made}") < told.index("toca.store_(score0") < told.index("toca.store_(cache0")


def test_it_is_read_where_it_was_written(program: Program) -> None:
    """The MLP's tokens are ranked by the attention before it, in one variant by one buffer."""
    assert "toca.unit_scores(score0)" in text(program, REUSED, ROWS, selector=Selector())
    assert "toca.unit_scores(score1)" in text(program, REUSED, ROWS, selector=Selector("error"))


def test_what_asks_for_no_score_measures_none(program: Program) -> None:
    told = text(program, Form(Compute(), Keep(CacheSpec())), ROWS, selector=Selector("none", weight=1.0))
    assert "score" not in told
