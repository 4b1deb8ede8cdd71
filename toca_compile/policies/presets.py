"""The published configurations, by name."""

from dataclasses import replace
from typing import Any

from toca_compile.errors import PolicyError
from toca_compile.policies.schedules import RatioSchedule
from toca_compile.policies.toca import ToCa

PRESETS: dict[str, ToCa] = {
    # ToCa's DiT recipes (README of the reference; R = 93 %).
    "dit-xl-2/ddim-50": ToCa(num_steps=50, interval=3, fresh_ratio=0.07),
    "dit-xl-2/ddpm-250": ToCa(
        num_steps=250,
        interval=4,
        fresh_ratio=0.07,
        ratios=RatioSchedule(layer=(1.8, -1.6), step=(1.4, -0.8), kinds={"mlp": 2.5, "self_attention": 0.0}),
    ),
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
