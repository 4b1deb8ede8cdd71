"""Programs: a graph cut into segments, and the rewritten variants of each."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

from torch import fx

from toca_compile.ir.types import Attention, AxisTypes, Site


@dataclass(frozen=True)
class Segment:
    """A convex part of the graph, run as one call: values in, nodes in graph order, values out.

    ``template`` numbers the segments that are the same graph; of those, inputs, outputs and sites correspond by
    position. A ``constant`` one depends on inputs that stay the same during a run (the text); it may be a part of a
    block.
    """

    template: int
    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    sites: tuple[int, ...] = ()
    constant: bool = False
    in_block: bool = False


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
    clock: tuple[fx.Node, ...] = ()  # the inputs that tell the denoising time
    segments: tuple[Segment, ...] = ()

    @property
    def placeholders(self) -> tuple[fx.Node, ...]:
        """The graph's inputs."""
        return tuple(n for n in self.module.graph.nodes if n.op == "placeholder")

    @property
    def varying(self) -> tuple[fx.Node, ...]:
        """Its inputs that are no parameters or buffers."""
        return tuple(n for n, fixed in zip(self.placeholders, self.static_inputs, strict=True) if not fixed)


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline. Its name is its function's, so that logs cannot lie."""

    run: Callable[[Unit], Unit]

    @property
    def name(self) -> str:
        """The pass as it is called in logs, dumps and errors."""
        return self.run.__name__.replace("_", "-")


class Mode(Flag):
    """What a variant does at one site: compute it (and keep nothing, the output, scores, held values), or not."""

    PLAIN = 0  # compute, keep nothing
    STORE = auto()  # compute and keep the output
    SCORE = auto()  # with STORE: also the tokens' scores
    HOLD = auto()  # with STORE: also the values that a partial step takes from the cache
    DIFF = auto()  # with STORE: also the differences to the full steps before
    PARTIAL = auto()
    REUSE = auto()
    FORECAST = auto()

    @property
    def label(self) -> str:
        """The mode as it is printed."""
        return "+".join(m.name.lower() for m in type(self) if m in self and m.name) or "plain"

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Slot:
    """An input of a variant beside the segment's values: a buffer or a host number of one of its sites.

    ``kind`` is ``cache``, ``held``, ``diff``, ``stamp``, ``score`` (a site's own) or ``scores of`` (its scorer's) for
    buffers, ``k``, ``step``, ``since``, ``site``, ``spacing`` or ``power`` for numbers. ``position`` counts the
    segment's sites, ``index`` a site's held values, or is the order of a difference, spacing or power.
    """

    kind: str
    position: int
    index: int = 0

    @property
    def is_buffer(self) -> bool:
        """Whether it is a tensor that lives as long as the run."""
        return self.kind in ("cache", "held", "diff", "stamp", "score", "scores of")


@dataclass(frozen=True)
class Variant:
    """A rewritten graph: its first inputs are the segment's inputs numbered ``values``, then ``slots``."""

    module: fx.GraphModule
    values: tuple[int, ...]
    slots: tuple[Slot, ...]
