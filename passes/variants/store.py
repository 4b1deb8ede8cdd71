"""Store: buffers that lie otherwise in memory than an emission sees them::

                                       kept  = unpack(cache)            once, before the first use
    y = cache                   ⇒      y     = kept
    scatter_tokens_(cache, …)          scatter_tokens_(kept, …)
                                       store_(cache, pack(kept))        once, behind the last

What is only written to, as a whole or at one place of a ring, is not read: ``store_(cache, y)`` becomes
``store_(cache, pack(y))``. A buffer on another device is copied from there, and back.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from toca_compile.ir.graph import value_of
from toca_compile.ir.program import Variant, uses_of
from toca_compile.ir.state import Slot
from toca_compile.ir.storage import TAIL, Storage

toca = torch.ops.toca
aten = torch.ops.aten

_WRITES: dict[Any, int] = {
    toca.store_.default: 1,
    toca.store_at_.default: 2,
    toca.store_at_.numbers: 2,
}  # which argument is written


def store(variant: Variant, storages: Mapping[Slot, Storage]) -> None:
    """Change a variant, whose values are known, to one of buffers as they lie in memory. ``storages``: of those slots
    that hold values of the model."""
    graph = variant.module.graph
    inputs = graph.find_nodes(op="placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    uses = uses_of(variant)
    changed = False
    for slot, buffer in zip(variant.slots, inputs[len(variant.values) :], strict=True):
        storage = storages.get(slot)
        seen = value_of(buffer)
        if storage is None or _alike(lies := storage.lies(seen), seen):
            continue
        users, changed = list(buffer.users), True
        buffer.meta["val"] = lies
        if all(_only_writes(user, buffer) for user in users):
            for user in users:
                at = _WRITES[user.target]
                with graph.inserting_before(user):
                    user.update_arg(at, _packed(graph, user.args[at], storage, seen))
                user.meta["val"] = lies
            continue
        with graph.inserting_before(first):
            kept = _unpacked(graph, buffer, storage, seen)
        for user in users:
            user.replace_input_with(buffer, kept)
        if uses[slot].written:
            with graph.inserting_before(graph.output_node()):
                back = _packed(graph, kept, storage, seen)
                _call(graph, toca.store_.default, buffer, back)
    if changed:
        variant.module.recompile()


def _only_writes(node: fx.Node, buffer: fx.Node) -> bool:
    """Whether a call writes to a buffer and nobody reads it there."""
    at = _WRITES.get(node.target)
    return at is not None and node.args[0] is buffer and node.args[at] is not buffer and not node.users


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _packed(graph: fx.Graph, value: Any, storage: Storage, seen: torch.Tensor) -> fx.Node:
    """A value as it lies in memory, where it is: the way from device to device is the store's."""
    return _call(graph, toca.pack.default, value, storage.dtype, TAIL) if storage.packs(seen) else value


def _unpacked(graph: fx.Graph, buffer: fx.Node, storage: Storage, seen: torch.Tensor) -> fx.Node:
    """A copy of what lies in memory, as it is seen."""
    value = buffer
    if value_of(buffer).device != seen.device:
        value = _call(graph, aten._to_copy.default, buffer, device=seen.device)
    return _call(graph, toca.unpack.default, value, storage.dtype, TAIL, seen.dtype) if storage.packs(seen) else value


def _call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    known = fx.node.map_arg((args, kwargs), value_of)
    node.meta["val"] = target(*known[0], **known[1])
    return node
