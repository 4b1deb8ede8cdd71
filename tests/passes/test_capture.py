"""Capture: functional ATen before dispatch."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.programs import program_of
from toca_compile import UnsupportedGraphError
from toca_compile.ir.printer import print_graph
from toca_compile.ir.program import Program

aten = torch.ops.aten


def test_capture(program: Program) -> None:
    text = print_graph(program.module.graph).split("\n")
    assert_expected_inline(
        "\n".join([t for t in text if "input" not in t][:17]),
        """\
conv2d = conv2d(arg2_1, arg0_1, arg1_1, [2, 2])  # [2, 4, 2, 3]
view = reshape(conv2d, [2, 4, 6])  # [2, 4, 6]
transpose = transpose.int(view, 1, 2)  # [2, 6, 4]
linear = linear(transpose, arg3_1, arg4_1)  # [2, 6, 12]
unsqueeze = unsqueeze(linear, 1)  # [2, 1, 6, 12]
split = split.Tensor(unsqueeze, 4, -1)
getitem = getitem(split, 0)  # [2, 1, 6, 4]
getitem_1 = getitem(split, 1)  # [2, 1, 6, 4]
getitem_2 = getitem(split, 2)  # [2, 1, 6, 4]
scaled_dot_product_attention = scaled_dot_product_attention(getitem, getitem_1, getitem_2)  # [2, 1, 6, 4]
squeeze = squeeze.dim(scaled_dot_product_attention, 1)  # [2, 6, 4]
add = add.Tensor(transpose, squeeze)  # [2, 6, 4]
linear_1 = linear(add, arg5_1, arg6_1)  # [2, 6, 8]
relu = relu(linear_1)  # [2, 6, 8]
linear_2 = linear(relu, arg7_1, arg8_1)  # [2, 6, 4]
mul = mul.Tensor(arg9_1, linear_2)  # [2, 6, 4]
add_1 = add.Tensor(add, mul)  # [2, 6, 4]""",
    )


class Changing(nn.Module):
    """Writes in place to what it made, or to what it was given."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin() if self.own else x
        return y.mul_(2).add_(x)


def test_what_is_written_in_place_becomes_a_value() -> None:
    graph = program_of(Changing(own=True), torch.randn(2, 3)).module.graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [
        aten.sin.default, aten.mul.Tensor, aten.add.Tensor,
    ]  # fmt: skip


def test_a_model_that_changes_its_input_is_refused() -> None:
    with pytest.raises(UnsupportedGraphError, match=r"changes its input 'l_x_' in place \(test_capture\.py:\d+\)"):
        program_of(Changing(own=False), torch.randn(2, 3))


class Rewired(nn.Module):
    """Writes another tensor's memory under a weight at each call, as bitsandbytes' int8 layers do."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.randn(3)), torch.ones(3)
        if own:
            self.weight.data = self.kept

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.kept
        self.weight.data = self.kept
        return y


def test_memory_put_under_a_weight() -> None:
    graph = program_of(Rewired(own=True), torch.randn(2, 3)).module.graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [aten.mul.Tensor]
    with pytest.raises(UnsupportedGraphError, match=r"other memory under a tensor \(test_capture\.py:\d+\)"):
        program_of(Rewired(own=False), torch.randn(2, 3))
