"""Follow: where the index space of one dimension of a value lies in the values that it is made from.

The walk goes from a branch's output back to its input, op by op: the label of the dimension in the op's spec says where
it is in each operand. Cutting a part out of a dimension (an image's tokens out of those of text and image together)
makes the walk one of that *window*, until it meets the concatenation that the window is an operand of. Where parts are
joined that all lead back to the same whole (positions for the image's tokens, none for the text's), the walk goes
through each of them, a *part* of the whole.
"""

import operator
from dataclasses import dataclass, field

from torch import fx

from toca_compile.ir.factors import Product
from toca_compile.ir.graph import ancestors, operand_nodes, source_line
from toca_compile.ir.spec import Dims
from toca_compile.ir.types import AxisTypes, FactorPos

Window = tuple[int, int]  # start and size
Trace = dict[fx.Node, FactorPos]  # where one factor lies in each value of a branch


@dataclass(frozen=True)
class Branch:
    """What is computed between two values: ``region`` holds the nodes after ``source`` up to and with ``output``. At
    ``held`` values of it, which are taken from the last full step, a walk ends as at the source."""

    source: fx.Node
    output: fx.Node
    region: frozenset[fx.Node]
    held: tuple[fx.Node, ...] = ()

    def to(self, node: fx.Node) -> "Branch":
        """The part of it that makes one of its values; nothing is held there."""
        # The region is convex, so that the walk need not leave it.
        return Branch(self.source, node, frozenset(ancestors([node], within=self.region.__contains__)))


@dataclass(frozen=True)
class Blocked:
    """Why a factor is not carried: the op, and what it does."""

    node: fx.Node
    why: str

    def __str__(self) -> str:
        return f"{self.node.target} {self.why} ({source_line(self.node)})"


@dataclass
class Walk:
    """What a walk meets beside places.

    Attributes:
        whole: values of the branch that an op reads whole, where that is allowed; None: it stops the walk.
        whole_reads: the ops, and which of their operands, that read so.
        row_reads: and those that do not.
        windows: the values in which the factor is a part of a concatenation, and which: start and size.
        cuts: the ops that cut a window out.
        joins: the concatenations that end one, and the operand that it is.
        parts: the values that are one part of the whole, and which: start and size.
        unions: the concatenations of all parts: of each operand, in order, which part it is.
        parted: whether something is read whole along some of the tokens' factors, and by the others.
        placed: the ops that must be told which tokens they are given.
        visited: the ops that the factor passes.
        seen: for every value asked for, in which window, and which part.
    """

    whole: dict[fx.Node, None] | None = None
    whole_reads: set[tuple[fx.Node, int]] = field(default_factory=set)
    row_reads: set[tuple[fx.Node, int]] = field(default_factory=set)
    windows: dict[fx.Node, Window] = field(default_factory=dict)
    cuts: set[fx.Node] = field(default_factory=set)
    joins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    parts: dict[fx.Node, Window] = field(default_factory=dict)
    unions: dict[fx.Node, tuple[tuple[fx.Node, Window], ...]] = field(default_factory=dict)
    parted: bool = False
    placed: set[fx.Node] = field(default_factory=set)
    visited: set[fx.Node] = field(default_factory=set)
    seen: dict[fx.Node, tuple[Window | None, Window | None]] = field(default_factory=dict)

    def again(self) -> bool:
        """Whether something that is read by some of the tokens' factors is read whole by others: a window's keys. Then
        forget all but that, to walk again and stop there."""
        if self.whole is None or self.whole_reads.isdisjoint(self.row_reads):
            return False
        self.whole.clear()
        vars(self).update(vars(Walk(self.whole, self.whole_reads)))
        return True

    @property
    def straight(self) -> bool:
        """Whether the factor is whole all the way."""
        return not self.cuts and not self.joins and not self.unions


def follow(
    types: AxisTypes, branch: Branch, start: FactorPos, walk: Walk | None = None, factor: int = 0
) -> Trace | Blocked:
    """Where the factor at ``start`` of the branch's output lies in each value back to its source (or a held value), or
    what stops it. ``walk`` takes what else is met. In parts of a concatenation that are of several factors it is the
    one numbered ``factor``."""
    return _Follow(types, branch, walk or Walk(), factor).run(start)


