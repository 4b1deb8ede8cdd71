"""Programs: a graph cut into segments, and the rewritten variants of each."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import fx

from toca_compile.ir.types import Attention, AxisTypes, Site


@dataclass(frozen=True)
class Segment:
    """A convex part of the graph, run as one call: values in, nodes in graph order, values out.

    ``template`` numbers the segments that are the same graph; of those, inputs, outputs and sites correspond by
    position.
    """

    template: int
    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    sites: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unit:
    """What the passes work on: one captured graph and all that is known of it. A pass fills in the next field."""

    module: fx.GraphModule
    static_inputs: tuple[bool, ...]  # which placeholders are parameters and buffers
    inputs: tuple[Any, ...] = ()
    grid: tuple[int, int] | None = None
    types: AxisTypes | None = None
    attentions: tuple[Attention, ...] = ()
    sites: tuple[Site, ...] = ()
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline. Its name is its function's, so that logs cannot lie."""

    run: Callable[[Unit], Unit]

    @property
    def name(self) -> str:
        """The pass as it is called in logs, dumps and errors."""
        return self.run.__name__.replace("_", "-")


class Mode(Enum):
    """What a variant does at one site."""

    PLAIN = "plain"  # compute, keep nothing
    STORE = "store"  # compute and keep the output
    SCORE = "score"  # compute, keep the output and the tokens' scores
    PARTIAL = "partial"
    REUSE = "reuse"

    def __repr__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Slot:
    """An input of a variant beside the segment's values: a buffer or a host number of one of its sites.

    ``kind`` is ``cache``, ``score`` or ``stamp`` (buffers), ``k``, ``step``, ``since`` or ``site`` (numbers).
    ``position`` counts the segment's sites.
    """

    kind: str
    position: int


@dataclass(frozen=True)
class Variant:
    """A rewritten graph: its first inputs are the segment's inputs numbered ``values``, then ``slots``."""

    module: fx.GraphModule
    values: tuple[int, ...]
    slots: tuple[Slot, ...]
