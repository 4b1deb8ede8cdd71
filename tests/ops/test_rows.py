"""Rows: each token's own part of a value."""

import torch

import toca_compile.ops  # noqa: F401

toca = torch.ops.toca


def test_each_token_gets_the_keys_of_its_window() -> None:
    """Windows of two by three on a picture of four by six: the value has the windows beside the samples."""
    b, h, w, p, q, d = 2, 2, 2, 2, 3, 5
    keys = torch.randn(b * h * w, p * q, d)
    index = torch.stack([torch.randperm(h * p * w * q)[:7] for _ in range(b)])
    made = toca.gather_own(
        keys, index, [b, h, w, p, q, d], [-2, 0, 2, -1, -1, -1], [h, p, w, q], [-2, -1, 0, 1, 2], [2, 2, 1]
    )
    assert made.shape == (b * 7, p * q, d)
    for sample in range(b):
        for row, token in enumerate(index[sample].tolist()):
            y, x = token // (w * q), token % (w * q)
            window = (sample * h + y // p) * w + x // q
            assert torch.equal(made[sample * 7 + row], keys[window])


def test_a_table_without_samples_is_laid_out_for_each() -> None:
    table, index = torch.randn(3, 4), torch.tensor([[0, 5, 7], [11, 2, 2]])
    made = toca.gather_own(table, index, [3, 4], [1, -1], [4, 3], [-2, -1, 0], [2, 0, 1])
    assert made.shape == (6, 1, 4)
    assert torch.equal(made[:, 0], table[index.flatten() % 3])
