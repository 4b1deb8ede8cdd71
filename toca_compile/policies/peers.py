"""The settings of other libraries, read as policies: one class a configuration, under its own name there and with its
own fields and defaults. A field that has no counterpart is taken at its default alone, so that a policy read here does
what it did there; ``examples/coming_from.md`` tells the differences that remain."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import (
    MAX_STEPS,
    Checked,
    Count,
    DtypeName,
    Fraction,
    Natural,
    Number,
    OneOf,
    Order,
    Steps,
    Threshold,
    Weight,
    Whole,
    accept,
    told,
)
from toca_compile.ir.plan import Policy
from toca_compile.policies.block_cache import BlockCache
from toca_compile.policies.composition import Composition, Compute, Forecast, Rule, SkipBlocks
from toca_compile.policies.magcache import MagCache, Ratio
from toca_compile.policies.presets import preset
from toca_compile.policies.schedules import RatioSchedule
from toca_compile.policies.storage import from_data
from toca_compile.policies.taylor import ATTENTION, TaylorSeer
from toca_compile.policies.when import Every, Listed

AnyOr = Annotated[int, Whole(-1, MAX_STEPS)]  # −1 says: without a limit


@dataclass(frozen=True)
class Peer(Checked):
    """Base of a configuration of another library."""

    without: ClassVar[Mapping[str, str]] = {}
    """Fields without a counterpart, and what to write instead."""

    def check(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in self.without and getattr(self, field.name) != field.default:
                raise PolicyError(
                    f"{field.name} has no counterpart here and must be {field.default!r}, not "
                    f"{told(getattr(self, field.name))}; {self.without[field.name]}"
                )

    def policy(self, num_steps: int) -> Policy:
        """What means the same here."""
        raise NotImplementedError


@dataclass(frozen=True)
class FirstBlockCacheConfig(Peer):
    """diffusers' FirstBlockCache."""

    threshold: Threshold = 0.05

    def policy(self, num_steps: int) -> Policy:
        return BlockCache(num_steps, first=1, threshold=self.threshold)


@dataclass(frozen=True)
class TaylorSeerCacheConfig(Peer):
    """diffusers' TaylorSeer, which forecasts attention alone."""

    cache_interval: Count = 5
    disable_cache_before_step: Count = 3
    disable_cache_after_step: Natural | None = None
    max_order: Order = 1
    taylor_factors_dtype: DtypeName | None = "bfloat16"
    skip_predict_identifiers: Any = None
    cache_identifiers: Any = None
    use_lite_mode: bool = False

    without: ClassVar[Mapping[str, str]] = {
        "disable_cache_after_step": "Composition(when=Listed(…)) lists the full steps",
        "skip_predict_identifiers": "a Composition's rules choose sites by kind and depth",
        "cache_identifiers": "a Composition's rules choose sites by kind and depth",
        "use_lite_mode": "BlockCache(first=0, order=1) forecasts what all blocks add to the stream",
    }

    def policy(self, num_steps: int) -> Policy:
        # There the first full step after the warm-up comes after one other step, whatever the interval.
        sooner = max(self.cache_interval - 2, 0)
        rules = (Rule(Forecast(self.max_order), kinds=(*ATTENTION, "cross_attention")), Rule(Compute()))
        when = Every(self.cache_interval, self.disable_cache_before_step, sooner)
        return Composition(num_steps, when, rules, cache_dtype=self.taylor_factors_dtype)


@dataclass(frozen=True)
class MagCacheConfig(Peer):
    """diffusers' MagCache."""

    threshold: Annotated[float, Number(0, 1e6)] = 0.24
    max_skip_steps: Natural = 5
    retention_ratio: Fraction = 0.1
    mag_ratios: tuple[Ratio, ...] | None = None
    calibrate: bool = False

    without: ClassVar[Mapping[str, str]] = {
        "calibrate": "toca_compile.magnitudes(model, sampler) measures mag_ratios",
    }

    def check(self) -> None:
        super().check()
        if not self.mag_ratios:
            raise PolicyError("mag_ratios must be given: toca_compile.magnitudes(model, sampler) measures them")

    def policy(self, num_steps: int) -> Policy:
        return MagCache(num_steps, self.mag_ratios or (), self.threshold, self.max_skip_steps, self.retention_ratio)


