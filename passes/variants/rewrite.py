"""Rewrite: one graph per template and combination of what its sites do.

Each node of the segment is the model's own op, unless a site's action says otherwise (``compute.py``, ``rows.py``)::

    y = M(f(x))                    idx  = toca.select_tokens(score, stamp, k, …)
    x = x + gate * y       →       rows = M(f(toca.gather_tokens(x, idx)))
                                   y    = toca.scatter_tokens_(cache, idx, rows)
                                   x    = x + gate * y

Beside the sites' outputs, values that later steps take from the cache are kept where they are made: the attention of a
parallel block, keys and values. The gate stays outside, so it is always the current step's.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from toca_compile.errors import PassError, VerifyError
from toca_compile.ir.graph import operand_nodes
from toca_compile.ir.program import Form, Segment, Variant
from toca_compile.ir.selectors import TokenSelector
from toca_compile.ir.state import Slot, State
from toca_compile.ir.types import AxisTypes, Site
from toca_compile.ir.verify import verify_kept
from toca_compile.passes.variants.compute import EMISSIONS
from toca_compile.passes.variants.emit import SegmentBuilder
from toca_compile.passes.variants.narrow import by_linear, emit_pieces, narrowed
from toca_compile.passes.variants.needed import kept_slots, needed_nodes

toca = torch.ops.toca


def rewrite(
    segment: Segment,
    sites: Sequence[Site],
    forms: Sequence[Form],
    types: AxisTypes,
    selector: TokenSelector,
    *,
    dense: bool = False,
) -> Variant:
    """The variant of ``segment`` in which its sites do what ``forms`` says.

    ``dense``: compute selected rows for all tokens and blend by mask, the plain meaning of the restriction.

    Raises:
        PassError: an emission failed, or does not write what later steps read.
    """
    try:
        builder = SegmentBuilder(segment, sites, forms, types, selector, dense=dense)
        variant = replace(_emitted(builder), ranks=builder.ranks)
        verify_kept(variant, kept_slots(sites, forms))
    except (VerifyError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        told = ", ".join(f"{site.name} ({form})" for site, form in zip(sites, forms, strict=True))
        raise PassError(f"the rewriting of {told} failed: {error}") from error
    return variant


def _emitted(builder: SegmentBuilder) -> Variant:
    sites = [(i, site, form) for i, (site, form) in enumerate(zip(builder.sites, builder.forms, strict=True))]
    ends = {site.output: (i, site, form) for i, site, form in sites}
    stale = {n: Slot(State.STALE_INPUT, i, j) for i, s, form in sites for j, n in enumerate(form.action.stale(s))}
    kept = [(node, slot) for i, site, form in sites for node, slot in _kept_inside(i, site, form)]
    needed = needed_nodes(builder.segment, builder.sites, builder.forms, dense=builder.dense)
    narrow = {}
    if not builder.dense:
        held = [node for node, _ in kept]
        narrow = by_linear(narrowed(builder.segment, builder.sites, builder.forms, builder.types, needed, held))
    for node in builder.segment.nodes:
        if node not in needed or node in builder.env or narrow.keys() & set(node.all_input_nodes):
            continue
        if node in narrow:
            x, *weights = (builder.env[n] for n in operand_nodes(node))
            builder.env |= emit_pieces(builder.call, x, weights, narrow[node])
            continue
        if node in stale:
            slot = stale[node]
            value = builder.slot(slot.kind, slot.position, slot.index)
            builder.env[node] = builder.as_made(node, value, slot.position)
        elif node in ends:
            position, site, form = ends[node]
            EMISSIONS.find(form.action)(builder, position, site, form)
        else:
            builder.env[node] = builder.copy(node)
        for slot in (slot for value, slot in kept if value is node):
            builder.call(toca.store_.default, builder.slot(slot.kind, slot.position, slot.index), builder.env[node])
    return builder.finish([builder.env[n] for n in builder.segment.outputs])


def _kept_inside(position: int, site: Site, form: Form) -> list[tuple[fx.Node, Slot]]:
    """The values inside a branch that this step makes and later ones take from the cache. One value may be the keys of
    several sites (streams that attend jointly)."""
    found: list[tuple[fx.Node, Slot]] = []
    if form.keep.stale_inputs and site.row_proof is not None:
        found += [(n, Slot(State.STALE_INPUT, position, j)) for j, n in enumerate(site.row_proof.stale_inputs)]
    if form.keep.keys and site.query_proof is not None:
        keys = site.query_proof.dense_inputs
        taken = form.action.from_cache(site)
        found += [(n, Slot(State.KEYS, position, j)) for j, n in enumerate(keys) if n not in taken]
    return found
