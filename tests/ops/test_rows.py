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