class _Follow:
    def __init__(self, types: AxisTypes, branch: Branch, walk: Walk, factor: int) -> None:
        self.types, self.branch, self.walk = types, branch, walk
        self.place: Trace = {}
        self.labels: dict[fx.Node, tuple[str, int]] = {}
        self.whole: Product | None = None  # what a concatenation of all parts runs over
        self.factor = factor  # which of the factors of a part that was cut out is followed

    def run(self, start: FactorPos) -> Trace | Blocked:
        output = self.branch.output
        reason = self.demand(output, start, None)
        pending = {output}
        while pending and reason is None:
            node = max(pending)  # the last of them in the graph
            pending.discard(node)
            if self._ends(node):
                continue
            self.walk.visited.add(node)
            if node.target is operator.getitem:
                pending.add(node.args[0])  # type: ignore[arg-type]
                continue
            reason = self.operands(node, pending)
        return self.place if reason is None else reason

    def demand(
        self, node: fx.Node, at: FactorPos, window: Window | None, part: Window | None = None, result: int = 0
    ) -> Blocked | None:
        """Ask for a value (or one result of an op) along the dimension at ``at``."""
        twice = Blocked(node, "is needed along two different axes")
        if node.target is operator.getitem:
            if self.place.setdefault(node, at) != at or self._windowed(node, window, part):
                return twice
            return self.demand(node.args[0], at, window, part, node.args[1])  # type: ignore[arg-type]
        if self._ends(node):
            if window is not None or part is not None:
                return Blocked(node, "is needed along a part of its tokens")
            return None if self.place.setdefault(node, at) == at else twice
        spec = self.types.specs.get(node)
        if spec is None:
            return Blocked(node, self.types.unknown.get(node, "has no rule"))
        label = label_at(self.types, node, spec.results[result], at)
        parts = spec.concat.get(label[0], ()) if label is not None else ()
        joined = len(parts) == 1 or (parts and (window is not None or part is None))
        placed = label is not None and label[0] in spec.placed and self.walk.whole is not None
        passes = label is not None and (label[0] in spec.carried or label[0] in spec.windows or joined or placed)
        if label is None or not passes:
            if label is None or label[0] not in spec.mixed:
                return Blocked(node, "rearranges the tokens")
            return Blocked(node, spec.because.get(label[0], "mixes the tokens"))
        if self.labels.setdefault(node, label) != label or self._windowed(node, window, part):
            return twice
        if result == 0:
            self.place[node] = at
        if placed:
            self.walk.placed.add(node)
        return None

    def operands(self, node: fx.Node, pending: set[fx.Node]) -> Blocked | None:
        """Ask an op's operands for what it passes on."""
        spec, label, window = self.types.specs[node], self.labels[node], self.walk.windows.get(node)
        part = self.walk.parts.get(node)
        if len(spec.concat.get(label[0], ())) > 1 and window is None:
            return self._union(node, label[0], pending)
        if label[0] in spec.windows:
            cut = spec.windows[label[0]]
            if cut.step != 1 or len(self.types.label(node, cut.source)) != 1:
                return Blocked(node, "rearranges the tokens")
            if part is not None:
                if part != (cut.start, spec.sizes[label[0]]) or self.types.label(node, cut.source) != self.whole:
                    return Blocked(node, "joins tokens that it cuts out elsewhere")
                self.walk.cuts.add(node)
                pending.add(operand_nodes(node)[0])
                at = occurrence_of(self.types, node, spec.operands[0], (cut.source, 0))
                assert at is not None
                return self.demand(operand_nodes(node)[0], at, None)
            if window is None:
                self.factor = label[1]  # of several that the tokens are made of
            begin = cut.start + (window[0] if window is not None else 0)
            window, label = (begin, spec.sizes[label[0]]), (cut.source, 0)
            self.walk.cuts.add(node)
        for i, (operand, dims) in enumerate(zip(operand_nodes(node), spec.operands, strict=True)):
            inside = operand in self.branch.region or operand is self.branch.source
            within = window
            at = occurrence_of(self.types, node, dims, label)
            if at is not None and (node, i) in self.walk.whole_reads:
                at, self.walk.parted = None, True
            if label[0] in spec.concat:
                covered = self._part(node, label[0], dims, window)
                if covered is None:
                    continue
                if not inside:
                    return Blocked(node, "joins tokens from elsewhere")
                self.walk.joins[node] = operand
                at, within = covered
            elif not inside:
                continue
            if at is None:
                if self.walk.whole is None:
                    return Blocked(node, "mixes the tokens")
                self.walk.whole[operand] = None
                self.walk.whole_reads.add((node, i))
                continue
            self.walk.row_reads.add((node, i))
            reason = self.demand(operand, at, within, part)
            if reason is not None:
                return reason
            pending.add(operand)
        if label[0] in spec.concat and node not in self.walk.joins:
            return Blocked(node, "joins the tokens with others")
        return None

    def _union(self, node: fx.Node, label: str, pending: set[fx.Node]) -> Blocked | None:
        """Ask each operand of a concatenation for the part of the tokens that it is."""
        spec, begin = self.types.specs[node], 0
        self.whole = self.whole or self.types.label(node, label)
        if self.types.label(node, label) != self.whole or node in self.walk.parts:
            return Blocked(node, "joins the tokens with others")
        found: list[tuple[fx.Node, Window]] = []
        for name in spec.concat[label]:
            of = [(o, dims) for o, dims in zip(operand_nodes(node), spec.operands, strict=True) if (name,) in dims]
            if len(of) != 1 or name in spec.windows:  # written over a part of what was there
                return Blocked(node, "rearranges the tokens")
            operand, dims = of[0]
            if operand not in self.branch.region and operand is not self.branch.source:
                return Blocked(node, "joins tokens from elsewhere")
            part, count = (begin, spec.sizes[name]), len(self.types.label(node, name))
            if not count:  # it would be no factor's
                return Blocked(node, "joins the tokens with a single one")
            at = occurrence_of(self.types, node, dims, (name, min(self.factor, count - 1)))
            reason = self.demand(operand, at, None, part) if at is not None else Blocked(node, "rearranges the tokens")
            if reason is not None:
                return reason
            pending.add(operand)
            found.append((operand, part))
            begin += spec.sizes[name]
        self.walk.unions[node] = tuple(found)
        return None

    def _part(
        self, node: fx.Node, label: str, dims: Dims, window: Window | None
    ) -> tuple[FactorPos, Window | None] | None:
        """Where the tokens lie in an operand of a concatenation, if it is the one that the window covers, and which
        part of the operand they are, if not all of it."""
        spec, begin = self.types.specs[node], 0
        for name in spec.concat[label]:
            if window in ((begin, spec.sizes[name]), None):  # None: it is the only part
                cut = spec.windows.get(name)
                source = cut.source if cut is not None else name
                one = cut is None or len(self.types.label(node, source)) == 1
                at = occurrence_of(self.types, node, dims, (source, self.factor if cut is None else 0))
                if at is None or not one or self.factor >= len(self.types.label(node, name)):
                    return None
                return at, (cut.start, spec.sizes[name]) if cut is not None else None
            begin += spec.sizes[name]
        return None

    def _ends(self, node: fx.Node) -> bool:
        """Whether the walk goes no further than this value."""
        return node is self.branch.source or node in self.branch.held

    def _windowed(self, node: fx.Node, window: Window | None, part: Window | None) -> bool:
        """Note the window in which a value is needed, and which part it is; whether it was needed otherwise."""
        if window is not None:
            self.walk.windows.setdefault(node, window)
        if part is not None:
            self.walk.parts.setdefault(node, part)
        return self.walk.seen.setdefault(node, (window, part)) != (window, part)


def label_at(types: AxisTypes, node: fx.Node, dims: Dims, at: FactorPos) -> tuple[str, int] | None:
    """The label that an occurrence of a value belongs to, and which of the label's factors it is."""
    index = at.index
    for label in dims[at.dim]:
        count = len(types.label(node, label))
        if index < count:
            return label, index
        index -= count
    return None


def occurrence_of(types: AxisTypes, node: fx.Node, dims: Dims, label: tuple[str, int]) -> FactorPos | None:
    """Where a label's factor lies among ``dims``, or None where the operand broadcasts along it."""
    for d, dim in enumerate(dims):
        index = 0
        for name in dim:
            if name == label[0]:
                return FactorPos(d, index + label[1])
            index += len(types.label(node, name))
    return None
