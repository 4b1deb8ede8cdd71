"""Programs: a graph cut into segments, and the rewritten variants of each."""

from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import fx

from toca_compile.ir.actions import Action, Keep
from toca_compile.ir.gates import FirstBlocks, Gate
from toca_compile.ir.graph import ancestors, value_of
from toca_compile.ir.plan import Plan
from toca_compile.ir.state import Slot
from toca_compile.ir.types import Attention, AxisTypes, Layout, Site

Kind = Hashable  # of a segment


@dataclass(frozen=True)
class Segment:
    """A convex part of the graph, run as one call: values in, nodes in graph order, values out.

    ``template`` numbers the segments that are the same graph; of those, inputs, outputs and sites correspond by
    position. A ``constant`` one depends on inputs that stay the same during a run (the text), a ``timed`` one on those
    and the denoising time; either may be a part of a block.
    """

    template: int
    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    sites: tuple[int, ...] = ()
    constant: bool = False
    timed: bool = False
    in_block: bool = False

    @property
    def kind(self) -> Kind:
        """What its variants are kept by: segments of one kind share them."""
        return self.template


@dataclass(frozen=True)
class Program:
    """What the passes work on: one captured graph and all that is known of it. A pass fills in the next field."""

    module: fx.GraphModule
    static_inputs: tuple[bool, ...]  # which placeholders are parameters and buffers
    inputs: tuple[Any, ...] = ()
    grid: tuple[int, int] | None = None
    known: tuple[bool, ...] = ()  # of which placeholders the host knows the numbers; as they lie, if nobody says
    fragment: bool = False  # whether it is one graph of several that Dynamo made of a model
    types: AxisTypes | None = None
    attentions: tuple[Attention, ...] = ()
    sites: tuple[Site, ...] = ()
    clock: tuple[fx.Node, ...] = ()  # the inputs that tell the denoising time
    segments: tuple[Segment, ...] = ()
    layouts: tuple[Layout, ...] = ()  # of tokens, as the inputs tell them
    written: tuple[int, ...] = ()  # which inputs are changed in place: what they become stands behind the results

    @property
    def placeholders(self) -> tuple[fx.Node, ...]:
        """The graph's inputs."""
        return tuple(n for n in self.module.graph.nodes if n.op == "placeholder")

    @property
    def on_host(self) -> frozenset[fx.Node]:
        """Its inputs whose numbers the host knows."""
        known = self.known or [_is_on_host(value_of(n)) for n in self.placeholders]
        return frozenset(n for n, told in zip(self.placeholders, known, strict=True) if told)

    @property
    def accelerators(self) -> tuple[torch.device, ...]:
        """The devices beside the CPU on which its inputs lie."""
        values = [value_of(n) for n in self.placeholders]
        devices = dict.fromkeys(x.device for x in values if isinstance(x, torch.Tensor))
        return tuple(device for device in devices if device.type != "cpu")

    @property
    def writes(self) -> tuple[fx.Node, ...]:
        """What the inputs ``written`` become."""
        results: Any = self.module.graph.output_node().args[0]
        return tuple(results[len(results) - len(self.written) :])

    @property
    def varying(self) -> tuple[fx.Node, ...]:
        """Its inputs that are no parameters or buffers."""
        return tuple(n for n, fixed in zip(self.placeholders, self.static_inputs, strict=True) if not fixed)


