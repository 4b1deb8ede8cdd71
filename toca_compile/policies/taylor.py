"""TaylorSeer (Liu et al., ICCV 2025): forecast a site's output from its differences between full steps; and the same
for the tokens that a step does not recompute."""

from dataclasses import dataclass
from typing import Annotated

from toca_compile.ir.actions import Keys
from toca_compile.ir.fields import Basis, Call, Count, Fraction, OneOf, Order, Seed, Weight
from toca_compile.ir.registry import register
from toca_compile.ir.selectors import ScoreName, Selector
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Forecast, Partial, Queries, Rule, Share
from toca_compile.policies.when import Bend, Every, Listed, Spread, When

ATTENTION = ("self_attention", "joint_attention", "parallel")


@register
@dataclass(frozen=True)
class TaylorSeer(Composed):
    """Full steps keep every site's output and its differences; between them each is forecast by a Taylor series.

    At a full step, d steps after the last, D⁰ = F and Dⁱ⁺¹ = (Dⁱ new − Dⁱ old) / d; x steps later the forecast is
    Σ Dⁱ·xⁱ/i! up to the order that the full steps so far allow (one more with each). Steps are counted in calls. Beyond
    order 1 that is no polynomial through the full steps; ``basis="newton"`` is: divided differences, and for xⁱ/i! the
    product of the distances to the last i full steps. It is exact on polynomials of degree ``order``.

    Args:
        num_steps: model calls of one run.
        interval: N: N − 1 forecast steps between two full ones.
        order: highest difference, 0 to 4; 0 is plain reuse.
        warmup: how many first steps are full. Differences are made from the last of them on.
        schedule: ``"counter"`` as published, or ``"spread"``: as many full steps (``num_steps`` / ``interval``), laid
            from the first to the last but one, so that no long forecast ends the run.
        bend: of ``"spread"``: 1 is even, less is denser towards the end of denoising.
        basis: ``"taylor"`` as published, or ``"newton"``.
        full: the full steps themselves as call indices, 0 among them, instead of ``interval`` and ``warmup``.

    Raises:
        PolicyError: a number outside its range.
    """

    interval: Count = 4
    order: Order = 2
    warmup: Count = 1
    schedule: Annotated[str, OneOf(("counter", "spread"))] = "counter"
    bend: Bend = 1.0
    basis: Basis = "taylor"
    full: tuple[Call, ...] = ()

    @property
    def when(self) -> When:
        """Which steps are full."""
        if self.full:
            return Listed(self.full)
        if self.schedule == "spread":
            return Spread(self.interval, self.bend, self.warmup)
        return Every(self.interval, self.warmup)

    def parts(self) -> Composition:
        return Composition(
            self.num_steps, self.when, (Rule(Forecast(self.order)),), basis=self.basis,
            differences_from=1 if self.full else max(1, self.warmup - 1),
        )  # fmt: skip


@register
@dataclass(frozen=True)
class TaylorToCa(Composed):
    """A forecast for the tokens left out, fresh values for the selected ones, whose differences are then updated: each
    token has a history of its own.

    MLPs and cross-attention recompute the selected tokens. Self-attention and joint attention forecast all of theirs,
    or with ``keys`` recompute those tokens' queries too (``Queries``).

    Args:
        num_steps, interval, order, warmup: as in ``TaylorSeer``.
        fresh_ratio: share of the tokens recomputed on other steps.
        score: how they are ranked: ``"error"`` by what the forecast missed of them at the last full step, or one of
            ``ToCa``'s.
        staleness_weight: of the steps that a token missed, over the interval.
        keys: ``"fresh"``, ``"update"`` or ``"keep"``; None: attention is forecast.
        mlp: whether MLPs recompute tokens.
        update: whether the new values are kept, with their differences; else they serve their step alone.
        seed: of the random score.

    Raises:
        PolicyError: a number outside its range.
    """

    interval: Count = 4
    order: Order = 2
    fresh_ratio: Fraction = 0.1
    score: ScoreName = "error"
    staleness_weight: Weight = 0.0
    keys: Keys | None = None
    mlp: bool = True
    update: bool = True
    warmup: Count = 1
    seed: Seed = 0

    def parts(self) -> Composition:
        attention = (
            (Rule(Queries(self.keys, order=self.order, update=self.update), kinds=ATTENTION),)
            if self.keys is not None
            else ()
        )
        rest = Rule(Partial(self.order, self.update) if self.mlp else Forecast(self.order))
        return Composition(
            self.num_steps, Every(self.interval, self.warmup), (*attention, rest),
            which=Selector(self.score, self.staleness_weight / self.interval, seed=self.seed),
            how_many=Share(self.fresh_ratio),
            differences_from=max(1, self.warmup - 1),
        )  # fmt: skip
