"""ColumnSums: the kernel in Triton's interpreter, on a CPU, against the sums of the map."""

import pytest

from tests.kernels.interpreted import told_by

pytest.importorskip("triton", minversion="3.7")  # before, its interpreter fails with numpy 2.4

INTERPRETED = """
from unittest.mock import patch

import torch

from toca_compile.ops.column_sums import column_sums
from toca_compile.ops.scores import attention_received

CASES = [  # batch, heads, queries, keys, features, stride
    (2, 3, 70, 50, 24, 1), (1, 2, 64, 64, 64, 1), (1, 1, 130, 129, 72, 4), (2, 1, 1, 5, 8, 1), (1, 4, 33, 200, 128, 7),
]
for dtype, near in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
    for batch, heads, queries, keys, size, stride in CASES:
        torch.manual_seed(queries)
        # As models lay them out: heads beside tokens, and keys taken out of one projection.
        query = torch.randn(batch, queries, heads, size).transpose(1, 2).to(dtype)
        key = torch.randn(batch, keys, heads, 2 * size).transpose(1, 2).to(dtype)[..., size:]
        total = (query.float() @ key.float().transpose(-1, -2) * 0.3).logsumexp(-1)
        with patch("torch.library.wrap_triton", lambda kernel: kernel):
            found = column_sums(query[..., ::stride, :], key, total[..., ::stride], 0.3)
        wanted = attention_received(query.float(), key.float(), None, 0.3, False, stride)
        torch.testing.assert_close(found, wanted, rtol=near, atol=near)
print("equal", len(CASES))
"""


def test_the_kernel_is_the_sum_of_the_map() -> None:
    assert told_by(INTERPRETED) == "equal 5\n"
