"""Rewrite: one graph per template and combination of site modes.

``PARTIAL`` replaces a site's branch by its proven restriction to the selected tokens::

    y = M(f(x))                    idx  = toca.select_tokens(score, stamp, k, …)
    x = x + gate * y       →       rows = M(f(toca.gather_tokens(x, idx)))
                                   y    = toca.scatter_tokens_(cache, idx, rows)
                                   x    = x + gate * y

``REUSE`` replaces it by the cache, ``FORECAST`` by the cache moved along its differences. ``STORE`` computes it and
keeps it; ``SCORE``, ``HOLD`` and ``DIFF`` also keep the tokens' scores, the values that the partial steps to come take
from the cache (the attention of a parallel block), and the differences. The gate stays outside, so it is always the
current step's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

import toca_compile.ir.ops  # noqa: F401  (defines the toca:: ops)
from toca_compile.ir.graph import value_of
from toca_compile.ir.plan import OUTPUT_ONLY, Memory, Selector
from toca_compile.ir.program import Mode, Segment, Slot, Variant
from toca_compile.ir.types import AxisTypes, Site
from toca_compile.passes.measure_scores import entropy, measure
from toca_compile.passes.restrict import Restriction, place

toca = torch.ops.toca
aten = torch.ops.aten


def rewrite(
    segment: Segment,
    sites: Sequence[Site],
    modes: Sequence[Mode],
    types: AxisTypes,
    selector: Selector,
    memory: Memory = OUTPUT_ONLY,
    *,
    dense: bool = False,
) -> Variant:
    """The variant of ``segment`` in which its sites act as ``modes`` says.

    ``dense``: compute a partial branch for all tokens and blend by mask, the plain meaning of the restriction.
    """
    return _Rewriter(segment, sites, modes, types, selector, memory, dense).run()


def needed_nodes(
    segment: Segment, sites: Sequence[Site], modes: Sequence[Mode], *, dense: bool = False
) -> set[fx.Node]:
    """The nodes computed for all tokens. A reused branch needs none of its own, a partial one those that its rows are
    gathered from."""
    ends = {s.output: (s, m) for s, m in zip(sites, modes, strict=True)}
    held = {n for s, m in zip(sites, modes, strict=True) if Mode.PARTIAL in m and s.carry for n in s.carry.held}
    needed: set[fx.Node] = set()
    todo = [*segment.outputs, *(s.add for s in sites)]
    inside = set(segment.nodes)
    while todo:
        node = todo.pop()
        if node in needed or node not in inside:
            continue
        needed.add(node)
        site, mode = ends.get(node, (None, Mode.PLAIN))
        if mode & (Mode.REUSE | Mode.FORECAST) or node in held:
            continue
        if site is not None and site.carry is not None and Mode.PARTIAL in mode and not dense:
            inner = {*site.carry.rows, *site.carry.held}
            todo += [i for n in site.carry.rows for i in n.all_input_nodes if i not in inner]
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
        memory: Memory,
        dense: bool,
    ) -> None:
        self.segment, self.sites, self.modes = segment, sites, modes
        self.types, self.selector, self.memory, self.dense = types, selector, memory, dense
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.slots: dict[Slot, fx.Node] = {}
        self.ends = {s.output: (i, s, m) for i, (s, m) in enumerate(zip(sites, modes, strict=True))}
        self.held = {
            node: (i, j, mode)
            for i, (site, mode) in enumerate(zip(sites, modes, strict=True))
            for j, node in enumerate(site.carry.held if site.carry else ())
        }

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
        at, index, holder = self.held.get(node, (0, 0, Mode.PLAIN))
        if Mode.PARTIAL in holder:
            self.env[node] = self._as(node, self._slot("held", at, index))
        elif Mode.REUSE in mode:
            self.env[node] = self._as(node, self._slot("cache", position))
        elif Mode.FORECAST in mode:
            value = self._slot("cache", position)
            for order in range(1, self.memory.order + 1):
                terms = (self._slot("diff", position, order), self._slot("power", position, order))
                value = self._call(toca.forecast.default, value, *terms, order if self.memory.basis == "taylor" else 0)
            self.env[node] = self._as(node, value, always=True)
        elif site is not None and Mode.PARTIAL in mode:
            self.env[node] = self._as(node, self._partial(site, position))
        else:
            self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])
        if Mode.HOLD in holder:
            self._call(toca.store_.default, self._slot("held", at, index), self.env[node])
        if Mode.DIFF in mode:
            self._differences(node, position)
        if Mode.STORE in mode:
            self._call(toca.store_.default, self._slot("cache", position), self.env[node])
        if site is not None and Mode.SCORE in mode:
            scores = measure(self._call, self.env, site, self.selector, self.types)
            self._call(toca.store_.default, self._slot("score", position), scores)

    def _differences(self, node: fx.Node, position: int) -> None:
        """Each difference from the one below it, new and old."""
        slots = [self._slot("cache", position)]
        slots += [self._slot("diff", position, i) for i in range(1, self.memory.order + 1)]
        value, fresh = self.env[node], []
        for order, old in enumerate(slots[:-1], 1):
            value = self._call(toca.difference.default, value, old, self._slot("spacing", position, order))
            fresh.append(value)
        for slot, value in zip(slots[1:], fresh, strict=True):
            self._call(toca.store_.default, slot, value)

    def _as(self, node: fx.Node, value: fx.Node, *, always: bool = False) -> fx.Node:
        """A kept value in the dtype of the one that it stands for."""
        dtype = value_of(node).dtype
        kept = self.memory.dtype or dtype
        return self._call(aten._to_copy.default, value, dtype=dtype) if always or kept != dtype else value

    # -- partial ----------------------------------------------------------------------------------------------------

    def _partial(self, site: Site, position: int) -> fx.Node:
        assert site.carry is not None
        index = self._select(site, position)
        cache = self._slot("cache", position)
        out = place(site.carry, site.output)
        if self.dense:
            values = self.env
            dense = self.graph.node_copy(site.output, lambda n: self.env[n])
            fresh = self._call(toca.blend_tokens_.default, cache, index, dense, *out)
        else:
            given = {site.source: self.env[site.source]}
            given |= {node: self._slot("held", position, n) for n, node in enumerate(site.carry.held)}
            values = Restriction(
                self._call, self.graph.node_copy, self.env, site.carry, self.types, index,
                lambda: self._slot("k", position),
            ).run(self.segment.nodes, given)  # fmt: skip
            fresh = self._call(toca.scatter_tokens_.default, cache, index, values[site.output], *out)
        if self.selector.score == "entropy" and site.by_queries is not None and site.by_queries.site == site.index:
            # The rows of the map that this step makes anew tell their tokens' scores anew.
            scores = entropy(self._call, {**self.env, **values}, site, self.selector, self.types)
            update = toca.blend_tokens_.default if self.dense else toca.scatter_tokens_.default
            self._call(update, self._slot("score", position), index, scores, 1, 0)
        return fresh

    def _select(self, site: Site, position: int) -> fx.Node:
        stamp, step = self._slot("stamp", position), self._slot("step", position)
        scorer = site.scorer(self.selector.score)
        if self.selector.score == "random":
            args = (stamp, step, self._slot("site", position), self.selector.seed)
            base = self._call(toca.random_scores.default, *args)
        elif self.selector.score == "none" or scorer is None:
            base = self._call(aten.zeros_like.default, stamp)
            base = self._call(aten._to_copy.default, base, dtype=torch.float32)
        else:
            # One buffer must be one input, or the order of its writes and reads is lost.
            owner = next((i for i, s in enumerate(self.sites) if s.index == scorer.site), None)
            base = self._slot("scores of", position) if owner is None else self._slot("score", owner)
            if scorer.window is not None:
                # The attention runs over more than these tokens.
                base = self._call(aten.slice.Tensor, base, 1, *scorer.window)
            base = self._call(toca.unit_scores.default, base)
        axis = site.axis
        grid = [*axis.grid, axis.offset, axis.frames] if axis.grid and self.selector.bonus else []
        index = self._call(
            toca.select_tokens.default, base, stamp, self._slot("k", position), step, self._slot("since", position),
            self.selector.weight, grid, self.selector.cell, self.selector.bonus,
        )  # fmt: skip
        self._call(toca.mark_fresh_.default, stamp, index, step)
        return index

    # -- graph ------------------------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, name: str) -> fx.Node:
        copy = self.graph.placeholder(name)
        copy.meta["val"] = value_of(node)
        return copy

    def _slot(self, kind: str, position: int, index: int = 0) -> fx.Node:
        slot = Slot(kind, position, index)
        if slot not in self.slots:
            last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
            first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
            with self.graph.inserting_before(first) if first is not None else self.graph.inserting_after(last):
                name = f"{kind.replace(' ', '_')}{position}" + (f"_{index}" if index else "")
                self.slots[slot] = self.graph.placeholder(name)
        return self.slots[slot]

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)
