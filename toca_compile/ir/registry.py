"""How classes and functions become known by a name without a list that somebody has to keep: each registers itself
where it is defined, and every file of its package is imported. To add one is to add one file."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

from toca_compile.errors import TocaError
from toca_compile.ir.fields import Family

F = TypeVar("F", bound=type[Family])


def register(cls: F) -> F:
    """A class decorator, above ``@dataclass``: the class is a member of its family by its own name, as files name it.

    Raises:
        TocaError: another class of the family has that name.
    """
    other = cls.members.setdefault(cls.__name__, cls)
    # A module that is loaded anew makes its classes anew.
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TocaError(
            f"{cls.__module__} registers a {cls.__name__}, and {other.__module__} has one: give it another name"
        )
    cls.members[cls.__name__] = cls
    return cls


def import_files(package: str, folders: Iterable[str]) -> None:
    """Import all modules of a package, given its name and ``__path__``, so that what they define registers itself."""
    for module in pkgutil.iter_modules(folders):
        importlib.import_module(f"{package}.{module.name}")
