"""MeasureScores: the graph that turns an attention into scores of its tokens, ``[batch, tokens]``.

Models lay attention out in many ways: ``[b, h, n, d]``, ``[(b h), n, d]``, frames beside the batch. Each operand's
dimensions are therefore taken apart into factors and grouped anew, by what they number: samples, heads, tokens.
"""

from collections.abc import Callable, Mapping
from math import log, prod

import torch
from torch import fx

from toca_compile.errors import PolicyError
from toca_compile.ir.factors import Product
from toca_compile.ir.graph import source_line, value_of
from toca_compile.ir.selectors import Selector
from toca_compile.ir.types import Attention, AxisTypes, RowProof, Site, Type
from toca_compile.passes.infer_axes import call_of

aten = torch.ops.aten
toca = torch.ops.toca

Emit = Callable[..., fx.Node]
Atoms = list[list[tuple[int, int]]]  # of each dimension, the parts it is made of: size and group

_BATCH, _HEADS, _TOKENS, _LAST = range(4)


def check_score(attention: Attention, score: str, types: AxisTypes) -> None:
    """Whether the attention shows what the score is made of.

    Raises:
        PolicyError: it is written out and hides its keys, or lays its rows along the last dimension.
    """
    if score in HIDDEN and HIDDEN[score](attention, types):
        raise PolicyError(
            f"score {score!r} needs an attention whose rows can be told apart, and the one at "
            f"{source_line(attention.node)} is written out; use score='attention' or 'random'"
        )


def received(
    emit: Emit, values: Mapping[fx.Node, fx.Node], site: Site, selector: Selector, types: AxisTypes
) -> fx.Node:
    """What each token receives as a key: the column sums of the map (s1 of ToCa)."""
    attention = site.attention[-1]
    if attention.map is not None:
        value = emit(aten._to_copy.default, values[attention.map], dtype=torch.float32)
        keys = _dims_of_keys(attention, types)
        atoms = _atoms(types, types.type_of(attention.map), site.batch, ())
        made = types.type_of(attention.map)
        atoms = [_keys(types, made[d], attention) if d in keys else dim for d, dim in enumerate(atoms)]
    else:
        query, key, mask = _operands(attention)
        arguments = (values[query], values[key], values[mask] if mask is not None else None)
        value = emit(toca.attention_received.default, *arguments, *_how(attention), selector.stride)
        lead = types.type_of(query)[:-2]
        atoms = [*_atoms(types, lead, site.batch, ()), _keys(types, types.type_of(key)[-2], attention)]
    return _over_heads(emit, value, atoms, site, selector, types)


def norm_of(part: Callable[[Attention], fx.Node | None], *, negate: bool) -> "Measure":
    """The norm of each token's row of keys or values."""

    def measured(
        emit: Emit, values: Mapping[fx.Node, fx.Node], site: Site, selector: Selector, types: AxisTypes
    ) -> fx.Node:
        attention = site.attention[-1]
        row = part(attention)
        assert row is not None  # or check_score refused the plan
        value = emit(toca.row_norm.default, values[row], negate)
        atoms = _atoms(types, types.type_of(row)[:-1], site.batch, attention.key_axis)
        return _over_heads(emit, value, atoms, site, selector, types)

    return measured


def _over_heads(emit: Emit, value: fx.Node, atoms: Atoms, site: Site, selector: Selector, types: AxisTypes) -> fx.Node:
    value = emit(aten.sum.dim_IntList, _grouped(emit, value, atoms, 3), [_HEADS])
    return emit(toca.pair_mean.default, value) if _paired(site, selector, types) else value


def entropy(emit: Emit, values: Mapping[fx.Node, fx.Node], site: Site, selector: Selector, types: AxisTypes) -> fx.Node:
    """1 + the entropy of the head-mean row of each token's cross-attention (s2 of ToCa), for all tokens or for those
    whose queries ``values`` holds. Of a guidance pair it is the entropy of the mean of both rows, whose texts are
    apart: the mean of both entropies, and ln 2."""
    attention = site.attention[-1]
    paired = _paired(site, selector, types)
    epsilon = 2e-7 if paired else 1e-7
    if attention.map is not None:
        keys = _dims_of_keys(attention, types)
        atoms = _atoms(types, types.type_of(attention.map), site.batch, attention.axis)
        atoms = [[(n, _LAST) for n, _ in dim] if d in keys else dim for d, dim in enumerate(atoms)]
        # Rows of a partial step are fewer than the axis has: their number is left open.
        atoms = [[(-1, _TOKENS)] if any(g == _TOKENS for _, g in dim) else dim for dim in atoms]
        value = emit(toca.row_entropy.default, _grouped(emit, values[attention.map], atoms, 4), epsilon)
    else:
        query, key, mask = _operands(attention)
        lead = _atoms(types, types.type_of(query)[:-2], site.batch, ())
        lead_of_keys = _atoms(types, types.type_of(key)[:-2], site.batch, ())
        tail = [[(-1, _TOKENS)], [(value_of(query).shape[-1], _LAST)]]
        asked = _grouped(emit, values[query], [*lead, *tail], 4)
        given = _grouped(emit, values[key], [*lead_of_keys, *tail], 4)
        hidden = values[mask] if mask is not None else None
        if mask is not None and asked is not values[query]:
            keys_of_mask = value_of(mask).shape[-1]
            sizes = [types.factors.size(dim) for dim in types.type_of(query)[:-2]]
            hidden = emit(aten.expand.default, hidden, [*sizes, -1, keys_of_mask])
            hidden = _grouped(emit, hidden, [*lead, [(-1, _TOKENS)], [(keys_of_mask, _LAST)]], 4)
        value = emit(toca.attention_entropy.default, asked, given, hidden, *_how(attention), epsilon)
    if paired:
        value = emit(toca.pair_mean.default, value)
    return emit(aten.add.Tensor, value, 1 + (log(2) if paired else 0.0))


