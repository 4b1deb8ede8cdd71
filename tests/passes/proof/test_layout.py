"""Layout: where rows lie in values whose tokens are spread, and what each row reads of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.programs import program_of
from toca_compile.ir.program import Program
from toca_compile.ir.types import RowProof
from toca_compile.passes.proof.layout import by_row, leaf_places, own_rows, reads_whole, restored

aten = torch.ops.aten


class Windows(nn.Module):
    """Twelve tokens as two by three windows of two, which lie apart: the second of a pair is six behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = x.view(2, 2, 6, 8).transpose(1, 2).reshape(12, 2, 8)
        q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in self.qkv(z).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(z).view(2, 6, 2, 8).transpose(1, 2).reshape(x.shape)


def proven() -> tuple[Program, RowProof, fx.Node]:
    """The program, the proof of its attention's queries, and the attention."""
    program = program_of(Windows(), torch.randn(2, 12, 8))
    (site,) = program.sites
    assert site.query_proof is not None
    return program, site.query_proof, site.attention[-1].node


def test_an_attention_counts_dimensions_and_gets_its_windows_places_back() -> None:
    program, proof, attention = proven()
    assert program.types is not None
    assert [p.dim for p in proof.tokens[attention]] == [2, 0]
    assert restored(program.types, attention, proof) == frozenset({0})
    assert reads_whole(program.types, attention, proof) == [False, True, True]
    assert proof.parted


def test_each_row_reads_the_keys_of_its_window() -> None:
    program, proof, attention = proven()
    assert program.types is not None
    keys, dims = attention.args[1], program.types.specs[attention].operands[1]
    assert isinstance(keys, fx.Node)
    tokens, batch = leaf_places(program.types, attention, proof, dims)
    assert [p and p.dim for p in (*tokens, *batch)] == [None, 0, 0]
    assert by_row(program.types, attention, proof, tokens)
    how = own_rows(program.types, attention, proof, keys, dims)
    assert how is not None
    # Samples and windows; heads; places; features. The windows are the minor factor of the tokens.
    assert (how.sizes, how.kinds, how.tokens) == ((2, 6, 2, 2, 4), (-2, 1, -1, -1, -1), (2, 6))
    assert (how.order, how.groups) == ((-2, -1, 0, 1, 2), (2, 1, 1, 1))
