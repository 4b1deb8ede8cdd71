"""How an op of the ``toca::`` namespace is declared: its schema right above the function that is its meaning."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_LIB = torch.library.Library("toca", "DEF")


def op(schema: str) -> Callable[[F], F]:
    """Declare the function below as ``toca::`` op of this schema, in torch's notation.

    It is a composite of ATen ops: an eager graph runs it as it is, Inductor sees through it and fuses it. It must
    neither read a device value on the host nor keep an n×n map. A symbolic host number is a ``SymInt``.
    """

    def declare(function: F) -> F:
        _LIB.define(schema)
        _LIB.impl(schema.split("(")[0], function, "CompositeImplicitAutograd")
        return function

    return declare
