"""ToCa (Zou et al., ICLR 2025); FORA (Selvaraju et al., 2024), which is ToCa with no token recomputed; DuCa (Zou et
al., 2024), which takes turns between ToCa's steps and such that skip all blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, TypeVar

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import Count, Counting, Fraction, Kind, Number, OneOf, Seed, Weight
from toca_compile.ir.registry import register
from toca_compile.ir.selectors import ScoreName, Selector
from toca_compile.policies.composed import Composed
from toca_compile.policies.composition import Composition, Partial, Rule, Share, SkipBlocks
from toca_compile.policies.schedules import RatioSchedule
from toca_compile.policies.when import Every, IntervalFunction, Periodic, Slope, When, check_range

P = TypeVar("P", bound="ToCa")

SCHEDULES = ("toca", "constant", "periodic", "counter")
_COMPLEMENT = "; it is the share of tokens recomputed, and the paper's R (a percentage of tokens reused) its complement"
FreshRatio = Annotated[float, Number(0, 1, note=_COMPLEMENT)]

DDIM_RATIOS = RatioSchedule(layer=(0.8, 0.4), step=(3.0, -4.0), kinds={"mlp": 2.5, "self_attention": 0.0})
"""The published ratio schedule of DiT with DDIM-50: rises with depth and along denoising, nothing in attention."""


@register
@dataclass(frozen=True)
class ToCa(Composed):
    """Token-wise feature caching.

    Full steps compute and keep every site's output. Between them attention is reused and each site that is token-wise
    recomputes its K best tokens by S = s1 + λ3·s3 (+ the s4 bonus), K = floor(ratio · tokens).

    Args:
        num_steps: model calls of one run, T.
        interval: N, steps from one full step to the next (before the interval function bends it).
        fresh_ratio: ρ, the share of tokens recomputed on other steps; 0 reuses everything (FORA).
        schedule: when steps are full, after the ``warmup``.
            ``"toca"``: by the paper's interval function, bent by ``interval_slope`` (DiT, PixArt).
            ``"periodic"``: at multiples of the interval, which ``periods`` may set for each kind of site (OpenSora).
            ``"counter"``: after every interval − 1 other steps (FLUX).
            ``"constant"``: at multiples of the interval, and every site that can be partial gets ``fresh_ratio`` as it
            is; the others multiply it by ``ratios``.
        score: base score of a token. ``"attention"`` (s1): attention it received at the last full step; ``"entropy"``
            (s2): entropy of its row of cross-attention; ``"v_norm"``: 1 − ‖value‖; ``"k_norm"``: ‖key‖; ``"random"``;
            ``"none"``: age alone.
        staleness_weight: λ3, weight of the steps missed, over N.
        interval_slope: w of the interval function.
        sensitive: range of s/T in which the interval is ``sensitive_interval``.
        cell, bonus: s4: the best token of each cell × cell patch of the picture gets S·(1 + bonus).
        score_stride: ask every r-th query row for s1, an estimate.
        layer_span: divisor of the layer factor; by default the depth of the block's stack less one.
        ratios: layer, step and kind factors of the ratio; by default the published ones of DiT.
        seed: of the random score.
        count: how the published code counts s: ``"down"`` from T − 1 (DiT) or ``"up"`` from 0.
        warmup: how many first steps are full.
        periods: interval of each kind of site, where it is not ``interval`` (``schedule="periodic"``).
        shared_pair: the batch is a guidance pair, first half and second half: the scores of a token are the mean of
            both, so both halves recompute the same tokens. An odd batch is no pair.

    Raises:
        PolicyError: a number outside its range.
    """

    interval: Count = 3
    fresh_ratio: FreshRatio = 0.07
    schedule: Annotated[str, OneOf(SCHEDULES)] = "toca"
    score: ScoreName = "attention"
    staleness_weight: Weight = 0.25
    interval_slope: Slope = 0.4
    sensitive: tuple[Fraction, Fraction] = (0.2, 0.4)
    sensitive_interval: Count = 2
    cell: Count = 2
    bonus: Weight = 0.6
    score_stride: Count = 1
    layer_span: Count | None = None
    ratios: RatioSchedule = field(default=DDIM_RATIOS)
    seed: Seed = 0
    count: Counting = "down"
    warmup: Count = 1
    periods: Mapping[Kind, Count] = field(default_factory=dict)
    shared_pair: bool = False

    def check(self) -> None:
        check_range("sensitive", self.sensitive)
        if self.periods and self.schedule != "periodic":
            raise PolicyError(f"periods need schedule='periodic', not {self.schedule!r}")
        super().check()

    @property
    def when(self) -> When:
        """Which steps are full."""
        # FORA: the published code drops slope, sensitive range and warm-up together with the ratio.
        reuses = self.fresh_ratio == 0
        warmup = 1 if reuses else self.warmup
        if self.schedule == "counter":
            return Every(self.interval, warmup)
        if self.schedule != "toca":
            return Periodic(self.interval, warmup, self.periods)
        slope = 0.0 if reuses else self.interval_slope
        sensitive = (0.0, 0.0) if reuses else self.sensitive
        return IntervalFunction(self.interval, slope, sensitive, self.sensitive_interval, self.count, warmup)

    def parts(self) -> Composition:
        weight = self.staleness_weight / self.interval
        which = Selector(
            self.score, weight, self.cell, self.bonus, self.score_stride, self.seed, self.shared_pair
        )  # fmt: skip
        factors = RatioSchedule() if self.schedule == "constant" else self.ratios
        share = Share(self.fresh_ratio, factors, self.layer_span, self.count)
        return Composition(self.num_steps, self.when, (Rule(Partial()),), which=which, how_many=share)

    def for_run(self: P, num_steps: int, guided: bool) -> P:
        return replace(self, num_steps=num_steps, shared_pair=self.shared_pair and guided)


@register
@dataclass(frozen=True)
class DuCa(ToCa):
    """Dual feature caching: between full steps, at odd phases ToCa's (conservative), at even ones (aggressive) all
    blocks are skipped and the stream as it last left them goes to the final layer with the current conditioning.

    The phase is the counter modulo the interval in force (``schedule="toca"``), else the calls since the last full
    step. Settings are the published ones of DiT; see ``ToCa`` for what they mean.
    """

    fresh_ratio: FreshRatio = 0.05
    bonus: Weight = 0.8

    def parts(self) -> Composition:
        """ToCa's, with every second step skipped."""
        return replace(super().parts(), alternate=(Rule(SkipBlocks(residual=False)),))


@register
@dataclass(frozen=True)
class Fora(Composed):
    """FORA: full steps 0, N, 2N, …, and every site reused in between.

    Raises:
        PolicyError: ``num_steps`` or ``interval`` below 1.
    """

    interval: Count = 3

    def parts(self) -> Composition:
        return Composition(self.num_steps, Periodic(self.interval))
