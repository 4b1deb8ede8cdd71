"""Prove: is a branch token-wise?

A branch may be computed on a subset of tokens if every op between its input and its output carries the token axis: a
row of the result needs the same row of the operands only. The proof walks from the output back to the input and follows
one factor through each op's spec. It either ends at the input with the factor's place in every value between, or it
names the op that reads the axis whole. It may also end at values that are *held*: kept from the last full step.

``prove_queries`` lets the branch read its own tokens whole, as an attention's keys and values are: then those are made
for all tokens, and the rest for the selected ones.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from toca_compile.ir.graph import operand_nodes
from toca_compile.ir.types import AxisTypes, FactorPos, RowProof
from toca_compile.passes.proof.follow import Blocked, Branch, Trace, Walk, follow
from toca_compile.passes.proof.layout import check_layout


def prove(
    types: AxisTypes,
    branch: Branch,
    tokens: tuple[FactorPos, ...],
    batch: Mapping[FactorPos, Trace],
    walk: Walk | None = None,
) -> RowProof | Blocked:
    """The proof that the branch may be restricted along ``tokens`` of its output, or the op that forbids it.

    ``batch`` traces the factors carried all the way beside the tokens (``batch_of``), so that the selection may differ
    from sample to sample. ``walk``: as in ``follow``.
    """
    walk = walk or Walk()
    traces: list[Trace] = []
    for occurrence in tokens:
        joined = types.factors.segments((types.type_of(branch.output)[occurrence.dim][occurrence.index],))
        for factor in range(max(len(part) for part in joined) if len(joined) > 1 else 1):
            trace = follow(types, branch, occurrence, walk, factor)
            if isinstance(trace, Blocked):
                return trace
            traces.append(trace)
    if walk.again():
        return prove(types, branch, tokens, batch, walk)
    nodes = list(traces[0])
    if branch.source not in nodes and walk.whole_reads:
        return Blocked(max(reader for reader, _ in walk.whole_reads), "mixes the tokens")
    if branch.source not in nodes or any(n not in t for t in traces for n in nodes):
        return Blocked(branch.output, "does not need the tokens of its input")
    proof = RowProof(
        # In a concatenation the factors of a part are one.
        tokens={n: tuple(dict.fromkeys(t[n] for t in traces)) for n in nodes},
        batch={n: tuple(t[n] for t in batch.values()) for n in nodes},
        rows=frozenset(walk.visited),
        stale_inputs=branch.held,
        dense_inputs=tuple(n for n in walk.whole or () if n is not branch.source),
        windows=dict(walk.windows),
        cuts=frozenset(walk.cuts),
        joins=dict(walk.joins),
        parts=dict(walk.parts),
        unions=dict(walk.unions),
        placed=frozenset(walk.placed),
        parted=walk.parted,
    )
    return check_layout(types, branch, proof) or proof


def prove_queries(
    types: AxisTypes, branch: Branch, tokens: tuple[FactorPos, ...], batch: Mapping[FactorPos, Trace]
) -> RowProof | Blocked:
    """The proof that the branch may be restricted along ``tokens`` if what it reads whole (keys and values) is there
    for all of them. Where those are token-wise too, it says how (``RowProof.updates``)."""
    whole: dict[fx.Node, None] = {}
    proof = prove(types, branch, tokens, batch, Walk(whole))
    if isinstance(proof, Blocked):
        return proof
    for reader in proof.rows:
        if set(operand_nodes(reader)) & set(whole) and reader not in proof.tokens:
            return Blocked(reader, "reads one value both by its rows and whole")
    factors = tuple(types.type_of(branch.output)[t.dim][t.index] for t in tokens)
    updates = []
    for node in proof.dense_inputs:
        dims = types.type_of(node)
        places = [next((FactorPos(d, dim.index(f)) for d, dim in enumerate(dims) if f in dim), None) for f in factors]
        if None in places:
            return proof
        at = tuple(p for p in places if p is not None)
        part = branch.to(node)
        own = prove(types, part, at, batch_like(types, part, proof))
        if isinstance(own, Blocked):
            return proof
        updates.append(own)
    return replace(proof, updates=tuple(updates))


def batch_like(types: AxisTypes, branch: Branch, proof: RowProof) -> dict[FactorPos, Trace]:
    """The factors of the branch's output that are the proof's batch at their common source, with their traces."""
    batch = proof.batch[branch.source]
    return {at: trace for at, trace in batch_of(types, branch, ()).items() if trace.get(branch.source) in batch}


def batch_of(types: AxisTypes, branch: Branch, tokens: tuple[FactorPos, ...]) -> dict[FactorPos, Trace]:
    """The factors of the branch's output beside the tokens that every op back to its source carries, with their traces:
    they number samples."""
    found = {}
    for d, dim in enumerate(types.type_of(branch.output)):
        for occurrence in (FactorPos(d, i) for i in range(len(dim))):
            walk = Walk()
            trace = None if occurrence in tokens else follow(types, branch, occurrence, walk)
            if isinstance(trace, dict) and walk.straight:
                found[occurrence] = trace
    return found
