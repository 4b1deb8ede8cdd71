"""Calls of a model's one graph without what Dynamo makes of the model: its guards, and its code, which reads every
parameter from the model at each call.

Dynamo says by what expression each input of a graph is found. Of a step that takes the most from caches, only the
inputs that it reads are looked up by these; the model's result is made anew in the form that it had.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

_CONSTANTS = (type(None), bool, int, float, str)

Lookup = Callable[[dict[str, Any]], tuple[Any, ...]]


@dataclass
class Direct:
    """How one graph of a whole model is fed, and what is made of its results.

    Attributes:
        names: an expression for each of its inputs, by Dynamo, over the call's local variables ``L``.
        leaves: of the model's result: the number of one of the graph's, or −1 and a constant.
        spec: the form in which they stand in it.
    """

    names: tuple[str, ...]
    leaves: list[tuple[int, Any]]
    spec: pytree.TreeSpec
    _known: list[int] = field(default_factory=list)  # the inputs of the last call that Dynamo's guards let pass
    _lookups: dict[Sequence[int], Lookup] = field(default_factory=dict)

    @classmethod
    def of(
        cls, names: Sequence[str], scope: dict[str, Any], inputs: Sequence[Any], results: Sequence[Any], out: Any
    ) -> "Direct | None":
        """As Dynamo's code did it in a call; None where that cannot be told.

        Args:
            names: by which Dynamo finds the graph's inputs.
            scope: the local variables of the call.
            inputs, results: of the graph.
            out: what the model returned.
        """
        numbers = {id(result): i for i, result in enumerate(results)}
        values, spec = pytree.tree_flatten(out)
        if len(numbers) < len(results) or not all(id(v) in numbers or type(v) in _CONSTANTS for v in values):
            return None
        leaves = [(numbers[id(v)], None) if id(v) in numbers else (-1, v) for v in values]
        made = cls(tuple(names), leaves, spec)
        try:
            found = made.every(scope)
        except Exception:  # an expression of which Dynamo alone knows the meaning
            return None
        if any(a is not b for a, b in zip(found, inputs, strict=True)):
            return None
        return made

    def guarded(self, inputs: Sequence[Any]) -> None:
        """Take note of the inputs of a call that Dynamo's guards let pass."""
        self._known = list(map(id, inputs))

    def inputs(self, scope: dict[str, Any], places: Sequence[int], given: frozenset[int]) -> list[Any] | None:
        """The inputs at some places, the others None. None where one that belongs to the model is not the one that it
        was (``given``: those that belong to the caller)."""
        try:
            found = self._lookup(places)(scope)
        except Exception:  # the model is no longer made like that
            return None
        inputs: list[Any] = [None] * len(self.names)
        known = self._known
        for place, value in zip(places, found, strict=True):
            if id(value) != known[place] and place not in given:
                return None
            inputs[place] = value
        return inputs

    def every(self, scope: dict[str, Any]) -> tuple[Any, ...]:
        """All inputs, of a call that Dynamo's guards let pass."""
        return self._lookup(range(len(self.names)))(scope)

    def result(self, results: Sequence[Any]) -> Any:
        """What the model returns."""
        return pytree.tree_unflatten([results[i] if i >= 0 else value for i, value in self.leaves], self.spec)

    def _lookup(self, places: Sequence[int]) -> Lookup:
        found = self._lookups.get(places)
        if found is None:
            code = f"lambda L: ({''.join(f'{self.names[place]}, ' for place in places)})"
            found = self._lookups[places] = eval(code, {"torch": torch})  # Dynamo's own expressions
        return found
