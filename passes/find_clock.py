"""FindClock: the inputs that tell the denoising time.

They are those that reach a sine before any token axis: the timestep embedding. Pictures do not, and positions are not
inputs of one dimension (nor of one beside others of size 1).
"""

from collections.abc import Callable, Sequence

import torch
from torch import fx

from toca_compile.ir.graph import value_of
from toca_compile.ir.types import AxisTypes, Site

aten = torch.ops.aten


def find_clock(inputs: Sequence[fx.Node], types: AxisTypes, sites: Sequence[Site]) -> tuple[fx.Node, ...]:
    """Those of ``inputs`` (no parameters among them) that tell the denoising time."""
    token_factors = {f for s in sites for f in s.axis.factors}

    def has_tokens(node: fx.Node) -> bool:
        dims = types.results.get(node, ())
        return any(f in token_factors for d in dims for p in d for f in types.factors.resolve(p))

    return tuple(n for n in inputs if _is_small(n) and _reaches_sine(n, has_tokens))


def _is_small(node: fx.Node) -> bool:
    value = value_of(node)
    return not isinstance(value, torch.Tensor) or sum(s != 1 for s in value.shape) <= 1


def _reaches_sine(node: fx.Node, stop: Callable[[fx.Node], bool]) -> bool:
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        if at.target in (aten.sin.default, aten.cos.default):
            return True
        fresh = [u for u in at.users if u not in seen and not stop(u)]
        seen.update(fresh)
        todo.extend(fresh)
    return False
