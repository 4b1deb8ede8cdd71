"""Rewrite: one graph per template and combination of site modes.

``PARTIAL`` replaces a site's branch by its proven restriction to the selected tokens::

    y = M(f(x))                    idx  = toca.select_tokens(score, stamp, k, …)
    x = x + gate * y       →       rows = M(f(toca.gather_tokens(x, idx)))
                                   y    = toca.scatter_tokens_(cache, idx, rows)
                                   x    = x + gate * y

``REUSE`` replaces it by the cache, ``STORE`` computes it and keeps it, ``SCORE`` also keeps the tokens' scores for the
partial steps to come. The gate stays outside, so it is always the current step's.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

import toca_compile.ir.ops  # noqa: F401  (defines the toca:: ops)
from toca_compile.ir.graph import operand_nodes, value_of
from toca_compile.ir.plan import Selector
from toca_compile.ir.program import Mode, Segment, Slot, Variant
from toca_compile.ir.types import AxisTypes, Occurrence, Site
from toca_compile.passes.find_attention import key_occurrences, score_rows
from toca_compile.passes.infer_axes import call_of
from toca_compile.passes.prove import leaf_places
from toca_compile.rules.registry import RULES

toca = torch.ops.toca
aten = torch.ops.aten


def rewrite(
    segment: Segment,
    sites: Sequence[Site],
    modes: Sequence[Mode],
    types: AxisTypes,
    selector: Selector,
    *,
    dense: bool = False,
) -> Variant:
    """The variant of ``segment`` in which its sites act as ``modes`` says.

    ``dense``: compute a partial branch for all tokens and blend by mask, the plain meaning of the restriction.
    """
    return _Rewriter(segment, sites, modes, types, selector, dense).run()


def needed_nodes(
    segment: Segment, sites: Sequence[Site], modes: Sequence[Mode], *, dense: bool = False
) -> set[fx.Node]:
    """The nodes computed for all tokens. A reused branch needs none of its own, a partial one those that its rows are
    gathered from."""
    ends = {s.output: (s, m) for s, m in zip(sites, modes, strict=True)}
    needed: set[fx.Node] = set()
    todo = [*segment.outputs, *(s.add for s in sites)]
    inside = set(segment.nodes)
    while todo:
        node = todo.pop()
        if node in needed or node not in inside:
            continue
        needed.add(node)
        site, mode = ends.get(node, (None, Mode.PLAIN))
        if mode is Mode.REUSE:
            continue
        if site is not None and mode is Mode.PARTIAL and not dense:
            todo += [i for n in site.region for i in n.all_input_nodes if i not in site.region]
        else:
            todo += node.all_input_nodes
    return needed


class _Rewriter:
    def __init__(
        self,
        segment: Segment,
        sites: Sequence[Site],
        modes: Sequence[Mode],
        types: AxisTypes,
        selector: Selector,
        dense: bool,
    ) -> None:
        self.segment, self.sites, self.modes = segment, sites, modes
        self.types, self.selector, self.dense = types, selector, dense
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.rows: dict[fx.Node, fx.Node] = {}
        self.slots: dict[Slot, fx.Node] = {}
        self.ends = {s.output: (i, s, m) for i, (s, m) in enumerate(zip(sites, modes, strict=True))}

    def run(self) -> Variant:
        inputs = {node: self._placeholder(node, f"in{i}_{node.name}") for i, node in enumerate(self.segment.inputs)}
        self.env.update(inputs)
        needed = needed_nodes(self.segment, self.sites, self.modes, dense=self.dense)
        for node in self.segment.nodes:
            if node in needed:
                self._emit(node)
        self.graph.output(tuple(self.env[n] for n in self.segment.outputs))
        self.graph.eliminate_dead_code()
        values = []
        for i, node in enumerate(self.segment.inputs):
            if inputs[node].users or inputs[node] in self.graph.output_node().all_input_nodes:
                values.append(i)
            else:
                self.graph.erase_node(inputs[node])
        kept = [s for s, n in self.slots.items() if n.users]
        for slot, node in self.slots.items():
            if slot not in kept:
                self.graph.erase_node(node)
        module = fx.GraphModule({}, self.graph)
        return Variant(module, tuple(values), tuple(kept))

    def _emit(self, node: fx.Node) -> None:
        position, site, mode = self.ends.get(node, (0, None, Mode.PLAIN))
        if mode is Mode.REUSE:
            self.env[node] = self._slot("cache", position)
            return
        if mode is Mode.PARTIAL:
            assert site is not None
            self.env[node] = self._partial(site, position)
            return
        self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])
        if mode in (Mode.STORE, Mode.SCORE):
            self._call(toca.store_.default, self._slot("cache", position), self.env[node])
        if mode is Mode.SCORE:
            assert site is not None
            self._call(toca.store_.default, self._slot("score", position), self._score(site))

    # -- partial ----------------------------------------------------------------------------------------------------

    def _partial(self, site: Site, position: int) -> fx.Node:
        assert site.carry is not None
        index = self._select(site, position)
        dim, batch_dim = _dim(site.carry.tokens[site.output]), _dim(site.carry.batch[site.output])
        cache = self._slot("cache", position)
        if self.dense:
            dense = self.graph.node_copy(site.output, lambda n: self.env[n])
            return self._call(toca.blend_tokens_.default, cache, index, dense, dim, batch_dim)
        here, batch = site.carry.tokens[site.source], site.carry.batch[site.source]
        source = self._call(toca.gather_tokens.default, self.env[site.source], index, _dim(here), _dim(batch))
        self.rows = {site.source: source}
        for node in self.segment.nodes:
            if node in site.region:
                self.rows[node] = self._restrict(node, site, index)
        return self._call(toca.scatter_tokens_.default, cache, index, self.rows[site.output], dim, batch_dim)

    def _select(self, site: Site, position: int) -> fx.Node:
        stamp, step = self._slot("stamp", position), self._slot("step", position)
        if self.selector.score == "random":
            args = (stamp, step, self._slot("site", position), self.selector.seed)
            base = self._call(toca.random_scores.default, *args)
        elif self.selector.score == "none" or site.score_site is None:
            base = self._call(aten.zeros_like.default, stamp)
            base = self._call(aten._to_copy.default, base, dtype=torch.float32)
        else:
            base = self._slot("score", position)
            if site.score_window is not None:
                # The attention runs over more than these tokens: their part of its scores, normalised by itself.
                base = self._call(aten.slice.Tensor, base, 1, *site.score_window)
                base = self._call(toca.unit_scores.default, base)
        grid = [*site.axis.grid, site.axis.offset] if site.axis.grid and self.selector.bonus else []
        index = self._call(
            toca.select_tokens.default, base, stamp, self._slot("k", position), step, self._slot("since", position),
            self.selector.weight, grid, self.selector.cell, self.selector.bonus,
        )  # fmt: skip
        self._call(toca.mark_fresh_.default, stamp, index, step)
        return index

    def _restrict(self, node: fx.Node, site: Site, index: fx.Node) -> fx.Node:
        """A node of the region on the selected rows: the same op on restricted operands."""
        assert site.carry is not None
        if node.target is operator.getitem:
            return self._call(node.target, self.rows[node.args[0]], node.args[1])  # type: ignore[index]
        spec = self.types.specs[node]
        places = {}
        for operand, dims in zip(operand_nodes(node), spec.operands, strict=True):
            tokens, batch = leaf_places(self.types, node, site.carry, dims)
            if operand not in self.rows and any(tokens):
                places[operand] = (tokens, batch)

        def argument(operand: fx.Node) -> fx.Node:
            if operand in self.rows:
                return self.rows[operand]
            if operand in places:
                return self._gather_leaf(operand, *places[operand], site, index, node)
            return self.env[operand]

        copy = self.graph.node_copy(node, argument)
        copy.meta.pop("val", None)  # it has other sizes now
        size_arg = RULES[node.target].size_arg  # type: ignore[index]
        if size_arg is not None:
            sizes = self._restricted_shape(node, site)
            copy.args = (*copy.args[:size_arg], sizes, *copy.args[size_arg + 1 :])
        return copy

    def _restricted_shape(self, node: fx.Node, site: Site) -> list[Any]:
        """The shape of a value with its token factors replaced by K."""
        assert site.carry is not None
        tokens = site.carry.tokens[node]
        k = self._slot("k", self.sites.index(site))
        shape: list[Any] = []
        for d, product in enumerate(self.types.type_of(node)):
            rest = [f for i, f in enumerate(product) if Occurrence(d, i) not in tokens]
            size = self.types.factors.size(rest)
            if tokens[0].dim != d:
                shape.append(size)
            else:
                shape.append(k if size == 1 else self._call(operator.mul, k, size))
        return shape

    def _gather_leaf(
        self,
        operand: fx.Node,
        tokens: Sequence[Occurrence | None],
        batch: Sequence[Occurrence | None],
        site: Site,
        index: fx.Node,
        reader: fx.Node,
    ) -> fx.Node:
        """The selected rows of a value from outside the region. One that has no batch (a table that all samples share)
        is first expanded to one, along the dimension where ``reader`` has its batch."""
        assert site.carry is not None
        value, dim, batch_dim = self.env[operand], _dim(tokens), _dim(batch)
        if batch_dim < 0 and site.carry.batch[reader]:
            rank, of = len(value_of(operand).shape), len(value_of(reader).shape)
            batch_dim = _dim(site.carry.batch[reader])
            shape = [1] * (of - rank) + list(value_of(operand).shape)
            shape[batch_dim] = value_of(reader).shape[batch_dim]
            value, dim = self._call(aten.expand.default, value, shape), dim + of - rank
        return self._call(toca.gather_tokens.default, value, index, dim, batch_dim)

    # -- scores -----------------------------------------------------------------------------------------------------

    def _score(self, site: Site) -> fx.Node:
        """The scores of the site's tokens by its attention, ``[batch, tokens]``: whatever the leading dimensions are,
        samples stay apart and the rest (heads, the queries of a map) is summed."""
        attention = site.attention[-1]
        factors = [*attention.lead, *attention.key_axis]
        keys = set(range(len(attention.lead), len(factors)))
        row = score_rows(attention, self.selector.score, self.types)
        if row is not None:
            value = self._call(toca.row_norm.default, self.env[row], self.selector.score == "v_norm")
            factors = [f for dim in self.types.type_of(row)[:-1] for f in dim]
            keys = {i for i, f in enumerate(factors) if f in attention.key_axis}
        elif attention.map is not None:
            value = self._call(aten._to_copy.default, self.env[attention.map], dtype=torch.float32)
            types = self.types.type_of(attention.map)
            flat = [(Occurrence(d, i), f) for d, dim in enumerate(types) for i, f in enumerate(dim)]
            over = key_occurrences(attention, self.types)
            factors, keys = [f for _, f in flat], {i for i, (o, _) in enumerate(flat) if o in over}
        else:
            arguments = call_of(attention.node)
            query, key = (self.env[n] for n in attention.operands[:2])
            mask = attention.node.args[3] if len(attention.node.args) > 3 else attention.node.kwargs.get("attn_mask")
            value = self._call(
                toca.attention_received.default,
                query,
                key,
                self.env[mask] if isinstance(mask, fx.Node) else None,
                arguments.kwargs.get("scale"),
                bool(arguments.arg(5, "is_causal", False)),
                self.selector.stride,
            )
        order = [i for i, f in enumerate(factors) if f in site.batch and i not in keys]
        batch = self.types.factors.size(factors[i] for i in order)
        order += [i for i in range(len(factors)) if i not in order and i not in keys] + sorted(keys)
        tokens = self.types.factors.size(factors[i] for i in keys)
        value = self._call(aten.reshape.default, value, [self.types.factors.size((f,)) for f in factors])
        value = self._call(aten.permute.default, value, order)
        value = self._call(aten.reshape.default, value, [batch, -1, tokens])
        value = self._call(aten.sum.dim_IntList, value, [1])
        return self._call(toca.unit_scores.default, value)

    # -- graph ------------------------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, name: str) -> fx.Node:
        copy = self.graph.placeholder(name)
        copy.meta["val"] = value_of(node)
        return copy

    def _slot(self, kind: str, position: int) -> fx.Node:
        slot = Slot(kind, position)
        if slot not in self.slots:
            last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
            first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
            with self.graph.inserting_before(first) if first is not None else self.graph.inserting_after(last):
                self.slots[slot] = self.graph.placeholder(f"{kind}{position}")
        return self.slots[slot]

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)


def _dim(places: Sequence[Occurrence | None]) -> int:
    """The one dimension that holds these factors; −1 where there are none."""
    return places[0].dim if places and places[0] is not None else -1
