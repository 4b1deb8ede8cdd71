"""Prove: is a branch token-wise?

A branch may be computed on a subset of tokens if every op between its input and its output carries the token axis: a
row of the result needs the same row of the operands only. The proof walks from the output back to the input and follows
one factor through each op's spec. It either ends at the input with the factor's place in every value between, or it
names the op that reads the axis whole. It may also end at values that are *held*: kept from the last full step.

``prove_queries`` lets the branch read its own tokens whole, as an attention's keys and values are: then those are made
for all tokens, and the rest for the selected ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from toca_compile.ir.graph import operand_nodes
from toca_compile.ir.spec import Dims
from toca_compile.ir.types import AxisTypes, FactorPos, RowProof
from toca_compile.passes.proof.follow import Blocked, Branch, Trace, Walk, follow, label_at, occurrence_of
from toca_compile.rules.registry import RULES, Work


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
    traces, walk = [], walk or Walk()
    for occurrence in tokens:
        joined = types.factors.segments((types.type_of(branch.output)[occurrence.dim][occurrence.index],))
        for factor in range(max(len(part) for part in joined) if len(joined) > 1 else 1):
            trace = follow(types, branch, occurrence, walk, factor)
            if isinstance(trace, Blocked):
                return trace
            traces.append(trace)
    nodes = list(traces[0])
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
    )
    return _layout(types, branch, proof) or proof


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


def reads_whole(types: AxisTypes, node: fx.Node, proof: RowProof) -> list[bool]:
    """For each operand of an op of the branch, whether the op reads it for all tokens and not by its rows. One op may
    read one value both ways: an attention of a value with itself."""
    if node not in proof.tokens:  # an op with several results, of which the first is not needed
        return [False] * len(operand_nodes(node))
    return [not any(leaf_places(types, node, proof, dims)[0]) for dims in types.specs[node].operands]


def leaf_places(
    types: AxisTypes, node: fx.Node, proof: RowProof, dims: Dims
) -> tuple[tuple[FactorPos | None, ...], tuple[FactorPos | None, ...]]:
    """Where the tokens and the batch lie in an operand of ``node`` (its dimensions ``dims``); None: it broadcasts."""
    if node not in proof.tokens:
        return (), ()
    spec = types.specs[node]

    def locate(places: tuple[FactorPos, ...]) -> tuple[FactorPos | None, ...]:
        labels = [label_at(types, node, spec.results[0], o) for o in places]
        return tuple(occurrence_of(types, node, dims, label) if label else None for label in labels)

    return locate(proof.tokens[node]), locate(proof.batch[node])


def span(places: Sequence[FactorPos | None]) -> tuple[int, int]:
    """The dimensions that hold these factors, first and last; (−1, −1) where there are none."""
    dims = [p.dim for p in places if p is not None]
    return (min(dims), max(dims)) if dims else (-1, -1)


def _layout(types: AxisTypes, branch: Branch, proof: RowProof) -> Blocked | None:
    """What in a proven restriction cannot be gathered or scattered as rows.

    Tokens that lie in several neighbouring dimensions (frames and patches) become one dimension of rows. An op that
    counts dimensions gets the others back, of size 1: each row is then a place in the first.
    """
    for node, places in proof.tokens.items():
        first, last = span(places)
        if last > first and not _whole(types, node, places):
            return Blocked(node, "spreads the tokens over several dimensions")
        ends = node in (branch.source, branch.output) or node in proof.stale_inputs
        together = _together(types, node, places, proof.batch[node])
        if ends and not together and not (_whole(types, node, places) and _whole(types, node, proof.batch[node])):
            return Blocked(node, "has tokens or samples in one dimension with something else")
        if ends and len({p.dim for p in proof.batch[node]}) > 1:
            return Blocked(node, "has samples in several dimensions")
    for node in proof.placed:
        # Their places are those of the rows where these are all that is counted, for each sample.
        tokens, batch = proof.tokens[node], proof.batch[node]
        own = len({p.dim for p in tokens}) == 1 and _whole(types, node, tokens)
        if not own or not _whole(types, node, batch) or {p.dim for p in batch} - {0} or node in proof.parts:
            return Blocked(node, next(iter(types.specs[node].because.values()), "counts its queries"))
    for node in proof.rows:
        spec = types.specs.get(node)
        if spec is not None and restored(types, node, proof) is None:
            return Blocked(node, "spreads the tokens over several dimensions")
        for i, (operand, dims) in enumerate(zip(operand_nodes(node), spec.operands if spec else (), strict=False)):
            if operand in proof.tokens:
                continue
            tokens, batch = leaf_places(types, node, proof, dims)
            if not any(tokens):
                continue
            pointwise = RULES[node.target].pointwise  # type: ignore[index]
            together = _together(types, operand, tokens, batch) and node not in {*proof.windows, *proof.parts}
            partly = None in tokens or not (together or _whole(types, operand, tokens))  # type: ignore[arg-type]
            if partly and not (pointwise and _aligned(types, operand, tokens)):
                return Blocked(node, "reads a value that varies along part of the token axis only")
            shared = proof.batch[node] and not any(batch)
            # A fused attention's mask broadcasts as operands of a pointwise op do.
            mask = i == 3 and RULES[node.target].work is Work.ATTENTION  # type: ignore[index]
            if shared and not (pointwise or mask):
                return Blocked(node, "reads a table of tokens that all samples share")
            if None in batch and any(batch):
                return Blocked(node, "reads a value that varies along part of the batch only")
            if not together and not _whole(types, operand, batch if any(batch) else ()):  # type: ignore[arg-type]
                return Blocked(node, "reads a value with samples in one dimension with something else")
    return None


def _spread(proof: RowProof, node: fx.Node) -> bool:
    first, last = span(proof.tokens.get(node, ()))
    return last > first


def restored(types: AxisTypes, node: fx.Node, proof: RowProof) -> frozenset[int] | None:
    """Which operands an op that counts dimensions reads by rows of tokens that are spread: they need their dimensions
    back. None where that cannot be: the op spreads tokens itself, or not all that it reads by rows are spread alike."""
    operands = operand_nodes(node)
    spread = any(_spread(proof, operand) for operand in operands)
    if RULES[node.target].any_rank or not (spread or _spread(proof, node)):  # type: ignore[index]
        return frozenset()
    rows = [i for i, whole in enumerate(reads_whole(types, node, proof)) if not whole]
    spans = [span(proof.tokens.get(operands[i], ())) for i in rows]
    wide = {last - first for first, last in spans}
    return frozenset(rows) if spread and len(wide) == 1 and min(wide) > 0 else None


def _aligned(types: AxisTypes, node: fx.Node, places: Sequence[FactorPos | None]) -> bool:
    """Whether an operand that broadcasts along some of the tokens holds the others in dimensions of their own."""
    there = [p for p in places if p is not None]
    return all(len({p for p in there if p.dim == d}) == len(types.type_of(node)[d]) for d in {p.dim for p in there})


def _together(
    types: AxisTypes, node: fx.Node, tokens: Sequence[FactorPos | None], batch: Sequence[FactorPos | None]
) -> bool:
    """Whether samples and tokens fill one dimension, sample by sample."""
    places = [*batch, *tokens]
    if not any(batch) or None in places or len({p.dim for p in places if p is not None}) > 1:
        return False
    first, _ = span(places)
    return places == [FactorPos(first, i) for i in range(len(types.type_of(node)[first]))]


def _whole(types: AxisTypes, node: fx.Node, places: tuple[FactorPos, ...]) -> bool:
    """Whether the places fill whole neighbouring dimensions of the value, in order (or there are none)."""
    if not places:
        return True
    first, last = span(places)
    held = [FactorPos(d, i) for d in range(first, last + 1) for i in range(len(types.type_of(node)[d]))]
    return list(places) == held
