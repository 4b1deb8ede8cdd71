"""One op call seen apart from any graph: its arguments and results as tensors, real or fake."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Call:
    """Arguments and result of one op call, every graph node replaced by its value."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """The argument given at ``position`` or by ``name``."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def operands(self) -> list[tuple[int, ...]]:
        """Shapes of the tensor arguments, in order, lists flattened."""
        return [shape(t) for t in tensors((self.args, self.kwargs))]

    @property
    def results(self) -> list[tuple[int, ...]]:
        """Shapes of the tensor results, in order."""
        return [shape(t) for t in tensors(self.result)]


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of ``tree``, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape as plain ints. A symbolic size is specialised, which guards the trace on it."""
    return tuple(int(s) for s in tensor.shape)


def normal_dims(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Dimensions as non-negative ints; all of them where none is named."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(rank))
    listed = [dims] if isinstance(dims, int) else list(dims)
    return tuple(d % rank if rank else 0 for d in listed)
