"""Selectors: which tokens of a site a step computes, and what becomes of the others. One class a way to choose; others
ask it and never compare with it.

A selector is host data. What it does in a graph is its emission (``passes/variants/select.py``). A new one is a class
here or in a file of its own, and an emission.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

import torch

from toca_compile.ir.fields import Count, Family, OneOf, Seed, Weight
from toca_compile.ir.graph import value_of
from toca_compile.ir.registry import register
from toca_compile.ir.scores import SCORES, Score
from toca_compile.ir.types import AxisTypes, ScoreSource, Site

ScoreName = Annotated[str, OneOf(tuple(SCORES))]

S = TypeVar("S", bound="TokenSelector")


@dataclass(frozen=True)
class TokenSelector(Family):
    """How tokens are selected. The base class measures nothing, and leaves their number to the policy.

    What is measured of a site is kept from each step that computes all of it to the next, and read at the steps
    between, by the sites whose ``source`` it is.
    """

    @property
    def paired(self) -> bool:
        """Whether both halves of a batch, a guidance pair, select the same tokens."""
        return False

    @property
    def counts_steps(self) -> bool:
        """Whether it asks which step it is, and not only how long ago something was."""
        return True

    def source(self, site: Site) -> ScoreSource | None:
        """The site of which something is measured to select this site's tokens by; None where nothing is."""
        return None

    def measured(self, source: Site, types: AxisTypes) -> tuple[torch.Tensor, ...]:
        """Fake tensors of the buffers that hold what is measured of a source."""
        return ()

    def products(self, source: Site) -> int:
        """FLOPs of the products (as ``torch.utils.flop_counter`` counts them) by which a source is measured."""
        return 0

    def tokens(self, site: Site) -> int | None:
        """How many tokens of a site it selects; None where the policy says it."""
        return None

    def refused(self, site: Site) -> str | None:
        """Why it cannot select among a site's tokens; None where it can."""
        return None

    def misfit(self, sites: Sequence[Site]) -> str | None:
        """Why a policy that selects tokens of these sites by it cannot be meant; None where it can."""
        return None

    def doubts(self, sites: Sequence[Site]) -> list[str]:
        """What the user should know of a plan that selects tokens of these sites by it."""
        return []

    def for_run(self: S, guided: bool) -> S:
        """The same in a run with or without guidance."""
        return self


@register
@dataclass(frozen=True)
class Selector(TokenSelector):
    """By rank: the tokens that score highest (toca-compile's ``select_tokens``). Base score, weight of one missed step,
    and the bonus of the best token of each ``cell`` × ``cell`` patch. ``stride``: every how many-th query row is asked
    for the attention score. ``shared_pair``: the two halves of the batch select the same tokens."""

    score: ScoreName = "attention"
    weight: Weight = 0.0
    cell: Count = 1
    bonus: Weight = 0.0
    stride: Count = 1
    seed: Seed = 0
    shared_pair: bool = False

    @property
    def rule(self) -> Score:
        """The score itself."""
        return SCORES[self.score]

    @property
    def paired(self) -> bool:
        return self.shared_pair

    @property
    def counts_steps(self) -> bool:
        return self.rule.by_token is not None

    def source(self, site: Site) -> ScoreSource | None:
        return self.rule.source(site)

    def measured(self, source: Site, types: AxisTypes) -> tuple[torch.Tensor, ...]:
        return (by_token(source, types, types.factors.size(self.rule.tokens(source)), torch.float32),)

    def products(self, source: Site) -> int:
        """Of queries and keys, once more."""
        stride = self.rule.row_flops(self.stride)
        if stride is None or source.attention[-1].map is not None:
            return 0
        query, key = (value_of(n) for n in source.attention[-1].operands[:2])
        rows: int = -(-query.shape[-2] // stride)
        return 2 * (query.numel() // query.shape[-2]) * rows * int(key.shape[-2])

    def doubts(self, sites: Sequence[Site]) -> list[str]:
        by_age = [site for site in sites if self.rule.measured and self.source(site) is None]
        said = [f"no {self.rule.what} runs over the tokens of {s.name}: they are ranked by age alone" for s in by_age]
        if self.bonus and sites and all(s.axis.grid is None for s in sites):
            said.append(
                "neither the graph nor the inputs show how the tokens lie in a picture, so none gets the bonus of a "
                "grid cell: if they are one, say optimize(…, grid=(height, width)) in tokens; if not, take a policy "
                "with bonus=0"
            )
        return said

    def for_run(self, guided: bool) -> "Selector":
        # Without guidance the halves of a batch are unrelated pictures, which select tokens of their own.
        return replace(self, shared_pair=self.shared_pair and guided)


def by_token(site: Site, types: AxisTypes, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """A fake tensor ``[batch, tokens]`` where the site's output lies."""
    output: torch.Tensor = site.output.meta["val"]
    return output.new_empty([types.factors.size(site.batch), tokens], dtype=dtype)
