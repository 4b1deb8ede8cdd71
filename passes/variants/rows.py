"""The emission of actions that compute a branch for selected tokens.

Keys and values that the rows read are those of all tokens, made now or from the cache, where the selected tokens' part
may first be made anew. The tokens left out are those of the cache, or of its forecast: then the cache stays as it is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from toca_compile.ir.actions import Selecting
from toca_compile.ir.graph import operand_nodes
from toca_compile.ir.program import Form
from toca_compile.ir.state import Number, State
from toca_compile.ir.types import RowProof, Site
from toca_compile.passes.proof.layout import reads_whole
from toca_compile.passes.variants.compute import EMISSIONS, site_series
from toca_compile.passes.variants.emit import SegmentBuilder
from toca_compile.passes.variants.restrict import Restriction, in_turn, place
from toca_compile.passes.variants.select import selection_of

toca = torch.ops.toca
aten = torch.ops.aten


@EMISSIONS.of(Selecting)
def rows(builder: SegmentBuilder, position: int, site: Site, form: Form) -> None:
    """Selected tokens computed, the others from the cache."""
    _Rows(builder, position, site, form).emit()


class _Rows:
    def __init__(self, builder: SegmentBuilder, position: int, site: Site, form: Form) -> None:
        assert isinstance(form.action, Selecting)
        proof = form.action.proof(site)
        assert proof is not None
        self.builder, self.position, self.site, self.form = builder, position, site, form
        self.action, self.proof = form.action, proof

    def emit(self) -> None:
        builder, site, out = self.builder, self.site, place(self.proof, self.site.output)
        series = site_series(builder, self.position, site, self.form)
        age = series.age()
        alone = not self.action.update  # the new values serve this step only
        moved = series.forecast(age) if self.form.keep.by_token or alone else None
        if moved is series.output:
            moved = builder.call(aten._to_copy.default, moved)  # the cache stays as it is
        selection = selection_of(builder, self.position, site)
        index = selection.select()
        whole, parts = self._whole(index)
        values = self._dense_values(whole) if builder.dense else self._row_values(index, whole, parts)
        made = values[site.output]
        if moved is None:
            kept = builder.slot(State.OUTPUT, self.position)
            fresh = builder.call(self._update, kept, index, made, *out)
        else:
            made = builder.call(toca.gather_tokens.default, made, index, *out) if builder.dense else made
            fresh = builder.call(toca.scatter_tokens_.default, moved, index, made, *out)
            if age is not None and not alone:
                series.keep_rows(made, index, age)
        change = selection.spread(fresh, index, out)
        if change is not None:
            fresh = builder.call(toca.shift_.default, fresh, change)
            if moved is not None and not alone:
                builder.call(toca.shift_.default, series.output, change)
        # What this step computes of them may tell anew what its tokens are selected by.
        for i, told in enumerate(selection.measure_rows(self.proof, {**builder.env, **values, **whole})):
            builder.call(self._update, builder.slot(State.SCORE, self.position, i), index, selection.agreed(told), 1, 0)
        if moved is None:
            builder.env[site.output] = builder.as_made(site.output, fresh, self.position)
        else:
            builder.env[site.output] = builder.cast(fresh, site.output)

    def _row_values(
        self, index: fx.Node, whole: Mapping[fx.Node, fx.Node], parts: list[Restriction]
    ) -> Mapping[fx.Node, fx.Node]:
        """The branch's values on the rows."""
        given = {self.site.source: self.builder.env[self.site.source]}
        stale = enumerate(self.action.stale(self.site))
        given |= {node: self.builder.slot(State.STALE_INPUT, self.position, n) for n, node in stale}
        return self._restriction(self.proof, index, whole).run(self.builder.segment.nodes, given, parts)

    def _dense_values(self, whole: Mapping[fx.Node, fx.Node]) -> Mapping[fx.Node, fx.Node]:
        """The branch's values for all tokens, given what it reads ``whole`` as a step on some of them is given it."""
        values = dict(self.builder.env)
        for node in self.builder.segment.nodes:
            if node in (self.proof.rows if whole else {self.site.output}):
                values[node] = self._with_whole(node, values, whole)
        return values

    def _with_whole(
        self, node: fx.Node, values: Mapping[fx.Node, fx.Node], whole: Mapping[fx.Node, fx.Node]
    ) -> fx.Node:
        types = self.builder.types
        if node not in types.specs:
            return self.builder.copy(node, values)
        reads = zip(operand_nodes(node), reads_whole(types, node, self.proof), strict=True)
        operands = [whole.get(o, values[o]) if all_of_it else values[o] for o, all_of_it in reads]
        return self.builder.graph.node_copy(node, in_turn(operands, values))

    @property
    def _update(self) -> Any:
        """What puts new rows into a buffer."""
        return toca.blend_tokens_.default if self.builder.dense else toca.scatter_tokens_.default

    def _restriction(self, proof: RowProof, index: fx.Node, whole: Mapping[fx.Node, fx.Node]) -> Restriction:
        return Restriction(self.builder, proof, index, lambda: self.builder.slot(Number.K, self.position), whole)

    def _whole(self, index: fx.Node) -> tuple[dict[fx.Node, fx.Node], list[Restriction]]:
        """What the branch reads whole (keys and values) from the cache, and the rows made to update it."""
        builder, taken = self.builder, self.action.from_cache(self.site)
        whole: dict[fx.Node, fx.Node] = {}
        parts: list[Restriction] = []
        for n, node in enumerate(self.proof.dense_inputs):
            if node not in taken:
                continue
            kept = builder.slot(State.KEYS, self.position, n)
            if self.action.updates_keys:
                own = self.proof.updates[n]
                made = builder.env.get(node)
                if not builder.dense:
                    part = self._restriction(own, index, {})
                    given = {self.site.source: builder.env[self.site.source]}
                    made = part.run(builder.segment.nodes, given, parts)[node]
                    parts.append(part)
                kept = builder.call(self._update, kept, index, made, *place(own, node))
            whole[node] = builder.as_made(node, kept, self.position)
        return whole, parts
