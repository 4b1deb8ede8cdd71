"""Programs: a graph cut into segments, and the rewritten variants of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from toca_compile.ir.actions import Action, Keep
from toca_compile.ir.state import Slot
from toca_compile.ir.types import Attention, AxisTypes, Layout, Site


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
    fragment: bool = False  # whether it is one graph of several that Dynamo made of a model
    types: AxisTypes | None = None
    attentions: tuple[Attention, ...] = ()
    sites: tuple[Site, ...] = ()
    clock: tuple[fx.Node, ...] = ()  # the inputs that tell the denoising time
    segments: tuple[Segment, ...] = ()
    layouts: tuple[Layout, ...] = ()  # of tokens, as the inputs tell them

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


@dataclass(frozen=True)
class Form:
    """What a variant does at one site, and the part of what is kept that it reads or writes. The numbers of a step are
    none of it: one variant serves all steps whose sites have these forms."""

    action: Action
    keep: Keep

    @classmethod
    def of(cls, action: Action, keep: Keep) -> "Form":
        """The form of an action in a step."""
        return cls(action.form(), action.touches(keep))

    def __str__(self) -> str:
        keep = self.keep
        kept = {"scores": keep.score, "stale inputs": keep.stale_inputs, "keys": keep.keys, "by token": keep.by_token}
        extras = [name for name, there in kept.items() if there]
        extras = ["output", *extras] if self.action.dense and keep.history is not None else extras
        return f"{self.action}" + (f" [{', '.join(extras)}]" if extras else "")


@dataclass(frozen=True)
class Variant:
    """A rewritten graph: its first inputs are the segment's inputs numbered ``values``, then ``slots``. ``ranks``:
    how the plan selects tokens has a part in it."""

    module: fx.GraphModule
    values: tuple[int, ...]
    slots: tuple[Slot, ...]
    ranks: bool = False
