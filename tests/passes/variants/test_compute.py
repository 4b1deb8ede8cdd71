"""Compute: all of a branch, or nothing of it."""

from expecttest import assert_expected_inline

from tests.programs import REUSED, text_of
from toca_compile.ir.actions import Compute, Keep
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.program import Form, Program


def test_rewrite_full(program: Program) -> None:
    assert_expected_inline(
        text_of(program, Form(Compute(), Keep(CacheSpec(), score=True)), Form(Compute(), Keep(CacheSpec()))),
        """\
in0_transpose = input  # [2, 6, 4]
in1_arg3_1 = input  # [12, 4]
in2_arg4_1 = input  # [12]
in3_arg5_1 = input  # [8, 4]
in4_arg6_1 = input  # [8]
in5_arg7_1 = input  # [4, 8]
in6_arg8_1 = input  # [4]
in7_arg9_1 = input  # [2, 1, 4]
score0 = input
cache0 = input
cache1 = input
linear = linear(in0_transpose, in1_arg3_1, in2_arg4_1)  # [2, 6, 12]
unsqueeze = unsqueeze(linear, 1)  # [2, 1, 6, 12]
split = split.Tensor(unsqueeze, 4, -1)
getitem = getitem(split, 0)  # [2, 1, 6, 4]
getitem_1 = getitem(split, 1)  # [2, 1, 6, 4]
getitem_2 = getitem(split, 2)  # [2, 1, 6, 4]
scaled_dot_product_attention = scaled_dot_product_attention(getitem, getitem_1, getitem_2)  # [2, 1, 6, 4]
squeeze = squeeze.dim(scaled_dot_product_attention, 1)  # [2, 6, 4]
attention_received_default = toca.attention_received(getitem, getitem_1, None, None, False, 1)
sum_dim_int_list = sum.dim_IntList(attention_received_default, [1])
store__default = toca.store_(score0, sum_dim_int_list)
store__default_1 = toca.store_(cache0, squeeze)
add = add.Tensor(in0_transpose, squeeze)  # [2, 6, 4]
linear_1 = linear(add, in3_arg5_1, in4_arg6_1)  # [2, 6, 8]
relu = relu(linear_1)  # [2, 6, 8]
linear_2 = linear(relu, in5_arg7_1, in6_arg8_1)  # [2, 6, 4]
store__default_2 = toca.store_(cache1, linear_2)
mul = mul.Tensor(in7_arg9_1, linear_2)  # [2, 6, 4]
add_1 = add.Tensor(add, mul)  # [2, 6, 4]
return [add_1]""",
    )


def test_rewrite_reuse(program: Program) -> None:
    assert_expected_inline(
        text_of(program, REUSED, REUSED),
        """\
in0_transpose = input  # [2, 6, 4]
in7_arg9_1 = input  # [2, 1, 4]
cache0 = input
cache1 = input
add = add.Tensor(in0_transpose, cache0)  # [2, 6, 4]
mul = mul.Tensor(in7_arg9_1, cache1)  # [2, 6, 4]
add_1 = add.Tensor(add, mul)  # [2, 6, 4]
return [add_1]""",
    )
