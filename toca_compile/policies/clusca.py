"""ClusCa (Zheng et al., ACM MM 2025, arXiv 2509.10312): tokens that are alike form clusters, one token of each cluster
is computed, and the others take a share of its value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from toca_compile.ir.fields import Count, Fraction, Order, Seed, Whole
from toca_compile.ir.graph import value_of
from toca_compile.ir.registry import register
from toca_compile.ir.selectors import TokenSelector, by_token
from toca_compile.ir.types import AxisTypes, ScoreSource, Site
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Partial, Rule
from toca_compile.policies.when import Every

ClusterCount = Annotated[int, Whole(2, 4096)]
Rounds = Annotated[int, Whole(1, 32)]


@register
@dataclass(frozen=True)
class Clusters(TokenSelector):
    """One token of each cluster, drawn anew for each step and site. ``clusters``: how many; ``gamma``: the share of its
    value that the others take; ``rounds`` of k-means, at each step that computes all, on what enters the site."""

    clusters: ClusterCount = 16
    gamma: Fraction = 0.005
    rounds: Rounds = 5
    seed: Seed = 0

    def source(self, site: Site) -> ScoreSource | None:
        return ScoreSource(site.index)

    def measured(self, source: Site, types: AxisTypes) -> tuple[torch.Tensor, ...]:
        return (by_token(source, types, source.axis.size, torch.int32),)

    def products(self, source: Site) -> int:
        """Of tokens and centres in each round, and of tokens and clusters for the new centres between two."""
        return 2 * value_of(source.source).numel() * self.clusters * (2 * self.rounds - 1)

    def tokens(self, site: Site) -> int | None:
        # No cluster can be of less than a token: as few tokens as that are all computed.
        return min(self.clusters, site.axis.size)

    def refused(self, site: Site) -> str | None:
        size = site.axis.size
        return f"has {size} tokens, which {self.clusters} clusters do not divide" if self.clusters >= size else None

    def misfit(self, sites: Sequence[Site]) -> str | None:
        most = max((site.axis.size for site in sites), default=None)
        # Another graph of the model may have more tokens.
        if most is None or self.clusters < most or any(site.fragment for site in sites):
            return None
        return f"clusters={self.clusters} would be all tokens: the sites that can compute some have {most} at most"


@register
@dataclass(frozen=True)
class ClusCa(Composed):
    """Cluster-driven feature caching.

    Full steps compute and keep every site's output with its differences, and sort each site's tokens into K clusters by
    k-means. Between them every token is forecast as in ``TaylorSeer``; then, in each site that is token-wise, one token
    i(c) of each cluster c is computed, and the other tokens of the cluster take a share of its value:

        y_j ← γ · y_i(c) + (1 − γ) · y_j

    What becomes of attention is a forecast alone.

    Each site's clusters are of what enters it; the published code takes those of what leaves the last block for all
    sites, finds them by |·|₁ and iterates until nothing changes. It also adds the forecast's motion to values that were
    just computed; here a computed token is what was computed.

    Args:
        num_steps: model calls of one run.
        interval: N, steps from one full step to the next.
        clusters: K, of each sample's tokens; a site of no more tokens than that (a short text) computes all.
        gamma: γ; 0 leaves the others as they are forecast.
        order: of the forecast; 0 reuses.
        update: whether new values are kept, a computed token's with differences of its own; else they serve their step
            alone.
        warmup: how many first steps are full.
        rounds: of k-means.
        seed: of the tokens that begin the clusters, and of those that are computed.

    Raises:
        PolicyError: a number outside its range; or, from ``plan``, no site has more tokens than clusters.
    """

    interval: Count = 5
    clusters: ClusterCount = 16
    gamma: Fraction = 0.005
    order: Order = 1
    update: bool = True
    warmup: Count = 2
    rounds: Rounds = 5
    seed: Seed = 0

    def parts(self) -> Composition:
        return Composition(
            self.num_steps, Every(self.interval, self.warmup), (Rule(Partial(self.order, self.update)),),
            which=Clusters(self.clusters, self.gamma, self.rounds, self.seed),
            differences_from=max(1, self.warmup - 1),
        )  # fmt: skip
