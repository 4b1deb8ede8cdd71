"""Flex attention as one op: an attention whose scores and mask are functions of indices, compiled with it.

torch has it as a call that takes graphs among its arguments, which is no op of tensors. Here those graphs stand under a
name, which tells all that they do.
"""

import copy
import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import _pytree as pytree

from toca_compile.ops.registry import op

higher_order = torch.ops.higher_order

ALL = 1 << 30
"""A block as large as this holds all queries and keys: then no block is left out."""


@dataclass(frozen=True)
class Flex:
    """A call of flex attention but for its tensors: its arguments behind query, key and value, flattened, None for each
    tensor. ``blocks``: how many of those say which blocks of keys queries read; ``reads``: which indices, of ``"b"``,
    ``"h"``, ``"q"`` and ``"k"``, its functions read; ``whole``: no block is left out."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    tensors: tuple[int, ...]
    blocks: int
    reads: frozenset[str]
    whole: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, others: Sequence[Tensor]) -> Tensor:
        """The attention's result, ``[batch, heads, queries, features]``."""
        if query.device.type == "cpu" and isinstance(query.shape[-2], torch.SymInt):
            # Inductor has no kernel there for a number of queries that it is not told.
            return self.rows(query, key, value, others, torch.arange(query.shape[-2])[None])
        result: Tensor = higher_order.flex_attention(query, key, value, *self._arguments(others))[0]
        return result

    def _arguments(self, others: Sequence[Tensor]) -> tuple[Any, ...]:
        """Those behind query, key and value."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.tensors, others, strict=True):
            leaves[place] = tensor
        arguments: tuple[Any, ...] = pytree.tree_unflatten(leaves, self.spec)
        return arguments

    def rows(self, query: Tensor, key: Tensor, value: Tensor, others: Sequence[Tensor], index: Tensor) -> Tensor:
        """The result for queries at the places ``index``."""
        score, blocks, scale, options, *read = self._arguments(others)
        of_score, of_mask = (tuple(part) for part in (*read, (), ())[:2])
        score, mask = _by_index(score), _by_index(blocks[-1])
        if query.device.type == "cpu":
            return _written_out(query, key, value, (_with(score, of_score), _with(mask, of_mask)), scale, index)

        def scored(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
            return score(s, b, h, rest[-1][b, q], k, *rest[:-1])

        def left(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
            return mask(b, h, rest[-1][b, q], k, *rest[:-1])

        one = torch.ones(1, 1, 1, dtype=torch.int32, device=query.device)
        every = BlockMask.from_kv_blocks(
            one, one[..., None] * 0, BLOCK_SIZE=ALL, mask_mod=left, seq_lengths=(query.shape[-2], key.shape[-2])
        )
        which = index.to(torch.int32).expand(query.shape[0], -1)
        result: Tensor = higher_order.flex_attention(
            query, key, value, scored, every.as_tuple(), scale, options, (*of_score, which), (*of_mask, which)
        )[0]
        return result


def _with(function: Callable[..., Tensor], buffers: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """A function of indices with the buffers that it reads."""
    return lambda *indices: function(*indices, *buffers)


def _by_index(function: Any) -> Any:
    """A function whose look-ups by an index are ops, as a transform needs them to be."""
    if not isinstance(function, fx.GraphModule):
        return function
    made = fx.GraphModule(function, copy.deepcopy(function.graph))
    for node in made.graph.find_nodes(op="call_function", target=operator.getitem):
        named = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if all(isinstance(index, fx.Node) for index in named):
            node.target, node.args = torch.ops.aten.index.Tensor, (node.args[0], list(named))
    made.recompile()
    return made


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    functions: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    scale: float,
    index: Tensor,
) -> Tensor:
    """The attention as torch defines it where nothing compiles it, of queries at the places ``index``."""
    score, mask = functions
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    weights = query.float() @ key.float().mT * scale
    places = [torch.arange(size, device=query.device) for size in (*weights.shape[:2], weights.shape[3])]

    def one(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(mask(b, h, q, k), score(s, b, h, q, k), -torch.inf)

    mapped: Callable[..., Tensor] = one
    rows = index.expand(query.shape[0], -1)
    for dims in ((0, None, None, None, 0), (0, None, None, 0, None), (0, None, 0, None, None), (0, 0, None, 0, None)):
        mapped = torch.vmap(mapped, dims)
    weights = mapped(weights, places[0], places[1], rows, places[2]).softmax(-1).nan_to_num(0.0)  # 0: it reads none
    return weights.to(value.dtype) @ value


KNOWN: dict[str, Flex] = {}
"""By name."""


@op("flex_attention(Tensor query, Tensor key, Tensor value, Tensor[] others, str name) -> Tensor")
def flex_attention(query: Tensor, key: Tensor, value: Tensor, others: list[Tensor], name: str) -> Tensor:
    """The flex attention ``name`` of ``KNOWN``.

    Args:
        query, key, value: ``[batch, heads, tokens, features]``; keys and values may have fewer heads.
        others: the tensors that say which blocks are read, and those that its functions read.
    """
    return KNOWN[name](query, key, value, others)


@op("flex_attention_rows(Tensor query, Tensor key, Tensor value, Tensor[] others, str name, Tensor index) -> Tensor")
def flex_attention_rows(
    query: Tensor, key: Tensor, value: Tensor, others: list[Tensor], name: str, index: Tensor
) -> Tensor:
    """The flex attention ``name`` for the queries at the places ``index`` (int64 ``[batch, k]``, or ``[1, k]``) alone,
    with its functions but without its blocks, which are of queries side by side."""
    return KNOWN[name].rows(query, key, value, others, index)


def named(arguments: Sequence[Any]) -> tuple[list[Tensor], str]:
    """The tensors and the name of a call with these arguments behind query, key and value."""
    score, blocks, *_ = arguments
    leaves, spec = pytree.tree_flatten(tuple(arguments))
    tensors = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    kept = tuple(None if i in tensors else leaf for i, leaf in enumerate(leaves))
    flex = Flex(
        kept,
        spec,
        tensors,
        sum(isinstance(leaf, Tensor) for leaf in blocks),
        _read(score, 1) | _read(blocks[-1], 0),
        any(isinstance(leaf, int) and leaf >= ALL for leaf in blocks),
    )
    text = repr((spec, *(_text(leaf) for leaf in kept)))
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    KNOWN.setdefault(name, flex)
    return [leaves[i] for i in tensors], name


def _read(function: Callable[..., Any], first: int) -> frozenset[str]:
    """Which of its indices a function reads, the first of which is its argument numbered ``first``."""
    if not isinstance(function, fx.GraphModule):
        return frozenset("bhqk")
    inputs = function.graph.find_nodes(op="placeholder")
    return frozenset(letter for letter, node in zip("bhqk", inputs[first:], strict=False) if node.users)


def _text(leaf: Any) -> str:
    if not isinstance(leaf, fx.GraphModule):
        return repr(leaf)
    state = [f"{name} {value.tolist()}" for name, value in leaf.state_dict().items()]
    return "\n".join([leaf.code, *state])
