"""ToCa (Zou et al., ICLR 2025) and FORA (Selvaraju et al., 2024), which is ToCa with no token recomputed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from toca_compile.errors import PolicyError
from toca_compile.ir.plan import SCORES, Plan, Selector, SiteStep, StepPlan, step_kind
from toca_compile.ir.types import Action, Site
from toca_compile.policies.schedules import (
    RatioSchedule,
    check_whole,
    counted,
    counted_steps,
    periodic_steps,
    toca_steps,
)

SCHEDULES = ("toca", "constant", "periodic", "counter")

DDIM_RATIOS = RatioSchedule(layer=(0.8, 0.4), step=(3.0, -4.0), kinds={"mlp": 2.5, "self_attention": 0.0})
"""The published ratio schedule of DiT with DDIM-50: rises with depth and along denoising, nothing in attention."""


@dataclass(frozen=True)
class ToCa:
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

    num_steps: int = 50
    interval: int = 3
    fresh_ratio: float = 0.07
    schedule: str = "toca"
    score: str = "attention"
    staleness_weight: float = 0.25
    interval_slope: float = 0.4
    sensitive: tuple[float, float] = (0.2, 0.4)
    sensitive_interval: int = 2
    cell: int = 2
    bonus: float = 0.6
    score_stride: int = 1
    layer_span: int | None = None
    ratios: RatioSchedule = field(default=DDIM_RATIOS)
    seed: int = 0
    count: str = "down"
    warmup: int = 1
    periods: Mapping[str, int] = field(default_factory=dict)
    shared_pair: bool = False

    def __post_init__(self) -> None:
        check_whole("num_steps", self.num_steps)
        check_whole("interval", self.interval)
        check_whole("warmup", self.warmup)
        for kind, period in self.periods.items():
            check_whole(f"periods[{kind!r}]", period)
        check_whole("sensitive_interval", self.sensitive_interval)
        check_whole("cell", self.cell)
        check_whole("score_stride", self.score_stride)
        if not 0 <= self.fresh_ratio <= 1:
            raise PolicyError(
                f"fresh_ratio is the share of tokens recomputed and must lie in [0, 1], not {self.fresh_ratio}; "
                "the paper's R (a percentage of tokens reused) is its complement"
            )
        if self.schedule not in SCHEDULES:
            raise PolicyError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.periods and self.schedule != "periodic":
            raise PolicyError(f"periods need schedule='periodic', not {self.schedule!r}")
        if self.count not in ("down", "up"):
            raise PolicyError(f"count must be 'down' or 'up', not {self.count!r}")
        if self.score not in SCORES:
            raise PolicyError(f"score must be one of {', '.join(SCORES)}, not {self.score!r}")
        if not 0 <= self.sensitive[0] <= self.sensitive[1] <= 1:
            raise PolicyError(f"sensitive must be an increasing range within [0, 1], not {self.sensitive}")
        if not 0 <= self.interval_slope < 1:
            raise PolicyError(f"interval_slope must lie in [0, 1), not {self.interval_slope}")
        if self.layer_span is not None:
            check_whole("layer_span", self.layer_span)

    def full_steps(self, kind: str | None = None) -> tuple[int, ...]:
        """The full steps of a kind of site (or of those without a period of their own) as call indices, 0 first."""
        # FORA: the published code drops slope, sensitive range and warm-up together with the ratio.
        reuses = self.fresh_ratio == 0
        warmup = 1 if reuses else self.warmup
        if self.schedule == "counter":
            return counted_steps(self.num_steps, self.interval, warmup)
        if self.schedule != "toca":
            period = self.periods.get(kind, self.interval) if kind is not None else self.interval
            return periodic_steps(self.num_steps, period, warmup)
        slope = 0.0 if reuses else self.interval_slope
        sensitive = (0.0, 0.0) if reuses else self.sensitive
        full = toca_steps(self.num_steps, self.interval, slope, sensitive, self.sensitive_interval, self.count)
        calls = {counted(s, self.num_steps, self.count) for s in full}
        return tuple(sorted(calls | set(range(min(warmup, self.num_steps)))))

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """What each site does at each step, decided once for the whole step."""
        full = {kind: set(self.full_steps(kind)) for kind in {s.kind for s in sites}}
        steps = []
        for call in range(self.num_steps):
            rows = tuple(self._site(call, site, call in full[site.kind]) for site in sites)
            steps.append(StepPlan(step_kind(rows), rows))
        weight = self.staleness_weight / self.interval
        selector = Selector(
            self.score, weight, self.cell, self.bonus, self.score_stride, self.seed, self.shared_pair
        )  # fmt: skip
        return Plan(tuple(steps), selector)

    def _site(self, call: int, site: Site, full: bool) -> SiteStep:
        if full:
            return SiteStep(Action.COMPUTE, site.axis.size)
        ratios = RatioSchedule() if self.schedule == "constant" else self.ratios
        k = 0
        if Action.PARTIAL in site.actions:
            k = ratios.tokens(
                self.fresh_ratio, site.axis.size, kind=site.kind, depth=site.depth,
                span=self.layer_span or site.depths - 1, s=counted(call, self.num_steps, self.count),
                num_steps=self.num_steps,
            )  # fmt: skip
        # All tokens is the dense path: nothing to gather.
        return SiteStep(Action.REUSE if k == 0 else Action.COMPUTE if k == site.axis.size else Action.PARTIAL, k)


@dataclass(frozen=True)
class Fora:
    """FORA: full steps 0, N, 2N, …, and every site reused in between.

    Raises:
        PolicyError: ``num_steps`` or ``interval`` below 1.
    """

    num_steps: int = 50
    interval: int = 3

    def __post_init__(self) -> None:
        check_whole("num_steps", self.num_steps)
        check_whole("interval", self.interval)

    def plan(self, sites: tuple[Site, ...]) -> Plan:
        """As ToCa with nothing recomputed."""
        return ToCa(self.num_steps, self.interval, 0.0, schedule="constant", score="none").plan(sites)
