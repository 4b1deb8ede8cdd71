"""Select: scores of whatever kind, age, and the bonus of each cell of the picture."""

from dataclasses import dataclass

import pytest
import torch
from torch import fx

import toca_compile
from tests.models import PlainDiT, randomize
from tests.programs import REUSED, ROWS, variant_of
from tests.sampling import noise, sample
from toca_compile import Composition
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Program
from toca_compile.ir.selectors import Selector, TokenSelector
from toca_compile.ir.state import Number, State
from toca_compile.passes.variants.select import SELECTIONS, Selection
from toca_compile.policies import Every, Partial, Rule, Share
from toca_compile.policies.storage import as_data, from_data

aten = torch.ops.aten


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


@dataclass(frozen=True)
class First(TokenSelector):
    """The first tokens, as many as the policy says."""


class Firsts(Selection):
    def choose(self) -> fx.Node:
        emit = self.builder.call
        ones = emit(aten.ones_like.default, self.builder.slot(State.STAMP, self.position))
        places = emit(aten.sub.Tensor, emit(aten.cumsum.default, ones, 1), 1)
        return emit(aten.slice.Tensor, places, 1, 0, self.builder.slot(Number.K, self.position))


def test_another_selector_is_a_class_and_its_emission(monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures nothing and leaves the other tokens as they are, which is what the base classes say."""
    monkeypatch.setitem(TokenSelector.members, "First", First)
    monkeypatch.setitem(SELECTIONS, First, Firsts)
    policy = Composition(4, Every(4), (Rule(Partial()),), which=First(), how_many=Share(0.3))
    runs = []
    for way in ("eager", "dense"):
        torch._dynamo.reset()
        opt = toca_compile.optimize(randomize(PlainDiT(depth=2)), policy, lowering=way)
        runs.append(sample(opt, 3, noise()))
        fresh = opt.fresh_tokens()["blocks.1.mlp"]
        assert fresh.tolist() == [[i < 4 for i in range(16)]] * 2
        assert not [name for name in toca_compile.explain(opt).buffers if name[-3] is State.SCORE]
        assert from_data(as_data(policy)) == policy
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


def test_what_nothing_emits_is_named() -> None:
    with pytest.raises(KeyError, match="nothing emits First"):
        SELECTIONS.find(First())
