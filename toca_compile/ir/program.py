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
class Program:
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

    run: Callable[[Program], Program]

    @property
    def name(self) -> str:
        """The pass as it is called in logs, dumps and errors."""
        return self.run.__name__.replace("_", "-")


@dataclass(frozen=True)
class Entry:
    """The stream that enters a range in the place of one of its outputs: values ``nodes``, joined along ``dim`` if they
    are several. Where it leaves in another layout (frames beside places, places beside frames) it is taken apart into
    dimensions of ``sizes``, which are permuted by ``order`` and joined to the output's shape."""

    nodes: tuple[fx.Node, ...]
    dim: int = 0
    sizes: tuple[int, ...] = ()
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockRange:
    """The segments from ``first`` to before ``last``, which some steps skip, and what they make that others read.

    ``entries`` are, for each output, what enters the range in its place; None where nothing of its kind does.
    ``probe``: the stream before the first block of all, and where it enters the range.
    """

    first: int
    last: int
    outputs: tuple[fx.Node, ...]
    entries: tuple[Entry | None, ...]
    probe: tuple[fx.Node, fx.Node] | None = None

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """All values that enter, each once."""
        return tuple(dict.fromkeys(n for entry in self.entries if entry is not None for n in entry.nodes))


class Mode(Flag):
    """What a variant does at one site: compute it (and keep nothing, the output, scores, held values), or not."""

    PLAIN = 0  # compute, keep nothing
    STORE = auto()  # compute and keep the output
    SCORE = auto()  # with STORE: also the tokens' scores
    HOLD = auto()  # with STORE: also the values that a partial step takes from the cache
    DIFF = auto()  # with STORE: also the differences to the full steps before
    PARTIAL = auto()  # compute the selected tokens
    QUERIES = auto()  # with PARTIAL: through an attention
    KEYS = auto()  # with STORE or QUERIES: keep what the queries read whole
    KEPT = auto()  # with QUERIES: take that from the cache
    UPDATE = auto()  # with KEPT: after the selected tokens' part of it is made anew
    REUSE = auto()
    FORECAST = auto()
    TOKENS = auto()  # with any: each token has a history of its own

    @property
    def label(self) -> str:
        """The mode as it is printed."""
        return "+".join(m.name.lower() for m in type(self) if m in self and m.name) or "plain"

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Slot:
    """An input of a variant beside the segment's values: a buffer or a host number of one of its sites.

    ``kind`` is ``cache``, ``held``, ``keys`` (what queries read whole), ``diff``, ``stamp``, ``score`` (a site's own)
    or ``scores of`` (its scorer's) for buffers, ``k``, ``step``, ``since``, ``site``, ``spacing`` or ``power`` for
    numbers. ``position`` counts the segment's sites, ``index`` a site's held values or keys, or is the order of a
    difference, spacing or power. In the graphs that stand in for a skipped range ``position`` counts its outputs, and
    ``change`` is the stream's before it.
    """

    kind: str
    position: int
    index: int = 0

    @property
    def is_buffer(self) -> bool:
        """Whether it is a tensor that lives as long as the run."""
        return self.kind in ("cache", "held", "diff", "stamp", "score", "scores of", "keys", "change")


@dataclass(frozen=True)
class Variant:
    """A rewritten graph: its first inputs are the segment's inputs numbered ``values``, then ``slots``."""

    module: fx.GraphModule
    values: tuple[int, ...]
    slots: tuple[Slot, ...]
