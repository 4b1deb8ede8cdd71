"""TopTokens: the kernel in Triton's interpreter, on a CPU, against a sort."""

import pytest

from tests.kernels.interpreted import told_by

pytest.importorskip("triton", minversion="3.7")  # before, its interpreter fails with numpy 2.4

INTERPRETED = """
from unittest.mock import patch

import torch

from toca_compile.ops.selection import select_tokens, top_tokens

CASES = [  # tokens, k, grid (height, width, first token, frames), cell, bonus
    (70, 9, [], 1, 0.0), (64, 64, [], 1, 0.0), (200, 1, [8, 8, 8, 3], 2, 0.6), (130, 40, [13, 10, 0, 1], 4, 0.5),
    (65, 31, [3, 7, 40, 1], 3, 1.0),
]
zero = torch.zeros((), dtype=torch.int32)
for seed, (tokens, k, grid, cell, bonus) in enumerate(CASES):
    torch.manual_seed(seed)
    for score in (torch.randn(2, tokens), torch.zeros(2, tokens), torch.randn(2, tokens).round() + 0.0):  # no negative zeros
        with patch("torch.library.wrap_triton", lambda kernel: kernel):
            found = top_tokens(score, k, grid, cell, bonus)
        # Step 1 after a full step 0: no token has missed one.
        wanted = select_tokens(score, zero.expand(2, tokens), k, 1, 0, 0.0, grid, cell, bonus)
        assert torch.equal(found.sort(1).values, wanted.sort(1).values), (tokens, k)
print("equal", len(CASES))
"""


def test_the_kernel_chooses_as_a_sort_does() -> None:
    assert told_by(INTERPRETED) == "equal 5\n"