def _is_on_host(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


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
class Stream:
    """A value that leaves a range of blocks, of which is kept what a site keeps of its output. Its ``index`` is behind
    those of the sites; ``entry`` is what enters the range in its place, None where nothing of its kind does.

    ``measured``: of what a gate measures, a value like each that is kept for it, None for a number alone. ``places``:
    where the picture lies in it, if that matters: the first dimension of tokens, how many, frames, height, width, and
    the first token."""

    index: int
    output: fx.Node
    entry: Entry | None = None
    measured: tuple[fx.Node | None, ...] = ()
    places: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The value's."""
        return self.output.name


@dataclass(frozen=True)
class Probe:
    """A value that is held against what was kept of it, to know whether a range of blocks is computed.

    Attributes:
        given: the values that it is made of.
        nodes: the model's own ops that make it of them, in order.
        value: it, or what ``minus`` is subtracted from.
        minus: a value of its kind that stands before it in the graph.
        leaves: what leaves the range, where that is kept too.
        gate: what is measured of them.
        kept: before which segment it is kept at steps that compute the range.
        filter: if it is filtered, where its tokens lie: the last arguments of ``toca.sea_filter``.
        groups: of processes that share the graph's work, and must decide alike.
    """

    given: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    value: fx.Node
    minus: fx.Node | None = None
    leaves: fx.Node | None = None
    gate: Gate = field(default_factory=FirstBlocks)
    kept: int = 0
    filter: tuple[Any, ...] | None = None
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockRange:
    """The segments from ``first`` to before ``last``, which some steps skip, and what they make that others read.

    ``probe``: where a test at run time decides, what it measures; ``change`` is that, kept as what leaves the range is.
    """

    first: int
    last: int
    streams: tuple[Stream, ...]
    probe: Probe | None = None

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """What leaves."""
        return tuple(s.output for s in self.streams)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """All values that enter, each once."""
        return tuple(dict.fromkeys(n for s in self.streams if s.entry is not None for n in s.entry.nodes))

    @property
    def change(self) -> Stream | None:
        """What the blocks before the range change."""
        if self.probe is None:
            return None
        index, value, gate = self.streams[-1].index + 1, self.probe.value, self.probe.gate
        if gate.behind:  # kept as what leaves the range is
            assert self.probe.minus is not None
            return Stream(index, value, Entry((self.probe.minus,)))
        return Stream(index, value, measured=gate.keeps(value, self.probe.leaves))

    @property
    def owners(self) -> tuple[Stream, ...]:
        """All of which something is kept."""
        return self.streams if self.change is None else (*self.streams, self.change)

    def segment(self, does: str, *, corrects: bool = False) -> "StandIn":
        """The segment that does this for the range. ``corrects``: to keep what leaves it changes that, too."""
        measured = self.probe.given if self.probe is not None else ()
        if self.probe is not None and self.probe.leaves is not None and does == "keep change":
            measured = (*measured, self.probe.leaves)
        given = {"skip": self.inputs, "keep": (*self.inputs, *self.outputs)}.get(does, measured)
        owners = self.streams if does in ("skip", "keep") else self.owners[len(self.streams) :]
        return StandIn(
            template=-1,
            inputs=tuple(dict.fromkeys(given)),
            nodes=(),
            outputs=self.outputs if does == "skip" or corrects else (),
            sites=tuple(s.index for s in owners),
            does=does,
            range=self,
        )


@dataclass(frozen=True, kw_only=True)
class StandIn(Segment):
    """A segment that a plan adds to those of the program, before or behind the blocks that some of its steps skip: it
    ``"skip"``s them, or ``"keep"``s what a step that computes them makes. With a threshold there is one that ``"keep
    change"``s what the blocks before them change, and one that ``"probe"``s how far that is from what was kept."""

    does: str
    range: BlockRange

    @property
    def owners(self) -> tuple[Stream, ...]:
        """Whose buffers its variants are given, by position."""
        return tuple(s for s in self.range.owners if s.index in self.sites)

    @property
    def kind(self) -> Kind:
        return self


@dataclass(frozen=True, kw_only=True)
class Chain(Segment):
    """The segments of a step that computes no branch, as one.

    Attributes:
        at: the place of each part among the plan's segments.
        leads: for each site, by position, the first whose host numbers are the same in all steps.
    """

    parts: tuple[Segment, ...]
    at: tuple[int, ...]
    leads: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Segment], at: Sequence[int], leads: Sequence[int], read: Container[fx.Node]) -> "Chain":
        """Parts in order. ``read``: the values that something behind them asks for."""
        made: set[fx.Node] = set()
        inputs: dict[fx.Node, None] = {}
        for part in parts:
            inputs |= dict.fromkeys(n for n in part.inputs if n not in made)
            made.update(part.outputs)
        outputs = dict.fromkeys(n for part in parts for n in part.outputs if n in read)
        return cls(
            template=-1,
            inputs=tuple(inputs),
            nodes=tuple(n for part in parts for n in part.nodes),
            outputs=tuple(outputs),
            sites=tuple(i for part in parts for i in part.sites),
            parts=tuple(parts),
            at=tuple(at),
            leads=tuple(leads),
        )

    @property
    def kind(self) -> Kind:
        return (*(part.kind for part in self.parts), self.at, self.leads, self.outputs)

    def apart(self, forms: "Sequence[Form]") -> "list[tuple[Segment, tuple[Form, ...]]]":
        """Each part with what its sites do."""
        given = iter(forms)
        return [(part, tuple(islice(given, len(part.sites)))) for part in self.parts]


@dataclass(frozen=True)
class GraphPlan:
    """A plan that a graph can follow, and the blocks that its steps skip there, if any do. ``policy``: whose plan it
    is, in words."""

    plan: Plan
    range: BlockRange | None = None
    policy: str = field(default="", compare=False)


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


@dataclass(frozen=True)
class Use:
    """What a variant does with a buffer: whether what was in it matters, and whether it may be another afterwards."""

    read: bool
    written: bool

    def __or__(self, other: "Use") -> "Use":
        return Use(self.read or other.read, self.written or other.written)


def uses_of(variant: Variant) -> dict[Slot, Use]:
    """What a variant does with each of its buffers."""
    nodes = list(variant.module.graph.nodes)
    changed: set[fx.Node] = set()  # and what they are views of, as far as that may be
    for node in nodes:
        arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
        given = [
            a for a, told in zip(node.args, arguments, strict=False) if told.alias_info and told.alias_info.is_write
        ]
        changed |= ancestors(a for a in given if isinstance(a, fx.Node))
    found = {}
    for slot, node in zip(variant.slots, nodes[len(variant.values) :], strict=False):
        if slot.is_buffer:
            # Overwritten as a whole, and nothing else.
            stored = all(
                str(user.target) == "toca.store_.default" and user.args[1] is not node and not user.users
                for user in node.users
            )
            found[slot] = Use(not stored, node in changed)
    return found