def can_measure_rows(site: Site, proof: RowProof) -> bool:
    """Whether a partial step of a site makes rows of the map that ranks its tokens by entropy, and all that they are
    measured from; queries that are the keys too would be asked for by their rows and whole."""
    if (
        site.score_by_queries is None
        or site.score_by_queries.site != site.index
        or site.attention[-1].node not in proof.rows
    ):
        return False
    attention = site.attention[-1]
    reads = (attention.map,) if attention.map is not None else _operands(attention)
    made = all(n is None or n in proof.rows or n in proof.dense_inputs or n not in site.region for n in reads)
    return made and reads[0] not in proof.dense_inputs


def _paired(site: Site, selector: Selector, types: AxisTypes) -> bool:
    return selector.shared_pair and types.factors.size(site.batch) % 2 == 0


def _operands(attention: Attention) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    node = attention.node
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return attention.operands[0], attention.operands[1], mask if isinstance(mask, fx.Node) else None


def _how(attention: Attention) -> tuple[float | None, bool]:
    """Scale and causality of a fused attention."""
    arguments = call_of(attention.node)
    return arguments.kwargs.get("scale"), bool(arguments.arg(5, "is_causal", False))


def _dims_of_keys(attention: Attention, types: AxisTypes) -> set[int]:
    """The dimensions that the softmax of a written-out attention runs over. (Queries may be the same factors.)"""
    assert attention.map is not None
    spec = types.specs[attention.map]
    return {d for d, dim in enumerate(spec.results[0]) if set(dim) & spec.mixed}


def _atoms(types: AxisTypes, dims: Type, batch: Product, tokens: Product) -> Atoms:
    """The dimensions taken apart into factors: samples, tokens, and the rest, which counts as heads."""

    def group(factor: int) -> int:
        return _BATCH if factor in batch else _TOKENS if factor in tokens else _HEADS

    return [[(types.factors.size((f,)), group(f)) for f in dim] for dim in dims]


def _keys(types: AxisTypes, dim: Product, attention: Attention) -> list[tuple[int, int]]:
    """A dimension of keys taken apart. Those that several processes have in one place are added up, as heads are."""
    others = types.number_processes() - set(attention.key_axis)
    return [(types.factors.size((f,)), _HEADS if f in others else _TOKENS) for f in dim]


def _grouped(emit: Emit, value: fx.Node, atoms: Atoms, groups: int) -> fx.Node:
    """``value`` with one dimension for each group, in order."""
    if len(atoms) == groups and all(g == d for d, dim in enumerate(atoms) for _, g in dim):
        return value
    flat = [atom for dim in atoms for atom in dim]
    order = sorted(range(len(flat)), key=lambda i: flat[i][1])
    value = emit(aten.reshape.default, value, [n for n, _ in flat])
    value = emit(aten.permute.default, value, order)
    sizes = [[n for n, g in flat if g == group] for group in range(groups)]
    return emit(aten.reshape.default, value, [-1 if -1 in own else prod(own) for own in sizes])


def _values_of(attention: Attention) -> fx.Node | None:
    return attention.value


def _keys_of(attention: Attention) -> fx.Node | None:
    return next(iter(attention.operands[1:2]), None)


def _hides_row(part: Callable[[Attention], fx.Node | None]) -> Callable[[Attention, AxisTypes], bool]:
    def hides(attention: Attention, types: AxisTypes) -> bool:
        row = part(attention)
        return row is None or bool(set(types.type_of(row)[-1]) & set(attention.key_axis))

    return hides


def _hides_queries(attention: Attention, types: AxisTypes) -> bool:
    if attention.map is None:
        return False
    return any(set(d) & set(attention.axis) and d != attention.axis for d in types.type_of(attention.map))


Measure = Callable[[Emit, Mapping[fx.Node, fx.Node], Site, Selector, AxisTypes], fx.Node]

OF_ATTENTION: dict[str, Measure] = {
    "attention": received,
    "entropy": entropy,
    "v_norm": norm_of(_values_of, negate=True),
    "k_norm": norm_of(_keys_of, negate=False),
}
"""Scores of all tokens that the last attention of a site tells."""
OF_ROWS: dict[str, Measure] = {"entropy": entropy}
"""Those that an attention over some of its queries tells of these."""
HIDDEN: dict[str, Callable[[Attention, AxisTypes], bool]] = {
    "entropy": _hides_queries,
    "v_norm": _hides_row(_values_of),
    "k_norm": _hides_row(_keys_of),
}
"""Whether an attention that the model writes out itself hides what the score is made of."""
