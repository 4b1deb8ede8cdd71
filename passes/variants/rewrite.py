"""Rewrite: one graph per template and combination of site modes.

``PARTIAL`` replaces a site's branch by its proven restriction to the selected tokens::

    y = M(f(x))                    idx  = toca.select_tokens(score, stamp, k, …)
    x = x + gate * y       →       rows = M(f(toca.gather_tokens(x, idx)))
                                   y    = toca.scatter_tokens_(cache, idx, rows)
                                   x    = x + gate * y

With ``QUERIES`` that goes through an attention: keys and values are those of all tokens, made now or (``KEPT``) from
the cache, where ``UPDATE`` first puts the selected tokens' new ones. ``REUSE`` replaces the branch by the cache,
``FORECAST`` by the cache moved along its differences; with ``PARTIAL`` that is for the tokens left out, and the cache
stays as it is. ``STORE``
computes it and keeps it; ``SCORE``, ``HOLD``, ``KEYS`` and ``DIFF`` also keep the tokens' scores, the values that the
partial steps to come take from the cache (the attention of a parallel block; keys and values), and the differences. The
gate stays outside, so it is always the current step's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

import toca_compile.ops  # noqa: F401  (defines the toca:: ops)
from toca_compile.errors import PassError, VerifyError
from toca_compile.ir.graph import operand_nodes, value_of
from toca_compile.ir.plan import OUTPUT_ONLY, CacheSpec, Selector
from toca_compile.ir.program import Mode, Segment, Slot, Variant
from toca_compile.ir.types import AxisTypes, RowProof, Site
from toca_compile.ir.verify import verify_kept
from toca_compile.passes.proof.prove import reads_whole
from toca_compile.passes.variants.measure_scores import can_measure_rows, entropy, measure
from toca_compile.passes.variants.needed import kept_slots, needed_nodes, proof_of
from toca_compile.passes.variants.restrict import Restriction, in_turn, place
from toca_compile.passes.variants.series import Series

toca = torch.ops.toca
aten = torch.ops.aten


def rewrite(
    segment: Segment,
    sites: Sequence[Site],
    modes: Sequence[Mode],
    types: AxisTypes,
    selector: Selector,
    memories: Sequence[CacheSpec] = (),
    *,
    dense: bool = False,
) -> Variant:
    """The variant of ``segment`` in which its sites act as ``modes`` says.

    ``memories``: what each site keeps (by default its output). ``dense``:
    compute a partial branch for all tokens and blend by mask, the plain meaning of the restriction.
    """
    memories = memories or [OUTPUT_ONLY] * len(sites)
    try:
        variant = _Rewriter(segment, sites, modes, types, selector, memories, dense).run()
        verify_kept(variant, kept_slots(sites, modes, memories))
    except (VerifyError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        told = ", ".join(f"{site.name} ({mode!r})" for site, mode in zip(sites, modes, strict=True))
        raise PassError(f"the rewriting of {told} failed: {error}") from error
    return variant


class _Rewriter:
    def __init__(
        self,
        segment: Segment,
        sites: Sequence[Site],
        modes: Sequence[Mode],
        types: AxisTypes,
        selector: Selector,
        memories: Sequence[CacheSpec],
        dense: bool,
    ) -> None:
        self.segment, self.sites, self.modes = segment, sites, modes
        self.types, self.selector, self.memories, self.dense = types, selector, memories, dense
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.slots: dict[Slot, fx.Node] = {}
        self.ends = {s.output: (i, s, m) for i, (s, m) in enumerate(zip(sites, modes, strict=True))}
        self.held = {
            node: (i, j, mode)
            for i, (site, mode) in enumerate(zip(sites, modes, strict=True))
            for j, node in enumerate(site.row_proof.stale_inputs if site.row_proof else ())
            if Mode.QUERIES not in mode
        }
        self.keys = [
            (node, Slot("keys", i, j))  # one value may be the keys of several sites (streams that attend jointly)
            for i, (site, mode) in enumerate(zip(sites, modes, strict=True))
            for j, node in enumerate(site.query_proof.dense_inputs if site.query_proof and Mode.KEYS in mode else ())
        ]

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
            self.env[node] = self._as(node, self._slot("held", at, index), at)
        elif Mode.REUSE in mode:
            self.env[node] = self._as(node, self._slot("cache", position), position)
        elif site is not None and Mode.PARTIAL in mode:
            self.env[node] = self._as(
                node, self._partial(site, position, mode), position, always=bool(mode & (Mode.TOKENS | Mode.FORECAST))
            )
        elif site is not None and Mode.FORECAST in mode:
            series = self._series(site, position, mode)
            value = series.forecast(series.age() if Mode.TOKENS in mode else None)
            self.env[node] = self._as(node, value, position, always=True)
        else:
            self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])
        if Mode.HOLD in holder:
            self._call(toca.store_.default, self._slot("held", at, index), self.env[node])
        for _, slot in (kept for kept in self.keys if kept[0] is node):
            self._call(toca.store_.default, self._slot(slot.kind, slot.position, slot.index), self.env[node])
        if site is None:
            return
        if Mode.SCORE in mode:
            self._call(toca.store_.default, self._slot("score", position), self._scores(site, position, mode))
        if Mode.STORE in mode:
            series = self._series(site, position, mode)
            age = series.age() if Mode.TOKENS in mode else None
            series.keep(self.env[node], differences=Mode.DIFF in mode, age=age)

    def _series(self, site: Site, position: int, mode: Mode) -> Series:
        tokens = self._place(site) if Mode.TOKENS in mode else None
        return Series(
            self._call, lambda kind, index: self._slot(kind, position, index), self.memories[position], tokens
        )  # fmt: skip

    def _place(self, site: Site) -> tuple[int, ...]:
        proof = site.row_proof or site.query_proof
        assert proof is not None
        return place(proof, site.output)

    def _scores(self, site: Site, position: int, mode: Mode) -> fx.Node:
        """The scores of all tokens at a step that computes them all, before anything of it is kept."""
        if self.selector.score != "error":
            return measure(self._call, self.env, site, self.selector, self.types)
        series = self._series(site, position, mode)
        expected = series.forecast(series.age() if Mode.TOKENS in mode else None)
        missed = self._call(aten.sub.Tensor, self.env[site.output], expected)
        return self._call(toca.token_norm.default, missed, *self._place(site))

    def _as(self, node: fx.Node, value: fx.Node, position: int, *, always: bool = False) -> fx.Node:
        """A kept value in the dtype of the one that it stands for."""
        dtype = value_of(node).dtype
        kept = self.memories[position].dtype or dtype
        return self._call(aten._to_copy.default, value, dtype=dtype) if always or kept != dtype else value

    # -- partial ----------------------------------------------------------------------------------------------------

    def _partial(self, site: Site, position: int, mode: Mode) -> fx.Node:
        proof, series = proof_of(site, mode), self._series(site, position, mode)
        age = series.age() if Mode.TOKENS in mode else None
        expected = series.forecast(age) if mode & (Mode.TOKENS | Mode.FORECAST) else None
        if expected is series.kept[0]:
            expected = self._call(aten._to_copy.default, expected)  # this step's alone: the cache stays as it is
        index = self._select(site, position)
        out = place(proof, site.output)
        whole, parts = self._whole(site, position, mode, index)
        if self.dense:
            values = dict(self.env)
            for node in self.segment.nodes:
                if node in (proof.rows if whole else {site.output}):
                    values[node] = self._with_whole(node, proof, values, whole)
            made = values[site.output]
        else:
            given = {site.source: self.env[site.source]}
            given |= {node: self._slot("held", position, n) for n, node in enumerate(proof.stale_inputs)}
            values = self._restriction(proof, position, index, whole).run(self.segment.nodes, given, parts)
            made = values[site.output]
        if expected is not None:
            rows = self._call(toca.gather_tokens.default, made, index, *out) if self.dense else made
            fresh = self._call(toca.scatter_tokens_.default, expected, index, rows, *out)
            if age is not None and Mode.FORECAST not in mode:
                series.keep_rows(rows, index, age)
        else:
            fresh = self._call(self._update, self._slot("cache", position), index, made, *out)
        if self.selector.score == "entropy" and can_measure_rows(site, proof):
            # The rows of the map that this step makes anew tell their tokens' scores anew.
            scores = entropy(self._call, {**self.env, **values, **whole}, site, self.selector, self.types)
            self._call(self._update, self._slot("score", position), index, scores, 1, 0)
        return fresh

    def _with_whole(
        self, node: fx.Node, proof: RowProof, values: Mapping[fx.Node, fx.Node], whole: Mapping[fx.Node, fx.Node]
    ) -> fx.Node:  # fmt: skip
        """An op of a branch for all tokens, given what it reads ``whole`` as a step on some of them is given it."""
        if node not in self.types.specs:
            return self.graph.node_copy(node, lambda n: values[n])
        reads = zip(operand_nodes(node), reads_whole(self.types, node, proof), strict=True)
        operands = [whole.get(o, values[o]) if all_of_it else values[o] for o, all_of_it in reads]
        return self.graph.node_copy(node, in_turn(operands, values))

    @property
    def _update(self) -> Any:
        """What puts new rows into a buffer."""
        return toca.blend_tokens_.default if self.dense else toca.scatter_tokens_.default

    def _restriction(
        self, proof: RowProof, position: int, index: fx.Node, whole: Mapping[fx.Node, fx.Node]
    ) -> Restriction:  # fmt: skip
        return Restriction(
            self._call, self.graph.node_copy, self.env, proof, self.types, index, lambda: self._slot("k", position),
            whole,
        )  # fmt: skip

    def _whole(
        self, site: Site, position: int, mode: Mode, index: fx.Node
    ) -> tuple[dict[fx.Node, fx.Node], list[Restriction]]:
        """What the branch reads whole (keys and values) from the cache, and the rows made to update it."""
        proof = proof_of(site, mode)
        if Mode.KEPT not in mode:
            return {}, []
        whole: dict[fx.Node, fx.Node] = {}
        parts: list[Restriction] = []
        for n, node in enumerate(proof.dense_inputs):
            kept = self._slot("keys", position, n)
            if Mode.UPDATE in mode:
                own = proof.updates[n]
                made = self.env.get(node)
                if not self.dense:
                    part = self._restriction(own, position, index, {})
                    made = part.run(self.segment.nodes, {site.source: self.env[site.source]}, parts)[node]
                    parts.append(part)
                kept = self._call(self._update, kept, index, made, *place(own, node))
            whole[node] = self._as(node, kept, position)
        return whole, parts

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
