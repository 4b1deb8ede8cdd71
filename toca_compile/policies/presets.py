"""The published configurations, by name."""

from dataclasses import replace
from typing import Any

from toca_compile.errors import PolicyError
from toca_compile.ir.plan import Policy
from toca_compile.policies.block_cache import BlockCache
from toca_compile.policies.schedules import RatioSchedule
from toca_compile.policies.taylor import TaylorSeer, TaylorToCa
from toca_compile.policies.toca import DuCa, Fora, ToCa

_PIXART = ToCa(
    num_steps=20,
    interval=3,
    fresh_ratio=0.30,
    score="entropy",
    interval_slope=0.2,
    sensitive=(0.0, 0.0),
    cell=4,
    bonus=0.4,
    ratios=RatioSchedule(layer=(1.6, -1.2), step=(1.9, -1.8), kinds={"cross_attention": 0.6, "mlp": 1.6}),
    count="up",
    shared_pair=True,
)

_FLUX = ToCa(
    num_steps=50,
    interval=4,
    fresh_ratio=0.1,
    schedule="counter",
    bonus=0.0,
    # The layer factor falls by 1 over 27 layers in the published code, and over the stack here.
    ratios=RatioSchedule(layer=(1.5, -1.0), kinds={"mlp": 0.4, "parallel": 1.6}),
    count="up",
    warmup=3,
)

PRESETS: dict[str, ToCa] = {
    # ToCa's DiT recipes (README of the reference; R = 93 %).
    "dit-xl-2/ddim-50": ToCa(num_steps=50, interval=3, fresh_ratio=0.07),
    "dit-xl-2/ddpm-250": ToCa(
        num_steps=250,
        interval=4,
        fresh_ratio=0.07,
        ratios=RatioSchedule(layer=(1.8, -1.6), step=(1.4, -0.8), kinds={"mlp": 2.5, "self_attention": 0.0}),
    ),
    # PixArt-α with DPM-Solver++ in 20 steps: the reference's settings, and the paper's (section 4.1: w_t = 0.1,
    # λ_t = 0.4, R = 70 %, r_l = 0.3, r_type = 1.0), each λ standing for a factor 1 + λ·(1 − 2x) over the range of x.
    "pixart-alpha/dpm-20": _PIXART,
    "pixart-alpha/dpm-20-n2": replace(
        _PIXART,
        interval=2,
        interval_slope=0.1,
        ratios=RatioSchedule(layer=(1.3, -0.6), step=(1.4, -0.8), kinds={"cross_attention": 0.6, "mlp": 1.6}),
    ),
    # OpenSora 1.2 with rectified flow in 30 steps: attention and MLP every 3 steps, cross-attention every 6; 14.95 % of
    # the MLPs' tokens in between, and (factor −0.005) none of cross-attention's.
    "opensora-1.2/rflow-30": ToCa(
        num_steps=30,
        interval=3,
        fresh_ratio=0.1,
        schedule="periodic",
        score="entropy",
        bonus=0.0,
        ratios=RatioSchedule(kinds={"cross_attention": -0.005, "mlp": 1.495}),
        count="up",
        warmup=3,
        periods={"cross_attention": 6},
        shared_pair=True,
    ),
    "flux-dev/50-n4": _FLUX,
    "flux-dev/50-n5": replace(_FLUX, interval=5),
    "flux-dev/50-n6": replace(_FLUX, interval=6),
}


def preset(name: str, **overrides: Any) -> ToCa:
    """A published configuration, with any field overridden by keyword.

    Raises:
        PolicyError: no configuration of that name, or no such field.
    """
    if name not in PRESETS:
        raise PolicyError(f"no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    try:
        return replace(PRESETS[name], **overrides)
    except TypeError as error:
        raise PolicyError(f"preset {name!r}: {error}") from error


def named(policy: Policy) -> str:
    """The name of the published configuration that a policy is, whatever its number of steps; empty for any other."""
    same = [
        n for n, p in PRESETS.items() if isinstance(policy, ToCa) and replace(p, num_steps=policy.num_steps) == policy
    ]
    return same[0] if same else ""


def ready_made(num_steps: int = 50) -> dict[str, Policy]:
    """The policies that ``toca-compile evaluate`` compares if it is not told which: the published methods at several
    speeds, and forecasts of the whole stack of blocks by Newton's polynomial."""
    table: dict[str, Policy] = {f"FORA N={n}": Fora(num_steps, n) for n in (2, 3, 5)}
    table["ToCa N=3"] = preset("dit-xl-2/ddim-50", num_steps=num_steps)
    table["DuCa N=3"] = DuCa(num_steps, 3)
    table |= {f"TaylorSeer o2 N={n}": TaylorSeer(num_steps, n, 2) for n in (2, 3, 4, 5)}
    table |= {f"Newton o3 N={n}": TaylorSeer(num_steps, n, 3, basis="newton") for n in (3, 5)}
    table["TaylorToCa o2 N=5, MLP 10 %"] = TaylorToCa(num_steps, 5, 2, 0.1)
    table["TaylorToCa o2 N=5, queries 30 %"] = TaylorToCa(
        num_steps, 5, 2, 0.3, keys="fresh", mlp=False, update=False
    )  # fmt: skip
    table |= {f"first block {t}": BlockCache(num_steps, 1, threshold=t) for t in (0.05, 0.1)}
    table |= {
        f"blocks, Newton o2 N={n}": BlockCache(num_steps, 0, interval=n, order=2, basis="newton") for n in (2, 3, 4, 5)
    }
    return table
