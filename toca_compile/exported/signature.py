"""Arguments and results of a model as flat values with names, on both sides of a file."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from toca_compile.errors import ExportError

_SCALARS = (bool, int, float, str, type(None))


def leaves(parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a call by the names of the parameters; what is nested, by its path."""
    named = {parameters[i] if i < len(parameters) else str(i): value for i, value in enumerate(args)}
    found: dict[str, Any] = {}
    for name, value in (named | dict(kwargs)).items():
        _visit(name, value, found)
    return found


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """An argument with its leaves changed."""
    if isinstance(value, Mapping):
        return {k: mapped(v, change) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(mapped(v, change) for v in value)
    return change(value)


def fixed(found: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Of a call's values those that are no tensors, beside what the parameters are where they are not given."""
    given = {path: told(value) for path, value in found.items() if not isinstance(value, torch.Tensor)}
    there = {path.split(".")[0] for path in found}
    return {name: value for name, value in defaults.items() if name not in there} | given


def told(value: Any) -> Any:
    """A value as JSON tells it apart from others."""
    return value if isinstance(value, _SCALARS) else repr(value)


def arrangement(out: Any, place_of: Callable[[torch.Tensor], Any]) -> Any:
    """How a model's result is made of tensors: nested lists and dictionaries, of which ``place_of`` tells each.

    Raises:
        ExportError: it is made of something else.
    """
    if isinstance(out, torch.Tensor):
        return {"tensor": place_of(out)}
    if isinstance(out, Mapping):
        return {"fields": {str(k): arrangement(v, place_of) for k, v in out.items()}}
    if dataclasses.is_dataclass(out):
        names = [f.name for f in dataclasses.fields(out)]
        return {"fields": {name: arrangement(getattr(out, name), place_of) for name in names}}
    if isinstance(out, tuple | list):
        return {"tuple" if isinstance(out, tuple) else "list": [arrangement(v, place_of) for v in out]}
    if isinstance(out, _SCALARS):
        return {"value": out}
    raise ExportError(f"the model returns a {type(out).__name__}, which a file cannot hold: return tensors")


def arranged(how: Any, tensor: Callable[[Any], Any]) -> Any:
    """The result again, of tensors by what tells them."""
    ((kind, inner),) = how.items()
    if kind == "fields":
        return Fields((k, arranged(v, tensor)) for k, v in inner.items())
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(arranged(v, tensor) for v in inner)
    return tensor(inner) if kind == "tensor" else inner


class Fields(dict[str, Any]):
    """A result with names: read by attribute, by name, or by number, where what is None does not count."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there of it."""
        return tuple(value for value in self.values() if value is not None)


def _visit(path: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, Mapping) and value:
        for k, v in value.items():
            _visit(f"{path}.{k}", v, found)
    elif isinstance(value, tuple | list) and value and not isinstance(value, torch.Size):
        for i, v in enumerate(value):
            _visit(f"{path}.{i}", v, found)
    else:
        found[path] = value
