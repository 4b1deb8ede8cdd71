"""The emission of clusters: found among the rows that enter a site, at steps that compute all of it::

cluster = cluster_tokens(x, order, …)                                  at a step that computes all
index = pick_tokens(cluster, order, …); y[index] = M(f(x[index]))      at one that computes some
y += γ · (y[proxies(cluster, index)] − y)
"""

from collections.abc import Callable, Sequence

import torch
from torch import fx

from toca_compile.ir.state import Number, State
from toca_compile.ir.types import Site
from toca_compile.passes.variants.emit import SegmentBuilder
from toca_compile.passes.variants.restrict import place
from toca_compile.passes.variants.select import SELECTIONS, Selection
from toca_compile.policies.clusca import Clusters

toca = torch.ops.toca


@SELECTIONS.of(Clusters)
class Clustered(Selection):
    """One token of each cluster, at random."""

    def __init__(self, builder: SegmentBuilder, position: int, site: Site) -> None:
        super().__init__(builder, position, site)
        assert isinstance(builder.selector, Clusters)
        self.selector = builder.selector

    def measure(self, expected: Callable[[], fx.Node]) -> Sequence[fx.Node]:
        proof = self.site.row_proof or self.site.query_proof
        assert proof is not None
        # The same tokens begin the clusters of each full step, so that these change little from one to the next.
        order = self._order(self.builder.slot(State.SCORE, self.position), 0)
        x, how = self.builder.env[self.site.source], (self.selector.clusters, self.selector.rounds)
        return [self.builder.call(toca.cluster_tokens.default, x, order, *how, *place(proof, self.site.source))]

    def choose(self) -> fx.Node:
        order = self._order(self.source(), self.builder.slot(Number.STEP, self.position))
        k = self.builder.slot(Number.K, self.position)
        return self.builder.call(toca.pick_tokens.default, self.source(), order, self.selector.clusters, k)

    def spread(self, value: fx.Node, index: fx.Node, places: Sequence[int]) -> fx.Node | None:
        if not self.selector.gamma:
            return None
        proxy = self.builder.call(toca.proxies.default, self.source(), index, self.selector.clusters)
        return self.builder.call(toca.drawn_to.default, value, proxy, self.selector.gamma, *places)

    def _order(self, like: fx.Node, step: fx.Node | int) -> fx.Node:
        site = self.builder.slot(Number.SITE, self.position)
        return self.builder.call(toca.random_scores.default, like, step, site, self.selector.seed)
