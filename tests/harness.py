"""Property of a rule: restricting an op's result along a carried label is the op on operands restricted along it."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toca_compile.ir.calls import Call, tensors
from toca_compile.ir.spec import AxisSpec, Dim, Window
from toca_compile.rules.registry import Rule

IndexOf = Callable[[int], Tensor]


def draw_index(rng: Random, size: int) -> Tensor:
    """One index, a sorted subset, a shuffled one, or indices of which some are equal. Out of order they tell an op that
    looks at its neighbours, or at its own place, from one that does not."""
    chosen = rng.sample(range(size), rng.randint(1, max(1, size - 1)))
    kind = rng.randint(0, 3)
    if kind == 3:
        chosen = [rng.randrange(size) for _ in range(rng.randint(1, size + 1))]
    return torch.tensor([chosen[:1], sorted(chosen), chosen, chosen][kind])


def restrict(tensor: Tensor, dims: Sequence[Dim], sizes: Any, label: str, index: Tensor) -> Tensor:
    """``tensor`` at ``index`` along one label, if that lies in its dimensions."""
    for d, dim in enumerate(dims):
        if label in dim:
            at = d + dim.index(label)
            apart = tensor.reshape(*tensor.shape[:d], *(sizes[x] for x in dim), *tensor.shape[d + 1 :])
            apart = apart.index_select(at, index)
            return apart.reshape(
                *tensor.shape[:d], len(index) * tensor.shape[d] // sizes[label], *tensor.shape[d + 1 :]
            )
    return tensor


def claims(spec: AxisSpec) -> frozenset[str]:
    """The labels of which a spec says where in the operands they come from."""
    return spec.carried | set(spec.windows) | set(spec.concat)


def called(rule: Rule, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a call, there to be read."""
    result = rule.op(*args, **kwargs)
    collective = rule.op.namespace == "_c10d_functional"
    return torch.ops._c10d_functional.wait_tensor(result) if collective else result


def check(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], index_of: IndexOf) -> dict[str, bool]:
    """For every label of the result, whether the op treats it as a carried one, a window or a concatenation.

    ``index_of(size)`` picks the indices. What a shape argument states is restated, as the rewrite pass does.

    Raises:
        RuleError: the rule does not cover the call.
    """
    result = called(rule, args, kwargs)
    spec = rule.spec(Call(args, kwargs, result))
    inputs, outputs = tensors((args, kwargs)), tensors(result)
    labels = {label for dims in spec.results for dim in dims for label in dim if spec.sizes[label]}
    found = {}
    for label in sorted(labels):
        if label in spec.windows:
            found[label] = _is_window(spec, inputs, outputs, label)
        elif label in spec.concat:
            found[label] = _is_concatenation(spec, inputs, outputs, label)
        else:
            found[label] = _commutes(rule, spec, args, kwargs, result, label, index_of(spec.sizes[label]))
    return found


def merges(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op that calls itself indifferent to how many dimensions stand before its own is so: two neighbouring
    carried dimensions made one. Pointwise, all operands are first expanded; else only the first has such dimensions."""
    (out,) = tensors(called(rule, args, kwargs))
    spec, inputs = rule.spec(Call(args, kwargs, out)), tensors((args, kwargs))

    def merged(t: Tensor, d: int) -> Tensor:
        return t.reshape(*t.shape[:d], t.shape[d] * t.shape[d + 1], *t.shape[d + 2 :])

    def operand(t: Tensor, d: int) -> Tensor:
        if rule.pointwise:
            return merged(t.expand(out.shape), d)
        return merged(t, d) if t is inputs[0] else t

    for d in range(out.dim() - 1):
        pair = spec.results[0][d : d + 2]
        if rule.pointwise or (
            all(pair) and pair == spec.operands[0][d : d + 2] and {x for dim in pair for x in dim} <= spec.carried
        ):
            ours, named = pytree.tree_map_only(Tensor, lambda t, d=d: operand(t, d), (args, kwargs))
            if not _equal(called(rule, ours, named), merged(out, d)):
                return False
    return True


def _is_window(spec: AxisSpec, inputs: list[Tensor], outputs: list[Tensor], label: str) -> bool:
    window, size = spec.windows[label], spec.sizes[label]
    index = window.start + window.step * torch.arange(size)
    if not 0 <= int(index.min()) <= int(index.max()) < spec.sizes[window.source]:
        return False
    (source,) = (
        restrict(t, dims, spec.sizes, window.source, index)
        for t, dims in zip(inputs, spec.operands, strict=True)
        if any(window.source in dim for dim in dims)
    )
    return all(
        _equal(source, t)
        for t, dims in zip(outputs, spec.results, strict=True)
        if any(label in dim for dim in dims)
    )  # fmt: skip


def _is_concatenation(spec: AxisSpec, inputs: list[Tensor], outputs: list[Tensor], label: str) -> bool:
    begin, holds = 0, True
    for part in spec.concat[label]:
        index = torch.arange(begin, begin + spec.sizes[part])
        cut = spec.windows.get(part, Window(part, 0))
        ((own, dims),) = (
            (t, d) for t, d in zip(inputs, spec.operands, strict=True) if any(cut.source in dim for dim in d)
        )
        own = restrict(own, dims, spec.sizes, cut.source, torch.arange(cut.start, cut.start + spec.sizes[part]))
        holds &= all(
            _equal(restrict(t, dims, spec.sizes, label, index), own)
            for t, dims in zip(outputs, spec.results, strict=True)
        )
        begin += spec.sizes[part]
    return holds and begin == spec.sizes[label]


def _commutes(
    rule: Rule, spec: AxisSpec, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, label: str, index: Tensor
) -> bool:
    dims = iter(spec.operands)
    small_args, small_kwargs = pytree.tree_map_only(
        Tensor, lambda t: restrict(t, next(dims), spec.sizes, label, index), (args, kwargs)
    )
    wanted = [restrict(t, d, spec.sizes, label, index) for t, d in zip(tensors(result), spec.results, strict=True)]
    shape = list(wanted[0].shape)
    if isinstance(rule.size_arg, int):
        small_args = (*small_args[: rule.size_arg], shape, *small_args[rule.size_arg + 1 :])
    elif rule.size_arg is not None:
        count = len(args[rule.size_arg[0]])
        parts = [shape[0] // count] * count
        small_args = tuple(parts if i in rule.size_arg else arg for i, arg in enumerate(small_args))
    try:
        got = tensors(called(rule, small_args, small_kwargs))
    except (RuntimeError, IndexError):
        return False
    return all(_equal(g, w) for g, w in zip(got, wanted, strict=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    a, b = a.to(torch.complex64), b.to(torch.complex64)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
