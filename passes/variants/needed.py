"""Needed: which nodes of a segment a variant computes for all tokens, and which buffers it must write."""

from collections.abc import Sequence

from torch import fx

from toca_compile.ir.program import Form, Segment
from toca_compile.ir.state import Slot
from toca_compile.ir.types import Site


def needed_nodes(
    segment: Segment, sites: Sequence[Site], forms: Sequence[Form], *, dense: bool = False
) -> set[fx.Node]:
    """The nodes computed for all tokens. A branch that is not computed needs none of its own, one that is computed on
    some rows those that its rows are gathered from. ``dense``: such a branch is computed for all tokens too."""
    does = [(site, form.action) for site, form in zip(sites, forms, strict=True)]
    ends = {site.output: (site, action) for site, action in does if not action.dense}
    stale = {n for site, action in does for n in action.stale(site)}
    needed: set[fx.Node] = set()
    todo = [*segment.outputs, *(s.add for s in sites)]
    inside = set(segment.nodes)
    while todo:
        node = todo.pop()
        if node in needed or node not in inside:
            continue
        needed.add(node)
        if node in stale:
            continue
        if node not in ends or (dense and ends[node][1].rows(ends[node][0])):
            todo += node.all_input_nodes
            continue
        site, action = ends[node]
        proof, rows = action.proof(site), action.rows(site)
        if proof is not None:
            taken = action.from_cache(site)
            inner = {*rows, *taken}
            todo += [i for n in rows if n not in proof.joins for i in n.all_input_nodes if i not in inner]
            todo += [n for n in proof.dense_inputs if n not in taken]
    return needed


def kept_slots(sites: Sequence[Site], forms: Sequence[Form]) -> set[Slot]:
    """The buffers that a variant must write: what it does not, later steps would read as it was."""
    return {
        Slot(kind, i, index)
        for i, (site, form) in enumerate(zip(sites, forms, strict=True))
        for kind, index in form.action.writes(site, form.keep)
    }
