"""Policies as JSON: each dataclass by name, its fields as they are."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toca_compile.errors import PolicyError
from toca_compile.ir.plan import Policy, Selector
from toca_compile.policies import composition as parts
from toca_compile.policies import when
from toca_compile.policies.block_cache import BlockCache
from toca_compile.policies.full import FullCompute
from toca_compile.policies.schedules import RatioSchedule
from toca_compile.policies.taylor import TaylorSeer, TaylorToCa
from toca_compile.policies.toca import DuCa, Fora, ToCa

POLICIES: dict[str, type[Any]] = {
    c.__name__: c for c in (FullCompute, Fora, ToCa, DuCa, TaylorSeer, TaylorToCa, BlockCache, parts.Composition)
}
PARTS: dict[str, type[Any]] = {
    c.__name__: c
    for c in (
        RatioSchedule, Selector, parts.Share, parts.Rule, parts.Compute, parts.Reuse, parts.Forecast, parts.Partial,
        parts.Queries, parts.SkipBlocks, when.Every, when.Periodic, when.IntervalFunction, when.Spread, when.Listed,
        when.Adaptive,
    )
}  # fmt: skip


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy as JSON.

    Raises:
        PolicyError: it is none of this package's policies.
    """
    Path(path).write_text(json.dumps(as_data(policy), indent=1) + "\n")


def load_policy(path: str | Path) -> Policy:
    """Read what ``save_policy`` wrote; the policy checks its numbers again.

    Raises:
        PolicyError: the file is no policy, or names a field that it does not have.
    """
    try:
        made: Policy = from_data(json.loads(Path(path).read_text()))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"{path} holds no policy: {error!r}") from error
    return made


def as_data(policy: Policy) -> dict[str, Any]:
    """A policy as JSON's own types.

    Raises:
        PolicyError: it is none of this package's policies.
    """
    name = type(policy).__name__
    if POLICIES.get(name) is not type(policy):
        raise PolicyError(f"{name} cannot be saved; there are {', '.join(sorted(POLICIES))}")
    return {"policy": name, **_fields(policy)}


def from_data(given: Mapping[str, Any]) -> Policy:
    """The policy that ``as_data`` told."""
    fields = {name: _made(value) for name, value in given.items() if name != "policy"}
    policy: Policy = POLICIES[given["policy"]](**fields)
    return policy


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: _told(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _told(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {"part": type(value).__name__, **_fields(value)}
    if isinstance(value, tuple | list):
        return [_told(v) for v in value]
    return dict(value) if isinstance(value, Mapping) else value


def _made(value: Any) -> Any:
    """What a value was: lists are tuples, and what names its part is one."""
    if isinstance(value, list):
        return tuple(_made(v) for v in value)
    if isinstance(value, dict) and "part" in value:
        return PARTS[value["part"]](**{name: _made(v) for name, v in value.items() if name != "part"})
    return value
