"""FindAttention: where queries read keys.

Three forms: the fused op; a softmax whose normalised dimension is then contracted with the values (matmul–softmax–
matmul, einsum, bmm), with only shape and pointwise ops between; and linear attention, which contracts keys with values
over their rows first, and then what that makes with the queries. The index space that the queries run over is a token
axis. Nothing else in a graph says what a token is.
"""

import operator
from dataclasses import replace

import torch
from torch import fx

from toca_compile.ir.factors import Product
from toca_compile.ir.graph import operand_nodes
from toca_compile.ir.types import Attention, AxisTypes
from toca_compile.passes.proof.follow import label_at, occurrence_of
from toca_compile.passes.proof.tokens import row_factors
from toca_compile.rules.registry import RULES, Work, work_of

aten = torch.ops.aten


def find_attention(graph: fx.Graph, types: AxisTypes) -> tuple[Attention, ...]:
    """Every attention of a graph whose queries run over more than one token, in graph order."""
    found = []
    for node in graph.nodes:
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or node not in types.specs:
            continue
        if rule.work is Work.ATTENTION:
            found.append(_fused(node, types))
        elif rule.work is Work.SOFTMAX:
            found.extend(_written_out(node, types))
    linear = _linear(graph, types, {a.node for a in found})
    over_rows = {a.node for a in linear}
    order = {node: i for i, node in enumerate(graph.nodes)}
    # A softmax over what keys and values make of each other runs over features.
    found = [_at_their_places(a, types) for a in found if a.node not in over_rows] + linear
    return tuple(sorted((a for a in found if a.axis), key=lambda a: order[a.node]))


def _at_their_places(attention: Attention, types: AxisTypes) -> Attention:
    """With keys that several processes have, each in the place of its own token, told apart by their places alone."""
    others = types.number_processes() - types.factors.atoms(attention.axis)
    return replace(attention, key_axis=tuple(f for f in attention.key_axis if f not in others))


def _fused(node: fx.Node, types: AxisTypes) -> Attention:
    query, key, value = operand_nodes(node)[:3]
    q, k = types.type_of(query), types.type_of(key)
    lead = tuple(f for dim in q[:-2] for f in dim)
    plain = node.target is aten.scaled_dot_product_attention.default  # of others no pass can tell the weights
    return Attention(node, q[-2], k[-2], lead, (query, key, value) if plain else (), value=value)


def _written_out(softmax: fx.Node, types: AxisTypes) -> list[Attention]:
    """Follow the softmax's dimension forward to the product that contracts it."""
    spec = types.specs[softmax]
    (over,) = spec.mixed & {label for dims in spec.results for dim in dims for label in dim} or {None}
    if over is None:
        return []
    start = occurrence_of(types, softmax, spec.results[0], (over, 0))
    assert start is not None
    found, todo = [], [(softmax, start, False)]
    while todo:
        node, at, cut = todo.pop()
        for user in node.users:
            use = types.specs.get(user)
            if use is None or user.target is operator.getitem:
                continue
            for i, operand in enumerate(operand_nodes(user)):
                label = label_at(types, user, use.operands[i], at) if operand is node else None
                if label is None:
                    continue
                if work_of(user) is Work.CONTRACT and not _in_results(use.results[0], label[0]):
                    whole = _product(softmax, user, i, types.label(softmax, over), types)
                    found.append(replace(whole, map=None) if cut else whole)
                elif label[0] in use.carried and work_of(user) is Work.NONE:
                    # Past another product the weights are weights no more.
                    moved = occurrence_of(types, user, use.results[0], label)
                    if moved is not None:
                        todo.append((user, moved, cut))
                else:  # some of the keys are no tokens: a sink that takes weight and gives nothing
                    windows = [(name, 0) for name, window in use.windows.items() if window.source == label[0]]
                    places = [occurrence_of(types, user, use.results[0], name) for name in windows]
                    todo += [(user, place, True) for place in places if place is not None]
    return found


def _in_results(dims: tuple[tuple[str, ...], ...], label: str) -> bool:
    return any(label in dim for dim in dims)


def _product(softmax: fx.Node, product: fx.Node, position: int, over: Product, types: AxisTypes) -> Attention:
    """The attention that ``product`` completes: its rows are the queries, its shared labels batch and heads, and the
    keys those that it contracts of what the softmax ran ``over`` (frames and patches may lie apart by then)."""
    spec = types.specs[product]
    weights = spec.operands[position]
    other = 1 - position if len(spec.operands) == 2 else len(spec.operands) - 1
    value_labels = {label for dim in spec.operands[other] for label in dim}
    axis: Product = ()
    keys: Product = ()
    lead: Product = ()
    for label in (label for dim in weights for label in dim):
        if not _in_results(spec.results[0], label) and set(types.label(product, label)) <= types.factors.atoms(over):
            keys += types.label(product, label)
        elif label in value_labels:
            lead += types.label(product, label)
        else:
            axis += types.label(product, label)
    value = operand_nodes(product)[other]
    return Attention(product, axis, keys, lead, (), map=softmax, value=value)


def _linear(graph: fx.Graph, types: AxisTypes, products: set[fx.Node]) -> list[Attention]:
    """Attentions that contract the rows of two values and then the result with a third value's features. Rows are what
    linear layers take one by one; ``products`` are contractions of weights by a softmax."""
    rows, found = row_factors(graph, types), []
    for node in graph.nodes:
        spec = types.specs.get(node)
        if spec is None or work_of(node) is not Work.CONTRACT or node in products or len(spec.operands) < 2:
            continue
        gone = set.intersection(*({x for dim in dims for x in dim} for dims in spec.operands[:2]))
        keys = tuple(f for x in sorted(gone) if not _in_results(spec.results[0], x) for f in types.label(node, x))
        if keys and set(keys) <= rows:
            found += [Attention(use, axis, keys, lead, ()) for use, axis, lead in _readers(node, types, rows)]
    return found


def _readers(product: fx.Node, types: AxisTypes, rows: set[int]) -> list[tuple[fx.Node, Product, Product]]:
    """The contractions in which something's rows read a product of keys and values: those rows, and what both have."""
    found, todo, seen = [], [product], {product}
    while todo:
        node = todo.pop()
        for user in node.users:
            use = types.specs.get(user)
            if use is None and user.target is not operator.getitem:
                continue
            if use is None or work_of(user) is not Work.CONTRACT:
                todo += [user] if user not in seen else []
                seen.add(user)
                continue
            read = [i for i, operand in enumerate(operand_nodes(user)) if operand is node]
            own = {x for i in read for dim in use.operands[i] for x in dim}
            made = [x for dim in use.results[0] for x in dim]
            axis = tuple(f for x in made if x not in own for f in types.label(user, x) if f in rows)
            lead = tuple(f for x in made if x in own for f in types.label(user, x) if f in rows)
            if axis:
                found.append((user, axis, lead))
    return found