@dataclass(frozen=True)
class DBCacheConfig(Peer):
    """cache-dit's DBCache with its Taylor calibrator, as ``load_configs`` reads it."""

    cache_type: Annotated[str, OneOf(("DBCache",))] = "DBCache"
    Fn_compute_blocks: Natural = 8
    Bn_compute_blocks: Natural = 0
    residual_diff_threshold: Threshold = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: Natural = 8
    warmup_interval: Count = 1
    max_cached_steps: AnyOr = -1
    max_continuous_cached_steps: AnyOr = -1
    enable_separate_cfg: bool | None = None  # what the two halves of guidance are is found out here
    cfg_compute_first: bool = False
    cfg_diff_compute_separate: bool = True
    steps_computation_mask: tuple[Annotated[int, Whole(0, 1)], ...] | None = None
    steps_computation_policy: Annotated[str, OneOf(("dynamic", "static"))] = "dynamic"
    force_refresh_step_hint: Natural | None = None
    force_refresh_step_policy: str = "once"
    enable_taylorseer: bool = False
    enable_encoder_taylorseer: bool = False
    taylorseer_order: Order = 1
    enable_dmd: bool = False
    enable_foca: bool = False

    without: ClassVar[Mapping[str, str]] = {
        "max_accumulated_residual_diff_threshold": "residual_diff_threshold and max_continuous_cached_steps bound it",
        "warmup_interval": "steps_computation_mask lists the computed steps",
        "max_cached_steps": "steps_computation_mask lists the computed steps",
        "force_refresh_step_hint": "opt.reset() begins a new run",
        "enable_dmd": "SkipBlocks(do=Anchors(Dmd(), 6)) in a Composition does it",
        "enable_foca": "SkipBlocks(do=Anchors(Foca(), 3)) in a Composition does it",
    }

    def check(self) -> None:
        super().check()
        if self.steps_computation_mask is not None and self.steps_computation_policy == "dynamic":
            raise PolicyError(
                "steps_computation_policy must be 'static' beside a steps_computation_mask: here a test at run time or "
                "a list decides, not both"
            )

    def policy(self, num_steps: int) -> Policy:
        order = self.taylorseer_order if self.enable_taylorseer else 0
        first, last = self.Fn_compute_blocks, self.Bn_compute_blocks
        if self.steps_computation_mask is not None:
            full = tuple(i for i, computed in enumerate(self.steps_computation_mask) if computed)
            skip = SkipBlocks(first, last, order=order)
            return Composition(len(self.steps_computation_mask), Listed(full), (Rule(skip),))
        limit = self.max_continuous_cached_steps if self.max_continuous_cached_steps > 0 else None
        if self.max_continuous_cached_steps == 0:
            raise PolicyError("max_continuous_cached_steps = 0 caches nothing: FullCompute() says so")
        warmup = max(self.max_warmup_steps, 1)
        return BlockCache(
            num_steps, first, last, threshold=self.residual_diff_threshold, warmup=warmup, limit=limit, order=order
        )  # fmt: skip


@dataclass(frozen=True)
class ToCaArguments(Peer):
    """The command line of ToCa's DiT and PixArt code; the ratio schedule says which recipe is meant."""

    fresh_threshold: Count = 3
    fresh_ratio: Fraction = 0.07
    ratio_scheduler: Annotated[str, OneOf(("ToCa-ddim50", "ToCa-ddpm250", "ToCa", "constant"))] = "ToCa-ddim50"
    soft_fresh_weight: Weight = 0.25
    force_fresh: Annotated[str, OneOf(("global",))] = "global"
    cache_type: Annotated[str, OneOf(("attention", "random"))] = "attention"
    ddim_sample: bool = True

    def policy(self, num_steps: int) -> Policy:
        recipes = {"ToCa-ddpm250": "dit-xl-2/ddpm-250", "ToCa": "pixart-alpha/dpm-20"}
        changes: dict[str, Any] = {} if self.cache_type == "attention" else {"score": self.cache_type}
        if self.ratio_scheduler == "constant":
            changes["ratios"] = RatioSchedule()
        return preset(
            recipes.get(self.ratio_scheduler, "dit-xl-2/ddim-50"), num_steps=num_steps, interval=self.fresh_threshold,
            fresh_ratio=self.fresh_ratio, staleness_weight=self.soft_fresh_weight, **changes,
        )  # fmt: skip


@dataclass(frozen=True)
class TaylorSeerArguments(Peer):
    """The command line of TaylorSeer's code."""

    interval: Count = 4
    max_order: Order = 4
    first_enhance: Count = 2

    def policy(self, num_steps: int) -> Policy:
        return TaylorSeer(num_steps, self.interval, self.max_order, warmup=self.first_enhance)


