"""Rows of tokens, wherever tokens and batch lie, against a loop."""

from itertools import permutations

import pytest
import torch

import toca_compile.ops  # noqa: F401  (defines the toca:: ops)

toca = torch.ops.toca
SIZES = {"b": 2, "n": 7, "h": 3, "d": 4}
K = 3


@pytest.mark.parametrize("layout", ["".join(p) for p in permutations("bnhd")] + ["hnd"])
def test_rows_are_written_where_they_are_read(layout: str) -> None:
    dim, batch_dim = layout.index("n"), layout.find("b")
    batch = SIZES["b"] if batch_dim >= 0 else 1
    index = torch.stack([torch.randperm(SIZES["n"])[:K] for _ in range(batch)])
    cache = torch.randn([SIZES[d] for d in layout])
    rows = torch.randn([K if d == "n" else SIZES[d] for d in layout])
    meant = cache.clone()
    for sample in range(batch):
        for row, token in enumerate(index[sample]):
            of_sample = {batch_dim: sample} if batch_dim >= 0 else {}
            to, taken = ({**of_sample, dim: at} for at in (int(token), row))
            places = [tuple(chosen.get(d, slice(None)) for d in range(len(layout))) for chosen in (to, taken)]
            meant[places[0]] = rows[places[1]]
    toca.scatter_tokens_(cache, index, rows, dim, batch_dim)
    torch.testing.assert_close(cache, meant, rtol=0, atol=0)
    torch.testing.assert_close(toca.gather_tokens(cache, index, dim, batch_dim), rows, rtol=0, atol=0)


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
