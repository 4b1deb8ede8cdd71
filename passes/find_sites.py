"""FindSites: residual branches on a token axis, ``x ← x + g(M(f(x)))``, and what each may legally do.

A branch is found by its shape alone: an addition one of whose operands is computed from the other. The cached value is
M's output before the conditioning-only tail ``g`` (the gate), since the gate changes with the timestep. Cases:

1. serial blocks: the branch starts at the addition's other operand;
2. parallel blocks, ``x + a(x) + m(x)``: the branch starts earlier on the same residual chain;
3. several streams side by side, mixed by small matrices at each addition (hyper-connections): the branch starts at the
   streams as they last were. Looked for where there is no plain residual;
4. nests: a candidate around others that hold an attention is a block or a stack, not a site; one around others that do
   not is the site, and they are part of it (an adapter inside a projection). One in whose midst another begins, which
   ends outside of it (streams that change places), is none.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx

from toca_compile.ir.factors import Product
from toca_compile.ir.graph import ancestors, common_module, operand_nodes, uncast, value_of
from toca_compile.ir.names import distinct_names
from toca_compile.ir.types import Attention, AxisTypes, FactorPos, RowProof, Site, TokenAxis
from toca_compile.passes.proof.follow import Blocked, Branch
from toca_compile.passes.proof.prove import batch_of, prove, prove_queries
from toca_compile.passes.proof.tokens import axis_of, fill_dims, layered_rows, mixes, row_factors, token_dims
from toca_compile.rules.registry import RULES, computes, is_foreign

aten = torch.ops.aten


@dataclass(frozen=True)
class _Residual:
    branch: Branch
    add: fx.Node


def find_sites(
    graph: fx.Graph,
    types: AxisTypes,
    attentions: tuple[Attention, ...],
    static: frozenset[fx.Node],
    grid: tuple[int, int] | None = None,
    *,
    fragment: bool = False,
) -> tuple[Site, ...]:
    """All sites in graph order. ``static`` holds the nodes that depend on parameters only; ``grid`` overrides the
    token grid that the graph shows; ``fragment``: the graph is a part of a model."""
    token_factors = {f for a in attentions for f in types.factors.atoms(a.axis)}
    found = _residuals(graph, types, token_factors) or _residuals(graph, types, token_factors, mixed=True)
    if not found:
        rows = row_factors(graph, types)
        # What queries run over may be padded, and in no stream; another library's op may be an attention.
        if fragment or attentions or mixes(types, rows) or any(map(is_foreign, graph.nodes)):
            token_factors, found = rows, _residuals(graph, types, rows)
    if not found:
        rows = layered_rows(types, static)
        found = _residuals(graph, types, rows)
        features = {f for r in found for f in types.type_of(r.add)[-1]}  # where no norm tells
        token_factors = rows - features or rows
        found = [r for r in found if any(f in token_factors for dim in types.type_of(r.add) for f in dim)]
    axes: dict[tuple[int, ...], TokenAxis] = {}
    sites: list[Site] = []
    for residual in _choose(found, attentions):
        branch = residual.branch.to(_before_tail(residual.branch, static))
        output, region = branch.output, branch.region
        if not any(computes(n) for n in region):
            continue
        choices = token_dims(types, output, value_of(output).shape, token_factors)
        if not choices:
            continue
        inside = tuple(a for a in attentions if a.node in region)
        tried = []
        for tokens in choices:
            proof, batch = _prove(types, branch, tokens, inside)
            tried.append((tokens, proof, batch, _queries(types, branch, tokens, proof, batch)))
        able = [t for t in tried if isinstance(t[1], RowProof)]
        able += sorted((t for t in tried if isinstance(t[3], RowProof)), key=_parted)
        whole = [t for t in tried if fill_dims(types, output, t[0])]
        tokens, proof, batch, queries = [*able, *whole, *tried][0]
        factors = _factors(types, output, tokens)
        if factors not in axes:
            axes[factors] = axis_of(graph, types, factors, len(axes), grid)
        sites.append(
            Site(
                index=len(sites),
                name=common_module(n for n in region if computes(n)) or f"site{len(sites)}",
                kind=_kind(inside, factors, proof, types),
                axis=axes[factors],
                batch=batch,
                source=branch.source,
                output=output,
                add=residual.add,
                region=region,
                attention=inside,
                row_proof=None if isinstance(proof, Blocked) else proof,
                reason=str(proof) if isinstance(proof, Blocked) else None,
                query_proof=queries if isinstance(queries, RowProof) else None,
                no_queries=str(queries) if isinstance(queries, Blocked) else None,
                fragment=fragment,
            )
        )
    return tuple(replace(s, name=name) for s, name in zip(sites, distinct_names(sites), strict=True))


def _parted(tried: tuple[object, ...]) -> bool:
    """Whether rows read windows of their own: what reads one for all comes first."""
    return any(isinstance(part, RowProof) and part.parted for part in tried)


def _prove(
    types: AxisTypes, branch: Branch, tokens: tuple[FactorPos, ...], inside: tuple[Attention, ...]
) -> tuple[RowProof | Blocked, Product]:
    """The proof for one choice of tokens, and the factors that number samples.

    A branch through attention beside arithmetic of its own (a parallel block) is token-wise if what the attention
    yields is held from the last full step.
    """
    factors = set(_factors(types, branch.output, tokens))
    mixing = [a.node for a in inside if factors & types.factors.atoms(a.key_axis)]
    first: tuple[RowProof | Blocked, Product] | None = None
    for held in ((), tuple(mixing)) if mixing else ((),):
        within = replace(branch, held=held)
        batch = batch_of(types, within, tokens)
        proof = prove(types, within, tokens, batch)
        numbers = _factors(types, branch.output, batch)
        if isinstance(proof, RowProof) and (not held or _computes(proof, branch)):
            return proof, numbers
        first = first or (proof, numbers)
    assert first is not None
    return first


def _queries(
    types: AxisTypes,
    branch: Branch,
    tokens: tuple[FactorPos, ...],
    proof: RowProof | Blocked,
    batch: Product,
) -> RowProof | Blocked | None:
    """For a branch that is not token-wise as it is: the proof that it is, given keys and values of all tokens.
    ``batch``: the factors that number the site's samples; one selection serves both proofs."""
    if isinstance(proof, RowProof) and not proof.stale_inputs:
        return None
    carried = batch_of(types, branch, tokens)
    if isinstance(proof, RowProof) and _factors(types, branch.output, carried) != batch:
        # What is held hides it from the first proof: keys, say, that are made across samples.
        return Blocked(proof.stale_inputs[0], "mixes samples that the rest of the branch keeps apart")
    return prove_queries(types, branch, tokens, carried)


