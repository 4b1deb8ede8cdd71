"""Property of a rule: restricting an op's result along a carried label is the op on operands restricted along it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toca_compile.ir.calls import Call, tensors
from toca_compile.ir.spec import AxisSpec, Dim
from toca_compile.rules.registry import Rule


def restrict(tensor: Tensor, dims: Sequence[Dim], sizes: Any, label: str, index: Tensor) -> Tensor:
    """``tensor`` at ``index`` along one label, wherever in its dimensions the label lies."""
    for d, dim in enumerate(dims):
        if label not in dim:
            continue
        inner = [sizes[x] for x in dim]
        at = d + dim.index(label)
        apart = tensor.reshape(*tensor.shape[:d], *inner, *tensor.shape[d + 1 :]).index_select(at, index)
        tensor = apart.reshape(*tensor.shape[:d], -1, *tensor.shape[d + 1 :])
    return tensor


def check(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], index_of: Any) -> dict[str, bool]:
    """For every label that spec says is in the result: does the restricted op agree with the restricted result?

    ``index_of(size)`` picks a proper subset. Labels of a shape argument are restated, as the rewrite pass does.
    """
    result = rule.op(*args, **kwargs)
    spec = rule.axes(Call(args, kwargs, result))
    labels = {label for dims in spec.results for dim in dims for label in dim}
    return {label: _commutes(rule, spec, args, kwargs, result, label, index_of(spec.sizes[label])) for label in labels}


def _commutes(
    rule: Rule, spec: AxisSpec, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, label: str, index: Tensor
) -> bool:
    dims = iter(spec.operands)
    small_args, small_kwargs = pytree.tree_map_only(
        Tensor, lambda t: restrict(t, next(dims), spec.sizes, label, index), (args, kwargs)
    )
    wanted = [restrict(t, d, spec.sizes, label, index) for t, d in zip(tensors(result), spec.results, strict=True)]
    if rule.size_arg is not None:
        small_args = (*small_args[: rule.size_arg], list(wanted[0].shape), *small_args[rule.size_arg + 1 :])
    try:
        got = tensors(rule.op(*small_args, **small_kwargs))
    except (RuntimeError, IndexError):
        return False
    return all(
        g.shape == w.shape
        and torch.allclose(g.to(torch.complex64), w.to(torch.complex64), rtol=1e-4, atol=1e-5, equal_nan=True)
        for g, w in zip(got, wanted, strict=True)
    )
