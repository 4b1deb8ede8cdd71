"""MeasureScores: what an attention tells of its tokens, and what one that is written out hides."""

import pytest
import torch
from torch import Tensor, nn

from tests.programs import REUSED, Tiny, program_of, variant_of
from toca_compile import PolicyError
from toca_compile.ir.actions import Compute, Keep
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.program import Form, Program
from toca_compile.ir.selectors import Selector
from toca_compile.passes.variants.measure_scores import check_score

toca = torch.ops.toca
SCORED = Form(Compute(), Keep(CacheSpec(), score=True))


class WrittenOut(Tiny):
    """Makes its maps."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            q, k, v = layer["qkv"](h).chunk(3, -1)
            h = h + (q @ k.transpose(1, 2)).softmax(-1) @ v
            h = h + gate * layer["down"](nn.functional.relu(layer["up"](h)))
        return h


@pytest.mark.parametrize(
    ("score", "op"),
    [
        ("attention", toca.attention_received.default),
        ("k_norm", toca.row_norm.default),
        ("v_norm", toca.row_norm.default),
    ],
)
def test_a_full_step_measures_what_the_score_is_made_of(program: Program, score: str, op: object) -> None:
    graph = variant_of(program, SCORED, REUSED, selector=Selector(score)).module.graph
    assert [n.target for n in graph.nodes].count(op) == 1
    assert program.types is not None
    check_score(program.attentions[0], score, program.types)


def test_a_map_that_the_model_makes_is_read_and_its_keys_are_hidden() -> None:
    program = program_of(WrittenOut(), torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4))
    assert program.types is not None
    targets = [n.target for n in variant_of(program, SCORED, REUSED).module.graph.nodes]
    assert toca.attention_received.default not in targets
    assert torch.ops.aten.softmax.int in targets
    with pytest.raises(PolicyError, match="'k_norm' needs an attention whose rows can be told apart"):
        check_score(program.attentions[0], "k_norm", program.types)
