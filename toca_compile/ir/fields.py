"""What the fields of policies and plans may hold, said in their types: ``interval: Count``, ``ratio: Fraction``.

One walk, ``accept``, holds a value against such a type. It checks what is built in Python (``Checked``), what is read
from JSON (``policies/storage.py``) and what a policy plans (``check_plan.py``), so that all three refuse the same
values with the same words: the path of the value, what it must be, and what it is.
"""

import dataclasses
import inspect
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import EnumMeta
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import torch

from toca_compile.errors import PolicyError

MAX_STEPS = 10_000
"""Steps of a run at most: laying a plan out takes time and memory for each. The longest published runs have 1000."""
MAX_ORDER = 4
KINDS = ("self_attention", "joint_attention", "cross_attention", "parallel", "mlp", "mixer")
"""The kinds of sites, as ``passes/find_sites.py`` names them."""

_REFUSED = object()
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80

T = TypeVar("T")
Reader = Callable[[tuple[type, ...], Any, str], Any]


@dataclass(frozen=True)
class Whole:
    """A whole number from ``least`` to ``most``; NumPy's integers count, True and 2.0 do not.

    As of the other limits, its text completes the sentence "x must be …", and ``take`` returns a value as Python's own
    type, or ``_REFUSED``.
    """

    least: int
    most: int

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def take(self, value: Any) -> Any:
        """An int."""
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        return int(value) if is_whole and self.least <= value <= self.most else _REFUSED


@dataclass(frozen=True)
class Number:
    """A finite number from ``least`` to ``most``, or strictly ``above`` and ``below``; NumPy's scalars count. ``note``
    ends the message that refuses another."""

    least: float
    most: float
    above: bool = False
    below: bool = False
    note: str = ""

    def __str__(self) -> str:
        if not self.above and not self.below:
            return f"a number from {self.least:g} to {self.most:g}"
        low = f"above {self.least:g}" if self.above else f"of at least {self.least:g}"
        high = f"below {self.most:g}" if self.below else f"at most {self.most:g}"
        return f"a number {low} and {high}"

    def take(self, value: Any) -> Any:
        """A float."""
        number: Any = value
        if not isinstance(value, Real) or isinstance(value, bool) or not self.least <= number <= self.most:
            return _REFUSED  # NaN is never between two numbers
        at_open_end = (self.above and number == self.least) or (self.below and number == self.most)
        return _REFUSED if at_open_end else float(number)


@dataclass(frozen=True)
class OneOf:
    """One of some names."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"

    def take(self, value: Any) -> Any:
        """A str."""
        return value if isinstance(value, str) and value in self.names else _REFUSED


@dataclass(frozen=True)
class Dtype:
    """A floating-point dtype that holds activations, or (``named``) the name of one."""

    named: bool = False

    def __str__(self) -> str:
        what, such = ("the name of a", "'bfloat16'") if self.named else ("a", "torch.bfloat16")
        return f"{what} floating-point dtype that holds numbers of both signs, such as {such}"

    def take(self, value: Any) -> Any:
        """As it is given."""
        dtype = getattr(torch, value, None) if self.named and isinstance(value, str) else value
        return value if isinstance(dtype, torch.dtype) and _holds_activations(dtype) else _REFUSED


@dataclass(frozen=True)
class Device:
    """The name of a device on which values can lie."""

    def __str__(self) -> str:
        return "the name of a device that holds values, such as 'cpu' or 'cuda:1'"

    def take(self, value: Any) -> Any:
        """As it is given."""
        try:
            kind = torch.device(value).type if isinstance(value, str) else "meta"
        except RuntimeError:
            return _REFUSED
        return value if kind != "meta" else _REFUSED


def _holds_activations(dtype: torch.dtype) -> bool:
    try:
        return dtype.is_floating_point and torch.finfo(dtype).min < 0
    except Exception:  # torch knows no limits of types that pack two numbers in a byte
        return False


_LIMITS = (Whole, Number, OneOf, Dtype, Device)

Steps = Annotated[int, Whole(1, MAX_STEPS)]
Count = Annotated[int, Whole(1, MAX_STEPS)]
Natural = Annotated[int, Whole(0, MAX_STEPS)]
Call = Annotated[int, Whole(0, MAX_STEPS - 1)]
Tokens = Annotated[int, Whole(0, 2**31 - 1)]
Order = Annotated[int, Whole(0, MAX_ORDER)]
Seed = Annotated[int, Whole(0, 2**31 - 1)]
Fraction = Annotated[float, Number(0, 1)]
Weight = Annotated[float, Number(0, 1e6)]
Factor = Annotated[float, Number(-1e6, 1e6)]
Threshold = Annotated[float, Number(0, 1e6, above=True)]
Kind = Annotated[str, OneOf(KINDS)]
Basis = Annotated[str, OneOf(("taylor", "newton"))]
Counting = Annotated[str, OneOf(("down", "up"))]
DtypeName = Annotated[str, Dtype(named=True)]
DeviceName = Annotated[str, Device()]


class Checked:
    """Base of the frozen dataclasses that policies are made of: each field is held against its type."""

    def __post_init__(self) -> None:
        for name, kind in _types_of(self).items():
            object.__setattr__(self, name, accept(kind, getattr(self, name), name))
        self.check()

    def check(self) -> None:
        """Hold fields against each other.

        Raises:
            PolicyError: they contradict each other.
        """


class Family(Checked):
    """Base of a base class whose subclasses are found by name: a field of that base class's type takes any of them
    that has registered itself (``ir/registry.py``)::

        class When(Family): ...

        @register
        @dataclass(frozen=True)
        class Every(When): ...
    """

    members: ClassVar[dict[str, type[Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Family in cls.__bases__:  # a family of its own; what derives from it shares its table
            cls.members = {}


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass, as it was written."""
    types: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        types |= inspect.get_annotations(base)
    return {f.name: types[f.name] for f in dataclasses.fields(cls)}


