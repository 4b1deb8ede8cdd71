"""The graph of one variant while it is being built: what the emissions of actions and histories write to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

import toca_compile.ops  # noqa: F401  (defines the toca:: ops)
from toca_compile.ir.graph import module_of, value_of
from toca_compile.ir.program import Form, Segment, Variant
from toca_compile.ir.selectors import TokenSelector
from toca_compile.ir.state import Number, Slot, State
from toca_compile.ir.types import AxisTypes, Site

aten = torch.ops.aten
collectives = torch.ops._c10d_functional
T = TypeVar("T")


class Builder:
    """A graph whose inputs are values first, then slots, each made when it is first asked for.

    Args:
        values: the nodes that the graph is given, in order.
    """

    def __init__(self, values: Sequence[fx.Node]) -> None:
        self.graph = fx.Graph()
        self.values = tuple(dict.fromkeys(values))
        self.slots: dict[Slot, fx.Node] = {}
        self.env: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(self.values):
            self.env[node] = self.graph.placeholder(f"in{i}_{node.name}")
            self.env[node].meta["val"] = value_of(node)
        self._inputs = {node: self.env[node] for node in self.values}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call."""
        return self.graph.call_function(target, args, kwargs)

    def slot(self, kind: State | Number, position: int, index: int = 0) -> fx.Node:
        """The graph's input for a buffer or a number. One buffer is one input, or the order of its writes and reads
        would be lost."""
        slot = Slot(kind, position, index)
        if slot not in self.slots:
            last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
            first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
            where = self.graph.inserting_before(first) if first is not None else self.graph.inserting_after(last)
            with where:
                self.slots[slot] = self.graph.placeholder(slot.name)
        return self.slots[slot]

    def cast(self, value: fx.Node, like: fx.Node) -> fx.Node:
        """``value``, a new tensor, in the dtype of ``like``."""
        return self.call(aten._to_copy.default, value, dtype=value_of(like).dtype)

    def agreed(self, value: fx.Node, groups: Sequence[str], reduction: str | None = None) -> fx.Node:
        """``value`` as all processes of ``groups`` have it then: reduced over them (``"sum"``, ``"max"``), or the
        first one's. Where one decides otherwise than the rest, what they send each other does not belong together."""
        for group in groups:
            if reduction is None:
                value = self.call(collectives.broadcast.default, value, 0, group)
            else:
                value = self.call(collectives.all_reduce.default, value, reduction, group)
            value = self.call(collectives.wait_tensor.default, value)
        return value

    def finish(self, results: Sequence[fx.Node]) -> Variant:
        """The variant that yields ``results``, without the inputs that nothing reads."""
        self.graph.output(tuple(results))
        self.graph.eliminate_dead_code()
        read = set(self.graph.output_node().all_input_nodes)
        values = []
        for i, node in enumerate(self.values):
            if self._inputs[node].users or self._inputs[node] in read:
                values.append(i)
            else:
                self.graph.erase_node(self._inputs[node])
        kept = [slot for slot, node in self.slots.items() if node.users]
        for slot, node in self.slots.items():
            if slot not in kept:
                self.graph.erase_node(node)
        return Variant(module_of(self.graph), tuple(values), tuple(kept))


class SegmentBuilder(Builder):
    """The graph of a segment whose sites have forms.

    Args:
        dense: rows are computed for all tokens and blended by mask, the plain meaning of a restriction.
    """

    def __init__(
        self,
        segment: Segment,
        sites: Sequence[Site],
        forms: Sequence[Form],
        types: AxisTypes,
        selector: TokenSelector,
        *,
        dense: bool,
    ) -> None:
        super().__init__(segment.inputs)
        self.segment, self.sites, self.forms = segment, sites, forms
        self.types, self._selector, self.dense = types, selector, dense
        self.ranks = False  # whether anybody asked for the selector

    @property
    def selector(self) -> TokenSelector:
        """How tokens are selected, which only some emissions need to know."""
        self.ranks = True
        return self._selector

    def copy(self, node: fx.Node, values: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
        """The model's own op."""
        values = self.env if values is None else values
        return self.graph.node_copy(node, lambda n: values[n])

    def as_made(self, node: fx.Node, value: fx.Node, position: int) -> fx.Node:
        """What a buffer of a site holds in the dtype of the value that it stands for: itself, where that is its own."""
        history = self.forms[position].keep.history
        own = value_of(node)
        kept = history.storage.seen(own) if history is not None else own
        return self.cast(value, node) if kept.dtype != own.dtype else value


class Emissions(dict[type, T]):
    """How each kind of action, history or score is emitted, by its class or the nearest base."""

    def of(self, cls: type) -> Callable[[T], T]:
        """Register the decorated emission."""

        def add(emission: T) -> T:
            self[cls] = emission
            return emission

        return add

    def find(self, thing: object) -> T:
        """The emission of an object.

        Raises:
            KeyError: there is none.
        """
        for base in type(thing).__mro__:
            if base in self:
                return self[base]
        raise KeyError(f"nothing emits {type(thing).__name__}")
