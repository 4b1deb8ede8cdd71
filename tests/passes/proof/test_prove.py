"""Prove: which branches are token-wise, as they are or given what they read whole."""

from toca_compile.ir.program import Program
from toca_compile.ir.types import FactorPos, RowProof
from toca_compile.passes.proof.follow import Blocked, Branch
from toca_compile.passes.proof.prove import batch_of, prove, prove_queries

TOKENS = (FactorPos(1, 0), FactorPos(1, 1))


def test_an_mlp_is_token_wise(program: Program) -> None:
    assert program.types is not None
    mlp = program.sites[1]
    given = program.types, Branch(mlp.source, mlp.output, mlp.region), TOKENS
    proof = prove(*given, batch_of(*given))
    assert isinstance(proof, RowProof)
    assert {n.name for n in proof.rows} == {"linear_1", "relu", "linear_2"}
    assert proof.tokens[mlp.source] == TOKENS
    assert proof.batch[mlp.source] == (FactorPos(0, 0),)
    assert (proof.stale_inputs, proof.dense_inputs) == ((), ())


def test_an_attention_is_given_keys_and_values_of_all_tokens(program: Program) -> None:
    assert program.types is not None
    attention = program.sites[0]
    given = program.types, Branch(attention.source, attention.output, attention.region), TOKENS
    assert isinstance(prove(*given, batch_of(*given)), Blocked)
    proof = prove_queries(*given, batch_of(*given))
    assert isinstance(proof, RowProof)
    assert [n.name for n in proof.dense_inputs] == ["getitem_1", "getitem_2"]
    assert [{n.name for n in p.rows} >= {"linear", "split"} for p in proof.updates] == [True, True]
