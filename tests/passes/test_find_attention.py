"""FindAttention: the fused op, and a softmax whose dimension is contracted."""

import torch
from torch import Tensor, nn

from tests.programs import program_of
from toca_compile.ir.program import Program


def test_find_attention(program: Program) -> None:
    assert [(a.node.name, a.axis == a.key_axis, a.map) for a in program.attentions] == [
        ("scaled_dot_product_attention", True, None),
        ("scaled_dot_product_attention_1", True, None),
    ]


class WrittenOut(nn.Module):
    """A softmax over keys, or over features, which is no attention."""

    def __init__(self, over_keys: bool) -> None:
        super().__init__()
        self.over_keys = over_keys

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.transpose(1, 2)).softmax(-1) @ y if self.over_keys else x.softmax(-1) + x


def test_an_attention_that_is_written_out() -> None:
    inputs = torch.randn(2, 6, 4), torch.randn(2, 5, 4)
    program = program_of(WrittenOut(over_keys=True), *inputs)
    (found,) = program.attentions
    assert found.map is not None
    assert found.map.target is torch.ops.aten.softmax.int
    assert program.types is not None
    assert [program.types.factors.size(a) for a in (found.axis, found.key_axis, found.lead)] == [6, 5, 2]
    assert not program_of(WrittenOut(over_keys=False), *inputs).attentions