PEERS: tuple[type[Peer], ...] = (
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
    MagCacheConfig,
    DBCacheConfig,
    ToCaArguments,
    TaylorSeerArguments,
)
_NUM_STEPS = ("num_inference_steps", "num_sampling_steps", "num_steps")
_NEAREST = {
    "PyramidAttentionBroadcastConfig": "Composition(when=Periodic(2), rules=(Rule(Compute(), kinds=('mlp',)),)) reuses "
    "attention at every second step, whatever the timestep",
    "FasterCacheConfig": "a level, such as 'balanced', forecasts what all blocks add; a Composition with Periodic(2) "
    "and Rule(Compute(), kinds=('mlp',)) reuses attention at every second step",
    "SeaCacheConfig": "SeaCache(threshold=…, power=…, warmup=…, limit=…, order=…) filters what the first block is "
    "given, and knows step, σ and number of steps by itself",
}


def from_dict(given: Mapping[str, Any]) -> Policy:
    """A policy from plain data: what ``save_policy`` writes (``{"policy": "ToCa", "num_steps": 50}``), or the fields of
    another library's configuration under their own names: diffusers' ``FirstBlockCacheConfig`` and
    ``TaylorSeerCacheConfig``, cache-dit's ``DBCacheConfig`` (also within ``cache_config``), the command lines of the
    published ToCa and TaylorSeer code. ``num_inference_steps`` may stand beside them; in a pipeline its own number of
    steps takes its place.

    Raises:
        PolicyError: no configuration has these fields, or one has no counterpart here.
    """
    if not isinstance(given, Mapping) or "policy" in given:
        return from_data(given)
    fields = {str(key).lstrip("-").replace("-", "_"): value for key, value in given.items()}
    if set(fields) == {"cache_config"} and isinstance(fields["cache_config"], Mapping):
        return from_dict(fields["cache_config"])
    fields, steps = _without_steps(fields)
    fitting = [peer for peer in PEERS if fields and fields.keys() <= _defaults(peer).keys()]
    if not fitting:
        known = max(PEERS, key=lambda peer: len(fields.keys() & _defaults(peer).keys()))
        strange = [name for name in fields if name not in _defaults(known)]
        if not fields.keys() & _defaults(known).keys():
            raise PolicyError(
                f"{told(dict(given))} is no policy: 'policy' names one of this package's, and of other libraries the "
                f"fields of {', '.join(peer.__name__ for peer in PEERS)} are known"
            )
        raise PolicyError(f"{known.__name__} has no field {strange[0]!r}; it has {', '.join(_defaults(known))}")
    return _read(fitting[0], fields, steps)


def from_config(config: Any) -> Policy | None:
    """The policy that another library's configuration object means; None where it is no such object.

    Raises:
        PolicyError: it has no counterpart here.
    """
    name = type(config).__name__
    peer = next((peer for peer in PEERS if peer.__name__ == name), None)
    if peer is None or not dataclasses.is_dataclass(config):
        if name in _NEAREST:
            raise PolicyError(f"{name} has no counterpart here: {_NEAREST[name]}")
        return None
    # A field of a later version that was left as it is changes nothing.
    known = {*_defaults(peer), *_NUM_STEPS}
    given = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config)}
    set_here = {n: value for n, (value, default) in given.items() if n in known or value != default}
    fields, steps = _without_steps(set_here)
    strange = [n for n in fields if n not in known]
    if strange:
        raise PolicyError(f"{name}: {strange[0]} is not known here and has been set")
    return _read(peer, fields, steps)


def _without_steps(fields: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Fields without the number of steps, and that."""
    steps = next((fields[name] for name in _NUM_STEPS if fields.get(name) is not None), 50)
    return {name: value for name, value in fields.items() if name not in _NUM_STEPS}, steps


def _read(peer: type[Peer], fields: Mapping[str, Any], num_steps: Any) -> Policy:
    plain = {name: _plain(value) for name, value in fields.items()}
    try:
        return peer(**plain).policy(accept(Steps, num_steps, "num_inference_steps"))
    except PolicyError as error:
        raise PolicyError(f"{peer.__name__}: {error}") from error


def _defaults(peer: type[Peer]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(peer)}


def _plain(value: Any) -> Any:
    """Dtypes and enums by name, and arrays as lists, as a file holds them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    text = str(value)
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    return getattr(value, "value", value)