def _factors(types: AxisTypes, node: fx.Node, places: Iterable[FactorPos]) -> Product:
    return tuple(types.type_of(node)[at.dim][at.index] for at in places)


def _computes(proof: RowProof, branch: Branch) -> bool:
    """Whether a partial step does arithmetic on the input, and what follows from held values is needed here alone."""
    own = _users_within(branch.source, proof.rows)
    after = {n for node in proof.stale_inputs for n in (node, *_users_within(node, branch.region))} - {branch.output}
    apart = all(user in branch.region for node in after for user in node.users)
    return apart and any(computes(n) for n in own)


def _residuals(graph: fx.Graph, types: AxisTypes, token_factors: set[int], *, mixed: bool = False) -> list[_Residual]:
    nodes = list(graph.nodes)
    bit = {node: 1 << i for i, node in enumerate(nodes)}
    above: dict[fx.Node, int] = {}  # all ancestors and the node itself, as a bit set
    for node in nodes:
        above[node] = bit[node]
        for parent in node.all_input_nodes:
            above[node] |= above[parent]
    chain: dict[fx.Node, fx.Node] = {}  # residual addition -> the residual operand
    found = []
    for node in nodes:
        if node.target is not aten.add.Tensor or node.kwargs or len(operand_nodes(node)) != 2:
            continue
        if not any(f in token_factors for dim in types.type_of(node) for f in dim):
            continue
        a, b = operand_nodes(node)
        if a is b or any(value_of(x).shape != value_of(node).shape for x in (a, b)):
            continue
        for residual, end in ((a, b), (b, a)):
            if above[residual] & bit[end]:
                continue
            source: fx.Node | None = residual
            while source is not None and not above[end] & bit[source]:
                source = chain.get(source, uncast(source))
            if mixed and source is None:
                # The last value of the kind that both come from, if all such do: a shift by the time is no stream.
                shape, whole = value_of(node).shape, above[residual] | above[end]
                like = [n for n in nodes if whole & bit[n] and _is_like(n, shape)]
                both = [n for n in like if above[residual] & above[end] & bit[n]]
                if both and all(above[n] & bit[both[-1]] or above[both[-1]] & bit[n] for n in like):
                    source = both[-1]
            if source is None:
                continue
            chain[node] = residual
            # All that stands between the two.
            region = frozenset(ancestors([end], stop=[source], within=partial(_is_below, above, bit[source])))
            found.append(_Residual(Branch(source, end, region), node))
            break
    return found


