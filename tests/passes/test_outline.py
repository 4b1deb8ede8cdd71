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
