"""InMemory: a variant whose host numbers are tensors, so that a graph that was recorded reads the numbers of the step,
or each sample of a batch has a weight of its own.

K stays, which is a shape. The ops that take them have an overload for it (``ops/registry.py``)::

    forecast(cache, history, move, 1)                  →      forecast.numbers(cache, history, move, 1)
"""

from collections.abc import Container

import torch
from torch import fx

from toca_compile.errors import PassError
from toca_compile.ir.graph import module_of
from toca_compile.ir.program import Variant
from toca_compile.ir.state import Slot

aten = torch.ops.aten


def in_memory(variant: Variant, device: torch.device, slots: Container[Slot] | None = None) -> Variant:
    """The variant with its numbers on a device. ``slots``: those of them; None: all but K.

    Raises:
        PassError: an op that reads one has no overload that does.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs = [n for n in variant.module.graph.nodes if n.op == "placeholder"][len(variant.values) :]
    both = zip(inputs, variant.slots, strict=True)
    held = {n for n, slot in both if (slot.is_held if slots is None else slot in slots)}
    for node in variant.module.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        if node in held:
            env[node].meta.pop("val", None)
        elif held.intersection(node.all_input_nodes):
            _take(env[node], device)
    return Variant(module_of(graph), variant.values, variant.slots, variant.ranks)


def _take(node: fx.Node, device: torch.device) -> None:
    """Let a call take tensors for numbers."""
    packet = getattr(node.target, "overloadpacket", None)
    if "numbers" not in (packet.overloads() if packet is not None else ()):
        raise PassError(f"{node.target} reads a number of the step and has no overload that takes it from memory")
    assert packet is not None
    node.target = target = packet.numbers
    args = list(node.args)
    with node.graph.inserting_before(node):
        for i, argument in enumerate(target._schema.arguments[: len(args)]):
            if str(argument.type) == "Tensor" and isinstance(args[i], int):
                args[i] = node.graph.call_function(
                    aten.full.default, ([], args[i]), {"dtype": torch.int64, "device": device}
                )
    node.args = tuple(args)
