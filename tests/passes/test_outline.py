"""Outline: segments, of which those that are the same graph share a template."""

import torch
from expecttest import assert_expected_inline
from torch import nn

from tests.programs import Tiny, program_of
from toca_compile.ir.program import Program


def test_outline(program: Program) -> None:
    lines = [
        f"template {s.template} sites {s.sites}: {[n.name for n in s.nodes]} -> {list(s.outputs)}"
        for s in program.segments
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
template 0 sites (): ['conv2d', 'view', 'transpose'] -> [transpose]
template 1 sites (0, 1): ['linear', 'unsqueeze', 'split', 'getitem', 'getitem_1', 'getitem_2', 'scaled_dot_product_attention', 'squeeze', 'add', 'linear_1', 'relu', 'linear_2', 'mul', 'add_1'] -> [add_1]
template 1 sites (2, 3): ['linear_3', 'unsqueeze_1', 'split_1', 'getitem_3', 'getitem_4', 'getitem_5', 'scaled_dot_product_attention_1', 'squeeze_1', 'add_2', 'linear_4', 'relu_1', 'linear_5', 'mul_1', 'add_3'] -> [add_3]""",
    )


def test_blocks_of_other_widths_share_no_template() -> None:
    model = Tiny()
    model.layers[1].up, model.layers[1].down = nn.Linear(4, 9), nn.Linear(9, 4)
    program = program_of(model, torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4))
    templates = [s.template for s in program.segments if s.sites]
    assert len(set(templates)) == len(templates) > 1
    assert {s.depths for s in program.sites} == {1}


class Pair(nn.Module):
    """One block of two streams, each of which reads the other as it was before."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.read, self.head = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(3))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None])[:, 0]

        a, b = a + attend(self.own[0](a), a), b + attend(self.own[1](b), b)
        p, q = self.read[0](a), self.read[1](b)
        a, b = a + attend(p, q), b + attend(q, p)
        return self.head[0](a), self.head[1](b)


def test_streams_that_read_each_other_are_one_segment_and_their_heads_stand_behind() -> None:
    segments = program_of(Pair(), torch.randn(1, 6, 8), torch.randn(1, 4, 8)).segments
    assert [s.sites for s in segments if s.sites] == [(0,), (1,), (2, 3)]
    assert not segments[-1].sites
    assert sum("linear" in n.name for n in segments[-1].nodes) == 2
