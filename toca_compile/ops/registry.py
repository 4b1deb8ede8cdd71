"""How an op of the ``toca::`` namespace is declared: its schema right above the function that is its meaning."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_LIB = torch.library.Library("toca", "DEF")


def op(schema: str, fake: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Declare the function below as ``toca::`` op of this schema, in torch's notation.

    It is a composite of ATen ops: an eager graph runs it as it is, Inductor sees through it and fuses it. It must
    neither read a device value on the host nor keep an n×n map. A symbolic host number is a ``SymInt``; in the op's
    overload ``numbers`` it is a tensor without dimensions, all but ``k``, which is a shape.

    Args:
        fake: makes results without values, of an op that is none of these: it is called as it is, and nothing sees
            through it.
    """

    def declare(function: F) -> F:
        name, arguments = schema.split("(", 1)
        in_memory = re.sub(r"SymInt (?!k\b)", "Tensor ", arguments)
        overloads = {name: arguments} if in_memory == arguments else {name: arguments, f"{name}.numbers": in_memory}
        for overload, takes in overloads.items():
            _LIB.define(f"{overload}({takes}")
            _LIB.impl(overload, function, "CompositeImplicitAutograd" if fake is None else "CompositeExplicitAutograd")
            if fake is not None:
                torch.library.register_fake(f"toca::{overload}", fake, lib=_LIB)
        return function

    return declare
