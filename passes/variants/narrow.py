"""Narrow: a slice of a linear layer's output needs only its own rows of the weight.

Some models make queries, keys, values and the MLP's input with one linear layer and cut its output up, and nearly all
make shifts, scales and gates of their conditioning so. Where a step needs some of the pieces only, those are computed;
what lies side by side in one product::

    y = linear(x, W, b)                                     y = linear(x, W[3:9], b[3:9])
    q, k, v, mlp = split(y, [3, 3, 3, 12], −1)       →      k, v = y[…, :3], y[…, 3:]
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from toca_compile.ir.graph import CAPTURED_AS, value_of
from toca_compile.ir.program import Form, Segment
from toca_compile.ir.types import AxisTypes, Site

aten = torch.ops.aten
_TOLD = (CAPTURED_AS, "stack_trace", "nn_module_stack")


@dataclass(frozen=True)
class Piece:
    """``size`` features of a linear layer's output, from ``start`` on."""

    linear: fx.Node
    start: int
    size: int


def pieces(
    rows: AbstractSet[fx.Node], types: AxisTypes, whole: AbstractSet[fx.Node] = frozenset()
) -> dict[fx.Node, Piece]:
    """The values among ``rows`` that are pieces of a linear layer of which ``rows`` does not need all. ``whole``: what
    is asked for whole elsewhere."""
    found: dict[fx.Node, Piece] = {}
    for node in rows:
        if node.target is not aten.linear.default or node not in types.specs or node in whole:
            continue
        users = [user for user in node.users if user in rows]
        cuts = [_cut(node, user, rows, types) for user in users]
        own = {value: piece for cut in cuts for value, piece in (cut or {}).items()}
        if None in cuts or whole & {*users, *own}:
            continue
        if sum(p.size for p in own.values()) < value_of(node).shape[-1]:
            found |= own
    return found


def narrowed(
    segment: Segment,
    sites: Sequence[Site],
    forms: Sequence[Form],
    types: AxisTypes,
    needed: AbstractSet[fx.Node],
    kept: Iterable[fx.Node] = (),
) -> dict[fx.Node, Piece]:
    """The pieces of linear layers that a variant computes for all tokens and needs not all of. ``needed``: what it
    computes so; ``kept``: values that later steps take from the cache, as they are."""
    if all(form.action.dense for form in forms):
        return {}  # a full step is the model's own, to the last bit
    does = [(site, form.action) for site, form in zip(sites, forms, strict=True)]
    read = {i for site, action in does for n in action.rows(site) for i in n.all_input_nodes}
    own = {site.output for site in sites}.union(kept, *(action.stale(site) for site, action in does))
    # Of a layer that is read as a whole nothing is left out; a slice of it that is read is still a slice.
    layers = {
        n
        for n in read.union(segment.outputs)
        if n.target is aten.linear.default or isinstance(value_of(n), tuple | list)
    }
    return pieces(needed, types, own | layers)


def emit_pieces(
    emit: Callable[..., fx.Node], x: fx.Node, weights: Sequence[fx.Node], own: Mapping[fx.Node, Piece]
) -> dict[fx.Node, fx.Node]:
    """The pieces ``own`` of one linear layer of ``x``: a product for each run of them without a gap."""
    made: dict[fx.Node, fx.Node] = {}
    for run in _runs(own):
        start, end = run[0][1].start, run[-1][1].start + run[-1][1].size
        y = emit(aten.linear.default, x, *(emit(aten.slice.Tensor, w, 0, start, end) for w in weights))
        _say(y, run[0][1].linear)
        for value, piece in run:
            at = piece.start - start
            made[value] = y if len(run) == 1 else _say(emit(aten.slice.Tensor, y, -1, at, at + piece.size), value)
    return made


def _say(made: fx.Node, of: fx.Node) -> fx.Node:
    """Let a new node tell what it was made of."""
    made.meta.update((key, of.meta[key]) for key in _TOLD if key in of.meta)
    return made


def by_linear(narrow: Mapping[fx.Node, Piece]) -> dict[fx.Node, dict[fx.Node, Piece]]:
    """The pieces of each linear layer."""
    found: dict[fx.Node, dict[fx.Node, Piece]] = {}
    for value, piece in narrow.items():
        found.setdefault(piece.linear, {})[value] = piece
    return found


def _runs(own: Mapping[fx.Node, Piece]) -> list[list[tuple[fx.Node, Piece]]]:
    """Pieces in order, as runs in which each begins where the one before it ends."""
    runs: list[list[tuple[fx.Node, Piece]]] = []
    end = None
    for value, piece in sorted(own.items(), key=lambda item: item[1].start):
        if piece.start != end:
            runs.append([])
        runs[-1].append((value, piece))
        end = piece.start + piece.size
    return runs


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
