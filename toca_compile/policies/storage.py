"""Policies as JSON: the class by name, its fields as they are."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toca_compile.errors import PolicyError
from toca_compile.ir.plan import Policy
from toca_compile.policies.full import FullCompute
from toca_compile.policies.schedules import RatioSchedule
from toca_compile.policies.taylor import TaylorSeer
from toca_compile.policies.toca import Fora, ToCa

KINDS: dict[str, type[Any]] = {c.__name__: c for c in (FullCompute, Fora, ToCa, TaylorSeer)}
PARTS: dict[str, type[Any]] = {"ratios": RatioSchedule}


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy as JSON.

    Raises:
        PolicyError: it is none of this package's policies.
    """
    name = type(policy).__name__
    if KINDS.get(name) is not type(policy):
        raise PolicyError(f"{name} cannot be saved; there are {', '.join(sorted(KINDS))}")
    fields = dataclasses.asdict(policy)  # type: ignore[call-overload]
    Path(path).write_text(json.dumps({"policy": name, **fields}, indent=1) + "\n")


def load_policy(path: str | Path) -> Policy:
    """Read what ``save_policy`` wrote; the policy checks its numbers again.

    Raises:
        PolicyError: the file is no policy, or names a field that it does not have.
    """
    try:
        given = json.loads(Path(path).read_text())
        made: Policy = _made(KINDS[given.pop("policy")], given)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise PolicyError(f"{path} holds no policy: {error!r}") from error
    return made


def _made(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """A dataclass of these fields: lists are tuples, and parts are dataclasses of their own."""
    values = {
        name: _made(PARTS[name], value) if name in PARTS else tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
    }
    return kind(**values)