def _is_like(node: fx.Node, shape: torch.Size) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.shape == shape


def _is_below(above: Mapping[fx.Node, int], bit: int, node: fx.Node) -> bool:
    return bool(above[node] & bit)


def _choose(residuals: list[_Residual], attentions: tuple[Attention, ...]) -> list[_Residual]:
    """Of nested candidates, the sites (case 4)."""
    residuals = [r for r in residuals if any(computes(n) for n in r.branch.region)]
    mixing = {a.node for a in attentions}
    attends = {r.add: any(n in mixing or is_foreign(n) for n in r.branch.region) for r in residuals}
    kept: list[_Residual] = []
    for residual in sorted(residuals, key=lambda r: len(r.branch.region)):
        region = residual.branch.region
        if any(k.branch.output in region and k.add not in region for k in kept):
            continue  # around another's branch, not around what that adds to: y is in h + y + mlp(h + y / 2) twice
        inner = [k for k in kept if k.add in region]
        attentive = [k for k in inner if attends[k.add]]
        if len(attentive) > 1 or (attentive and (len(inner) > 1 or not _more_work(residual, attentive[0]))):
            continue
        kept = [k for k in kept if k not in inner] + [residual]
    order = {residual.add: i for i, residual in enumerate(residuals)}
    chosen: list[_Residual] = []
    for residual in sorted(kept, key=lambda r: order[r.add], reverse=True):
        if not any(_begins_in(later, residual) for later in chosen):
            chosen.append(residual)
    return chosen[::-1]


def _begins_in(later: _Residual, residual: _Residual) -> bool:
    """Whether a stream goes on from the midst of another branch: it needs all tokens of what is computed for some."""
    return later.branch.source in residual.branch.region and later.add not in residual.branch.region


def _more_work(outer: _Residual, inner: _Residual) -> bool:
    """Whether ``outer`` does arithmetic on what ``inner`` adds: a branch through attention and MLP both, whose first
    addition is no step of the residual stream."""
    return any(computes(n) for n in _users_within(inner.add, outer.branch.region))


def _before_tail(branch: Branch, static: frozenset[fx.Node]) -> fx.Node:
    """M's output: below everything pointwise at the branch's end that brings in the current conditioning.

    Walks back from the end over pointwise ops and views. Wherever all paths meet in one value, that value is M's output
    if conditioning came in above it.
    """
    output, frontier, conditioned = branch.output, {branch.output}, False
    while frontier:
        node = max(frontier)  # the last of them in the graph
        if len(frontier) == 1 and conditioned:
            output, conditioned = node, False
        rule = RULES.get(node.target)  # type: ignore[call-overload]
        if rule is None or not (rule.pointwise or node.target is aten.reshape.default):
            break
        inside = [o for o in operand_nodes(node) if o in branch.region]
        outside = [o for o in operand_nodes(node) if o not in branch.region and o not in static]
        changed = rule.pointwise and any(value_of(o).shape != value_of(node).shape for o in inside)
        if not inside or branch.source in outside or changed:
            break
        frontier = (frontier - {node}) | set(inside)
        conditioned |= bool(outside)
    return output


def _users_within(node: fx.Node, region: AbstractSet[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if user in region and user not in seen:
                seen.add(user)
                todo.append(user)
    return seen


def _kind(inside: tuple[Attention, ...], factors: tuple[int, ...], proof: object, types: AxisTypes) -> str:
    if isinstance(proof, RowProof) and proof.stale_inputs:
        return "parallel"
    if not inside:
        return "mixer" if isinstance(proof, Blocked) else "mlp"
    if any(set(a.key_axis) & set(factors) for a in inside):
        return "self_attention"
    if any(types.factors.atoms(a.key_axis) & set(factors) for a in inside):
        return "joint_attention"
    # What queries and keys both run over, and no stream does, are its tokens laid out anew (padded windows).
    return "self_attention" if isinstance(proof, Blocked) and _all_self(inside) else "cross_attention"


def _all_self(inside: tuple[Attention, ...]) -> bool:
    return all(a.axis == a.key_axis for a in inside)
