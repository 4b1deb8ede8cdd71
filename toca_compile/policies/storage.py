"""Policies as JSON: each dataclass by name, its fields as they are. What is read is held against the same types as what
is built in Python (``ir/fields.py``)."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from toca_compile.errors import PolicyError
from toca_compile.ir.fields import Family, accept, field_types, told
from toca_compile.ir.plan import Policy
from toca_compile.policies.base import CachingPolicy

_MOST_BYTES = 4 << 20  # a composition that lists all its full steps has a hundredth of that


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy as JSON.

    Raises:
        PolicyError: it is none of this package's policies.
    """
    Path(path).write_text(json.dumps(as_data(policy), indent=1) + "\n", encoding="utf-8")


def load_policy(path: str | Path) -> Policy:
    """Read what ``save_policy`` wrote, and check it as if it were built in Python.

    Raises:
        PolicyError: the file cannot be read or holds no policy; the message says where in the file, and what stands
            there.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise PolicyError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        return from_data(json.loads(raw.decode("utf-8"), object_pairs_hook=_Object))
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise PolicyError(f"{path} holds no policy: it nests too deeply") from error
    except ValueError as error:  # no UTF-8, no JSON, or a PolicyError
        raise PolicyError(f"{path} holds no policy: {error}") from error


def as_data(policy: Policy) -> dict[str, Any]:
    """A policy as JSON's own types.

    Raises:
        PolicyError: it is none of this package's policies.
    """
    name = type(policy).__name__
    if CachingPolicy.members.get(name) is not type(policy):
        raise PolicyError(
            f"{name} cannot be saved; there are {', '.join(sorted(CachingPolicy.members))}, and what registers itself "
            "(toca_compile.policies.register)"
        )
    return {"policy": name, **_fields(policy)}


def from_data(given: Any) -> Policy:
    """The policy that ``as_data`` told.

    Raises:
        PolicyError: it is none, or a field holds what it may not.
    """
    if not isinstance(given, Mapping):
        raise PolicyError(f'a policy is an object such as {{"policy": "ToCa", "num_steps": 50}}, not {told(given)}')
    simplest_first = sorted(CachingPolicy.members.values(), key=lambda cls: len(dataclasses.fields(cls)))
    return cast(Policy, _built("policy", tuple(simplest_first), given, ""))


def part_data(value: Family) -> dict[str, Any]:
    """A part of a policy, one of a family, as JSON's own types.

    Raises:
        PolicyError: it is none that is found by its name.
    """
    name = type(value).__name__
    if value.members.get(name) is not type(value):
        raise PolicyError(f"{name} cannot be saved: it has not registered itself (toca_compile.policies.register)")
    return cast(dict[str, Any], _told(value))


def part_of(family: type[Any], given: Any) -> Any:
    """The part that ``part_data`` told.

    Raises:
        PolicyError: it is none of the family.
    """
    return _part(tuple(family.members.values()), given, "it")


class _Object(dict[str, Any]):
    """An object of a JSON file, with the key that stands in it twice."""

    def __init__(self, pairs: Iterable[tuple[str, Any]]) -> None:
        super().__init__()
        self.twice: str | None = None
        for key, value in pairs:
            self.twice = key if key in self else self.twice
            self[key] = value


def _built(tag: str, options: tuple[type, ...], given: Any, path: str) -> Any:
    """The dataclass that an object of a JSON file is: the one of ``options`` that its ``tag`` names."""
    names = {c.__name__: c for c in options}
    name = given.get(tag) if isinstance(given, Mapping) else None
    what, start = (path, f"{path}: ") if path else ("it", "")
    if not isinstance(name, str) or name not in names:
        shown = told(name) if isinstance(given, Mapping) and tag in given else told(given)
        raise PolicyError(f"{what} must be an object whose {tag!r} is one of {', '.join(names)}, not {shown}")
    cls: Any = names[name]
    types = field_types(cls)
    if getattr(given, "twice", None) is not None:
        raise PolicyError(f"{start}{told(given.twice)} stands twice in it")
    unknown = [key for key in given if key != tag and key not in types]
    if unknown:
        raise PolicyError(f"{start}{name} has no field {told(unknown[0])}; it has {', '.join(types) or 'none'}")
    fields = {}
    for field in dataclasses.fields(cls):
        own = f"{path}.{field.name}" if path else field.name
        if field.name in given:
            fields[field.name] = accept(types[field.name], _plain(given[field.name], own), own, _part)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PolicyError(f"{own} is missing")
    try:
        return cls(**fields)
    except PolicyError as error:  # fields that contradict each other
        raise PolicyError(f"{start}{error}") from error


def _part(options: tuple[type, ...], given: Any, path: str) -> Any:
    return _built("part", options, given, path)


def _plain(value: Any, path: str) -> Any:
    if getattr(value, "twice", None) is not None:
        raise PolicyError(f"{path}: {told(value.twice)} stands twice in it")
    return value


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: _told(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _told(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {"part": type(value).__name__, **_fields(value)}
    if isinstance(value, tuple | list):
        return [_told(v) for v in value]
    return dict(value) if isinstance(value, Mapping) else value
