"""Rows: a partial step gathers, computes, and scatters; in its dense meaning it computes all and blends."""

from expecttest import assert_expected_inline

from tests.programs import REUSED, ROWS, text_of
from toca_compile.ir.program import Program


def test_rewrite_partial(program: Program) -> None:
    assert_expected_inline(
        text_of(program, REUSED, ROWS),
        """\
in0_transpose = input  # [2, 6, 4]
in3_arg5_1 = input  # [8, 4]
in4_arg6_1 = input  # [8]
in5_arg7_1 = input  # [4, 8]
in6_arg8_1 = input  # [4]
in7_arg9_1 = input  # [2, 1, 4]
cache0 = input
cache1 = input
stamp1 = input
step1 = input
score0 = input
k1 = input
since1 = input
add = add.Tensor(in0_transpose, cache0)  # [2, 6, 4]
unit_scores_default = toca.unit_scores(score0)
select_tokens_default = toca.select_tokens(unit_scores_default, stamp1, k1, step1, since1, 0.1, [], 1, 0.0)
mark_fresh__default = toca.mark_fresh_(stamp1, select_tokens_default, step1)
gather_tokens_default = toca.gather_tokens(add, select_tokens_default, 1, 0)
linear_1 = linear(gather_tokens_default, in3_arg5_1, in4_arg6_1)
relu = relu(linear_1)
linear_2 = linear(relu, in5_arg7_1, in6_arg8_1)
scatter_tokens__default = toca.scatter_tokens_(cache1, select_tokens_default, linear_2, 1, 0)
mul = mul.Tensor(in7_arg9_1, scatter_tokens__default)  # [2, 6, 4]
add_1 = add.Tensor(add, mul)  # [2, 6, 4]
return [add_1]""",
    )


def test_rewrite_partial_dense(program: Program) -> None:
    assert_expected_inline(
        text_of(program, REUSED, ROWS, dense=True),
        """\
in0_transpose = input  # [2, 6, 4]
in3_arg5_1 = input  # [8, 4]
in4_arg6_1 = input  # [8]
in5_arg7_1 = input  # [4, 8]
in6_arg8_1 = input  # [4]
in7_arg9_1 = input  # [2, 1, 4]
cache0 = input
cache1 = input
stamp1 = input
step1 = input
score0 = input
k1 = input
since1 = input
add = add.Tensor(in0_transpose, cache0)  # [2, 6, 4]
linear_1 = linear(add, in3_arg5_1, in4_arg6_1)  # [2, 6, 8]
relu = relu(linear_1)  # [2, 6, 8]
unit_scores_default = toca.unit_scores(score0)
select_tokens_default = toca.select_tokens(unit_scores_default, stamp1, k1, step1, since1, 0.1, [], 1, 0.0)
mark_fresh__default = toca.mark_fresh_(stamp1, select_tokens_default, step1)
linear_2 = linear(relu, in5_arg7_1, in6_arg8_1)  # [2, 6, 4]
blend_tokens__default = toca.blend_tokens_(cache1, select_tokens_default, linear_2, 1, 0)
mul = mul.Tensor(in7_arg9_1, blend_tokens__default)  # [2, 6, 4]
add_1 = add.Tensor(add, mul)  # [2, 6, 4]
return [add_1]""",
    )
