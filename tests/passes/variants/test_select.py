"""Select: scores of whatever kind, age, and the bonus of each cell of the picture."""

import pytest

from tests.programs import REUSED, ROWS, variant_of
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Program
from toca_compile.ir.selectors import Selector


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        (Selector(), ["unit_scores = toca.unit_scores(score0)", "step1, since1, 0.0, [], 1, 0.0)"]),
        (Selector("random", seed=7), ["toca.random_scores(stamp1, step1, site1, 7)"]),
        (Selector("none"), ["zeros_like(stamp1)"]),
        (Selector(weight=0.5, cell=2, bonus=0.6), ["step1, since1, 0.5, [2, 3, 0, 1], 2, 0.6)"]),
    ],
)
def test_where_the_score_comes_from(program: Program, selector: Selector, says: list[str]) -> None:
    text = print_graph(variant_of(program, REUSED, ROWS, selector=selector).module.graph)
    for words in says:
        assert words.replace("unit_scores = ", "") in text
    assert text.count("toca.mark_fresh_(stamp1, select_tokens_default, step1)") == 1
