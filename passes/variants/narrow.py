"""Narrow: a slice of a linear layer's output needs only its own rows of the weight.

Some models make queries, keys, values and the MLP's input with one linear layer and cut its output up. Where a partial
step needs some of the pieces only, each is computed by itself::

    y = linear(x, W, b)                                     mlp = linear(x, W[9:21], b[9:21])
    q, k, v, mlp = split(y, [3, 3, 3, 12], −1)       →
"""

import operator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from toca_compile.ir.types import AxisTypes

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """``size`` features of a linear layer's output, from ``start`` on."""

    linear: fx.Node
    start: int
    size: int


def pieces(rows: AbstractSet[fx.Node], types: AxisTypes) -> dict[fx.Node, Piece]:
    """The values among ``rows`` that are pieces of a linear layer of which ``rows`` does not need all."""
    found: dict[fx.Node, Piece] = {}
    for node in rows:
        if node.target is not aten.linear.default or node not in types.specs:
            continue
        cuts = [_cut(node, user, rows, types) for user in node.users if user in rows]
        own = {value: piece for cut in cuts for value, piece in (cut or {}).items()}
        if None not in cuts and sum(p.size for p in own.values()) < node.meta["val"].shape[-1]:
            found |= own
    return found


def _cut(linear: fx.Node, user: fx.Node, rows: AbstractSet[fx.Node], types: AxisTypes) -> dict[fx.Node, Piece] | None:
    """The pieces that ``user`` cuts from the features, as far as ``rows`` has them; None where it is no cut."""
    spec = types.specs.get(user)
    if spec is None or not spec.windows:
        return None
    features = spec.operands[0][-1]
    values = [n for n in user.users if n in rows] if isinstance(user.meta["val"], (tuple, list)) else [user]
    if any(isinstance(user.meta["val"], (tuple, list)) and n.target is not operator.getitem for n in values):
        return None
    found = {}
    for value in values:
        number: Any = value.args[1] if value is not user else 0
        label = next(iter(spec.results[number][-1]), "")
        window = spec.windows.get(label)
        if window is None or (window.source,) != features or window.step != 1:
            return None
        found[value] = Piece(linear, window.start, spec.sizes[label])
    return found