def _types_of(value: Any) -> dict[str, Any]:
    cls: Any = type(value)
    return field_types(cls)


def accept(kind: Any, value: Any, path: str, part: Reader | None = None) -> Any:
    """The value as a field of this type holds it: lists as tuples, NumPy's numbers as Python's.

    Args:
        kind: the type, with its limits. What is no type of this file's (in a user's own policy) takes anything.
        value: what was given.
        path: to the value, for the message.
        part: reads a dataclass that may be of several types; without, it must be one already.

    Raises:
        PolicyError: the value is none of that type.
    """
    options = tuple(k for k in _options(kind) if k is not NoneType)
    if value is None and len(options) < len(_options(kind)):
        return None
    inner, origin = options[0], get_origin(options[0])
    if all(dataclasses.is_dataclass(k) for k in options):
        return (part or _given)(options, value, path)
    taken: Any = _REFUSED
    if origin is Annotated and isinstance(inner.__metadata__[0], _LIMITS):
        taken = inner.__metadata__[0].take(value)
    elif origin is tuple:
        items = get_args(inner)
        if isinstance(value, tuple | list) and (items[1:] == (...,) or len(items) == len(value)):
            each = (items[0],) * len(value) if items[1:] == (...,) else items
            taken = tuple(accept(k, v, f"{path}[{i}]", part) for i, (k, v) in enumerate(zip(each, value, strict=True)))
    elif origin is Mapping:
        key, item = get_args(inner)
        if isinstance(value, Mapping):
            keys = [accept(key, k, f"a key of {path}") for k in value]
            taken = {k: accept(item, value[k], f"{path}[{told(k)}]", part) for k in keys}
    elif not (inner is bool or isinstance(inner, EnumMeta)) or isinstance(value, inner):
        taken = value
    if taken is _REFUSED:
        raise refused(path, kind, value)
    return taken


def checked(value: T, path: str) -> T:
    """A dataclass with its fields held against their types; the same object where nothing had to be converted.

    Raises:
        PolicyError: a field holds what it may not.
    """
    changes = {}
    for name, kind in _types_of(value).items():
        given = getattr(value, name)
        taken = accept(kind, given, f"{path}.{name}")
        if taken is not given and (type(taken) is not type(given) or taken != given):
            changes[name] = taken
    return dataclasses.replace(value, **changes) if changes else value  # type: ignore[type-var]


def refused(path: str, kind: Any, value: Any) -> PolicyError:
    """The error that says what a value must be."""
    limits = getattr(_options(kind)[0], "__metadata__", ())
    note = "".join(limit.note for limit in limits if isinstance(limit, Number))
    return PolicyError(f"{path} must be {describe(kind)}, not {told(value)}{note}")


def told(value: Any) -> str:
    """A value as a message shows it: not at length."""
    try:
        return _SHORT.repr(value)
    except Exception:  # a number of thousands of digits, or an object that cannot be shown
        return f"a value of type {type(value).__name__}"


def describe(kind: Any) -> str:
    """What a value of the type is, after "must be"."""
    options = [k for k in _options(kind) if k is not NoneType]
    end = " or None" if len(options) < len(_options(kind)) else ""
    inner, origin = options[0], get_origin(options[0])
    if origin is Annotated:
        return f"{inner.__metadata__[0]}{end}"
    if origin is tuple:
        items = get_args(inner)
        many = "a tuple or list" if items[1:] == (...,) else f"a tuple or list of {len(items)}"
        return f"{many}, each item {describe(items[0])}{end}"
    if origin is not None:
        return f"a mapping from {' to '.join(describe(k) for k in get_args(inner))}{end}"
    if inner is bool:
        return f"True or False{end}"
    names = [k.__name__ for k in options]
    article = "an" if names[0][0] in "AEIO" else "a"
    return (f"one of {', '.join(names)}" if len(names) > 1 else f"{article} {names[0]}") + end


def _options(kind: Any) -> tuple[Any, ...]:
    """The types of which one must fit; for a family, its members."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(option for k in kinds for option in (k.members.values() if _is_family(k) else (k,)))


def _is_family(kind: Any) -> bool:
    return isinstance(kind, type) and Family in getattr(kind, "__bases__", ())


def _given(options: tuple[type, ...], value: Any, path: str) -> Any:
    if not isinstance(value, options):
        raise refused(path, Union[options], value)  # noqa: UP007  (made at run time)
    return checked(value, path)
