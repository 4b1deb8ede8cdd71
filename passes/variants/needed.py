"""Needed: which nodes of a segment a variant computes for all tokens, which for the selected ones, and which buffers it
must write."""

from collections.abc import Sequence

from torch import fx

from toca_compile.ir.plan import CacheSpec
from toca_compile.ir.program import Mode, Segment, Slot
from toca_compile.ir.types import RowProof, Site


def proof_of(site: Site, mode: Mode) -> RowProof:
    """The proof by which a partial step of a site is legal."""
    proof = site.query_proof if Mode.QUERIES in mode else site.row_proof
    assert proof is not None
    return proof


def row_nodes(site: Site, mode: Mode) -> frozenset[fx.Node]:
    """The nodes that a partial step computes for the selected tokens."""
    proof = proof_of(site, mode)
    return proof.rows.union(*(own.rows for own in proof.updates)) if Mode.UPDATE in mode else proof.rows


def needed_nodes(
    segment: Segment, sites: Sequence[Site], modes: Sequence[Mode], *, dense: bool = False
) -> set[fx.Node]:
    """The nodes computed for all tokens. A reused branch needs none of its own, a partial one those that its rows are
    gathered from."""
    ends = {s.output: (s, m) for s, m in zip(sites, modes, strict=True)}
    held = {n for s, m in zip(sites, modes, strict=True) if Mode.PARTIAL in m for n in proof_of(s, m).stale_inputs}
    needed: set[fx.Node] = set()
    todo = [*segment.outputs, *(s.add for s in sites)]
    inside = set(segment.nodes)
    while todo:
        node = todo.pop()
        if node in needed or node not in inside:
            continue
        needed.add(node)
        site, mode = ends.get(node, (None, Mode.PLAIN))
        if (Mode.PARTIAL not in mode and mode & (Mode.REUSE | Mode.FORECAST)) or node in held:
            continue
        if site is not None and Mode.PARTIAL in mode and not dense:
            rows, proof = row_nodes(site, mode), proof_of(site, mode)
            inner = {*rows, *proof.stale_inputs, *(proof.dense_inputs if Mode.KEPT in mode else ())}
            todo += [i for n in rows if n not in proof.joins for i in n.all_input_nodes if i not in inner]
            todo += () if Mode.KEPT in mode else proof.dense_inputs
        else:
            todo += node.all_input_nodes
    return needed


def kept_slots(sites: Sequence[Site], modes: Sequence[Mode], memories: Sequence[CacheSpec]) -> set[Slot]:
    """The buffers that a variant must write, by its modes: what it does not, later steps would read as it was."""
    kept: set[Slot] = set()
    for i, (site, mode, memory) in enumerate(zip(sites, modes, memories, strict=True)):
        updated = Mode.PARTIAL in mode and Mode.FORECAST not in mode
        held = site.row_proof.stale_inputs if site.row_proof is not None and Mode.HOLD in mode else ()
        keys = (
            site.query_proof.dense_inputs if site.query_proof is not None and mode & (Mode.KEYS | Mode.UPDATE) else ()
        )
        kept |= {Slot("cache", i)} if updated or Mode.STORE in mode else set()
        kept |= {Slot("diff", i, order) for order in range(1, memory.order + 1) if Mode.DIFF in mode}
        kept |= {Slot("score", i)} if Mode.SCORE in mode else set()
        kept |= {Slot("held", i, j) for j in range(len(held))} | {Slot("keys", i, j) for j in range(len(keys))}
    return kept
