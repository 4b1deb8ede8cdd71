"""InferAxes: the factors of every value."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.programs import program_of
from toca_compile.ir.program import Program


def test_infer_axes(program: Program) -> None:
    """h and w are the picture's axes in tokens; the residual stream and the attention share them."""
    assert program.types is not None
    lines = []
    for node in program.module.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor):
            lines.append(f"{node.name}: {' '.join(str(d) for d in program.types.type_of(node))}")
    assert_expected_inline(
        "\n".join(lines[:11]),
        """\
conv2d: (4,) (0,) (27,) (28,)
view: (4,) (0,) (27, 28)
transpose: (4,) (27, 28) (0,)
linear: (4,) (27, 28) (7,)
unsqueeze: (4,) () (27, 28) (7,)
getitem: (4,) () (27, 28) (29,)
getitem_1: (4,) () (27, 28) (29,)
getitem_2: (4,) () (27, 28) (0,)
scaled_dot_product_attention: (4,) () (27, 28) (0,)
squeeze: (4,) (27, 28) (0,)
add: (4,) (27, 28) (0,)""",
    )


class Odd(nn.Module):
    """An op that no rule knows, between two that all know."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(x.sin()).cos()


def test_nothing_passes_through_an_op_without_a_rule() -> None:
    program = program_of(Odd(), torch.randn(2, 4, 4))
    assert program.types is not None
    x, sine, odd, cosine = (n for n in program.module.graph.nodes if n.op != "output")
    assert program.types.unknown == {odd: "has no rule"}
    assert program.types.type_of(sine) == program.types.type_of(x)
    assert program.types.type_of(cosine) == program.types.type_of(odd)
    assert not set(program.types.type_of(odd)) & set(program.types.type_of(sine))
