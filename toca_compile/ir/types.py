"""What the analysis found in a graph: axes of values, attention, sites, blocks. All of it is host data about nodes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import fx

from toca_compile.ir.factors import Factor, Factors, Product
from toca_compile.ir.spec import AxisSpec

Type = tuple[Product, ...]  # one product of factors per dimension


class StepKind(str, Enum):
    """The kind of a whole step."""

    FULL = "full"
    PARTIAL = "partial"
    FORECAST = "forecast"
    REUSE = "reuse"
    SKIP = "skip"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class FactorPos:
    """One factor in the type of a value: the ``index``-th factor of dimension ``dim``."""

    dim: int
    index: int


@dataclass
class AxisTypes:
    """The type of every tensor value of a graph, and the spec of every call by which it was inferred. ``groups``: of
    processes that share the graph's work, by name; ``processes``: the factors that number them."""

    factors: Factors
    results: dict[fx.Node, tuple[Type, ...]] = field(default_factory=dict)
    specs: dict[fx.Node, AxisSpec] = field(default_factory=dict)
    unknown: dict[fx.Node, str] = field(default_factory=dict)  # why a call has no spec
    labels: dict[fx.Node, dict[str, Product]] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    processes: set[Factor] = field(default_factory=set)

    def type_of(self, node: fx.Node, result: int = 0) -> Type:
        """Dimensions of a value in their finest form."""
        return tuple(self.factors.resolve(d) for d in self.results[node][result])

    def label(self, node: fx.Node, name: str) -> Product:
        """The factors that a label of the node's spec stands for."""
        return self.factors.resolve(self.labels[node][name])

    def number_processes(self) -> set[Factor]:
        """The factors that number processes, in their finest form."""
        return set(self.factors.resolve(self.processes))


@dataclass(frozen=True)
class TokenAxis:
    """An index space of tokens: the one that an attention's queries run over.

    ``grid`` is the picture's height and width in tokens, where the graph or the user tells it; ``frames`` such pictures
    start at ``offset`` of the axis (registers or text may stand before them).
    """

    name: str
    factors: Product
    size: int
    grid: tuple[int, int] | None = None
    offset: int = 0
    frames: int = 1


@dataclass(frozen=True)
class Layout:
    """``tokens`` in a row, of which the first ``frames · height · width`` are pictures."""

    tokens: int
    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True)
class Attention:
    """An attention in the graph, fused or written out.

    ``axis`` and ``key_axis`` are the factors that the queries and the keys run over, ``lead`` those of the dimensions
    before them (samples and heads). ``map`` is the node holding the
    post-softmax map where the model itself makes one.
    """

    node: fx.Node
    axis: Product
    key_axis: Product
    lead: Product
    operands: tuple[fx.Node, ...]  # query, key, value of a fused attention; empty where written out
    map: fx.Node | None = None
    value: fx.Node | None = None


@dataclass(frozen=True)
class RowProof:
    """The proof that a branch is token-wise: for each node from its input to its output, where in its type the token
    factors and the batch factors lie. Restricting all of them to the same rows commutes with every op between.

    ``stale_inputs`` are values of the branch that the proof takes from the cache (the attention of a parallel block):
    the branch is token-wise in them and in its input together. ``rows`` are the nodes that a partial step computes.
    ``dense_inputs`` are values of the branch that it reads for all tokens (keys and values of an attention); its input,
    which it may read so too, is none of them: that is there at every step. ``updates`` are, where those are token-wise
    in the branch's input, the proofs. In the values of ``windows`` the tokens are a part of a concatenation, from a
    start on and of a size; ``cuts`` are the ops that cut it out, ``joins`` the concatenations and which of their
    operands it is. The values of ``parts`` have a part of the tokens alone, from a start on and of a size; ``unions``
    are the concatenations of all parts, with the part that each operand is. The ops ``placed`` count their rows, and
    are told which they are. ``parted``: rows read values whole within their windows, each its own.
    """

    tokens: Mapping[fx.Node, tuple[FactorPos, ...]]
    batch: Mapping[fx.Node, tuple[FactorPos, ...]]
    rows: frozenset[fx.Node]
    stale_inputs: tuple[fx.Node, ...] = ()
    dense_inputs: tuple[fx.Node, ...] = ()
    updates: "tuple[RowProof, ...]" = ()
    windows: Mapping[fx.Node, tuple[int, int]] = field(default_factory=dict)
    cuts: frozenset[fx.Node] = frozenset()
    joins: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    parts: Mapping[fx.Node, tuple[int, int]] = field(default_factory=dict)
    unions: Mapping[fx.Node, tuple[tuple[fx.Node, tuple[int, int]], ...]] = field(default_factory=dict)
    placed: frozenset[fx.Node] = frozenset()
    parted: bool = False


@dataclass(frozen=True)
class ScoreSource:
    """Whose attention ranks a site's tokens: the site that holds it, and which of the attention's keys they are (None:
    all)."""

    site: int
    window: tuple[int, int] | None = None


@dataclass(frozen=True)
class Site:
    """A residual branch ``x ← x + g(M(f(x)))`` on a token axis. ``output`` is M's output, before the gate: the cached
    value. ``row_proof`` holds the proof that the branch may be computed on a subset of tokens, ``reason`` why not."""

    index: int
    name: str
    kind: str
    axis: TokenAxis
    batch: Product  # the factors that number samples
    source: fx.Node
    output: fx.Node
    add: fx.Node
    region: frozenset[fx.Node]
    attention: tuple[Attention, ...]
    row_proof: RowProof | None
    reason: str | None
    query_proof: RowProof | None = None  # the proof that it may be, given keys and values of all tokens
    no_queries: str | None = None  # or why not
    score_by_keys: ScoreSource | None = None  # an attention that has the tokens as keys
    score_by_queries: ScoreSource | None = None  # a cross-attention that has them as queries
    block: int = 0
    depth: int = 0  # position of the block in its stack
    depths: int = 1  # number of blocks in the stack
    fragment: bool = False  # whether its graph is one of several that a model was split into
