"""Restrict: a proven branch on the selected rows only: the same ops on restricted operands.

Values of the branch become rows; values from outside that vary along the tokens (positions, RoPE tables, masks) are
gathered with them. Tokens in several dimensions (frames and patches) become one dimension of rows::

    y = linear(norm(x), W)        →        y = linear(norm(gather_tokens(x, index)), W)
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from toca_compile.ir.calls import Call
from toca_compile.ir.graph import operand_nodes, value_of
from toca_compile.ir.spec import Dims
from toca_compile.ir.types import FactorPos, RowProof
from toca_compile.passes.infer_axes import call_of
from toca_compile.passes.proof.layout import by_row, dims_of, leaf_places, own_rows, reads_whole, restored, span
from toca_compile.passes.variants.emit import SegmentBuilder
from toca_compile.passes.variants.narrow import by_linear, emit_pieces, pieces
from toca_compile.rules.registry import RULES

toca = torch.ops.toca
aten = torch.ops.aten

Told = tuple[Any, tuple[Any, ...]]


def place(proof: RowProof, node: fx.Node) -> tuple[int, ...]:
    """Where the tokens and the batch lie in a value: the last arguments of gather and scatter."""
    first, last = span(proof.tokens[node])
    return (first, _dim(proof.batch[node])) + ((last - first + 1,) if last > first else ())


def _causal(call: Call, operands: Sequence[fx.Node]) -> Told:
    return toca.causal_attention.default, (*operands, call.kwargs.get("scale"), call.kwargs.get("enable_gqa", False))


def _flexed(call: Call, operands: Sequence[fx.Node]) -> Told:
    query, key, value, *others = operands
    return toca.flex_attention_rows.default, (query, key, value, others, call.args[4])


TOLD: dict[Any, Callable[[Call, Sequence[fx.Node]], Told]] = {
    aten.scaled_dot_product_attention.default: _causal,
    toca.flex_attention.default: _flexed,
}
"""Of an op that counts its rows, and what it is given: the op that is told which they are, as its last argument."""


class Restriction:
    """The rows of one branch in the graph of a variant.

    Args:
        builder: of the variant; its environment holds the values from outside, for all tokens.
        index: the selected tokens, int64 ``[batch, k]``.
        k: their number.
        whole: what the branch reads whole, for all tokens, where that is not to be read from the environment.
    """

    def __init__(
        self,
        builder: SegmentBuilder,
        proof: RowProof,
        index: fx.Node,
        k: Callable[[], fx.Node],
        whole: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        self.emit, self.copy, self.values, self.types = (
            builder.call,
            builder.graph.node_copy,
            builder.env,
            builder.types,
        )
        self.proof, self.index, self.k = proof, index, k
        self.whole = whole or {}
        self.rows: dict[fx.Node, fx.Node] = {}
        self.gathered: dict[fx.Node, fx.Node] = {}  # values from outside
        self.restored: set[fx.Node] = set()  # ops that were given the dimensions in which tokens are spread

    def run(
        self,
        nodes: Sequence[fx.Node],
        given: Mapping[fx.Node, fx.Node],
        others: "Sequence[Restriction]" = (),
    ) -> dict[fx.Node, fx.Node]:
        """The rows of the branch's nodes (``nodes`` in order) and of what it reads from outside, from the values
        ``given`` of its input and what it holds. ``others`` have made rows already, the same ones where they lie
        alike."""
        for other in others:
            self.rows |= {n: row for n, row in other.rows.items() if n in self.proof.tokens and self._alike(other, n)}
        for node, value in given.items():
            if node in self.rows:
                continue
            self.rows[node] = self.emit(toca.gather_tokens.default, value, self.index, *place(self.proof, node))
        narrow = by_linear(pieces(self.proof.rows, self.types))
        for node in nodes:
            if node in self.rows:
                continue
            if node in narrow:
                x, *weights = operand_nodes(node)
                self.rows |= emit_pieces(self.emit, self.rows[x], [self.values[w] for w in weights], narrow[node])
            elif node in self.proof.rows and not narrow.keys() & set(node.all_input_nodes):
                self.rows[node] = self._node(node)
        return {**self.gathered, **self.rows}

    def _alike(self, other: "Restriction", node: fx.Node) -> bool:
        mine, theirs = self.proof, other.proof
        alike = mine.tokens[node] == theirs.tokens.get(node) and mine.batch[node] == theirs.batch.get(node)
        where = ((proof.windows.get(node), proof.parts.get(node)) for proof in (mine, theirs))
        return alike and len(set(where)) == 1

    def _node(self, node: fx.Node) -> fx.Node:
        if node.target is operator.getitem and node.args[0] in self.proof.cuts:
            return self.rows[node.args[0]]  # type: ignore[index]
        if node in self.proof.joins:
            return self.rows[self.proof.joins[node]]
        if node in self.proof.unions:
            rows = [self.rows[operand] for operand, _ in self.proof.unions[node]]
            starts = [start for _, (start, _) in self.proof.unions[node]]
            return self.emit(toca.join_tokens.default, rows, self.index, starts, *place(self.proof, node))
        if node in self.proof.cuts:
            # The rows are of that part already, or stand for rows of it and of others.
            return self.rows[operand_nodes(node)[0]]
        if node.target is operator.getitem:
            part = self.emit(node.target, self.rows[node.args[0]], node.args[1])  # type: ignore[index]
            return self._merged(node, part) if node.args[0] in self.restored else part
        spec = self.types.specs[node]
        whole = reads_whole(self.types, node, self.proof)
        back = restored(self.types, node, self.proof)
        assert back is not None
        operands: list[fx.Node] = []
        for i, (operand, dims, all_of_it) in enumerate(zip(operand_nodes(node), spec.operands, whole, strict=True)):
            if operand in self.rows and not all_of_it:
                operands.append(self._apart(operand) if i in back else self.rows[operand])
                continue
            tokens, batch = leaf_places(self.types, node, self.proof, dims)
            own = any(tokens) and by_row(self.types, node, self.proof, tokens)
            operands.append(self._own(operand, node, dims) if own else self._leaf(operand, node, tokens, batch))
            if any(tokens):
                self.gathered[operand] = operands[-1]
        sized = self._sized(node)  # before the op that reads it
        if node in self.proof.placed:
            return self._placed(node, operands)
        copy = self.copy(node, in_turn(operands, self.values))
        copy.meta.pop("val", None)  # it has other sizes now
        copy.args = tuple(sized.get(i, arg) for i, arg in enumerate(copy.args))
        if not back:
            return copy
        self.restored.add(node)
        return self._merged(node, copy)

    def _placed(self, node: fx.Node, operands: list[fx.Node]) -> fx.Node:
        """An op that counts its rows, told which they are among those that it counted."""
        start, _ = self.proof.windows.get(node, (0, 0))
        index = self.emit(aten.add.Tensor, self.index, start) if start else self.index
        told, arguments = TOLD[node.target](call_of(node), operands)
        return self.emit(told, *arguments, index)

    def _apart(self, operand: fx.Node) -> fx.Node:
        """Rows of tokens that are spread over several dimensions with all of them: rows in the first, the others 1."""
        value = self.rows[operand]
        for dim in dims_of(self.proof.tokens[operand])[1:]:
            value = self.emit(aten.unsqueeze.default, value, dim)
        return value

    def _merged(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """And with one again, in the value of ``node`` (of several results, in each)."""
        dims = dims_of(self.proof.tokens.get(node, ()))
        if len(dims) < 2 or not isinstance(value_of(node), torch.Tensor):
            return value
        if dims[-1] - dims[0] + 1 == len(dims):  # whichever has the rows
            return self.emit(aten.flatten.using_ints, value, dims[0], dims[-1])
        return self.emit(aten.squeeze.dims, value, dims[1:])

    def _sized(self, node: fx.Node) -> dict[int, Any]:
        """The arguments, by position, that state the size of the result: that of K rows."""
        stated = RULES[node.target].size_arg  # type: ignore[index]
        shape = self._shape(node) if stated is not None else []
        if not isinstance(stated, tuple):
            return {} if stated is None else {stated: shape}
        if not isinstance(shape[0], fx.Node):  # the tokens lie in another dimension
            return {}
        count = len(call_of(node).args[stated[0]])
        return dict.fromkeys(stated, [self.emit(operator.floordiv, shape[0], count)] * count)

    def _shape(self, node: fx.Node) -> list[Any]:
        """The shape of a value with its token factors replaced by K, in one dimension."""
        tokens = self.proof.tokens[node]
        first, *others = dims_of(tokens)
        shape: list[Any] = []
        for d, product in enumerate(self.types.type_of(node)):
            size = self.types.factors.size(f for i, f in enumerate(product) if FactorPos(d, i) not in tokens)
            if d == first:
                shape.append(self.k() if size == 1 else self.emit(operator.mul, self.k(), size))
            elif d not in others:
                shape.append(size)
        return shape

    def _leaf(
        self,
        operand: fx.Node,
        reader: fx.Node,
        tokens: Sequence[FactorPos | None],
        batch: Sequence[FactorPos | None],
    ) -> fx.Node:
        """A value from outside the branch, as ``reader`` needs it on the rows.

        What it broadcasts along is first expanded as far as needed: a batch, for a table (or a mask of attention) that
        all samples share, and the other tokens, for a value that each frame has one of.
        """
        value = self.whole.get(operand) or self.values[operand]
        (first, last), (begin, end) = span(tokens), span(self.proof.tokens.get(reader, ()))
        pointwise, of = RULES[reader.target].pointwise, value_of(reader)  # type: ignore[index]
        if not any(tokens):
            if end > begin and pointwise:
                shape = [1] * (of.dim() - value_of(operand).dim()) + list(value_of(operand).shape)
                gone = dims_of(self.proof.tokens[reader])[1:]
                return self.emit(aten.reshape.default, value, [s for d, s in enumerate(shape) if d not in gone])
            return value
        batch_dim = _dim(batch)
        if (batch_dim < 0 and self.proof.batch[reader]) or end > begin:
            shape = [1] * (of.dim() - value_of(operand).dim()) + list(value_of(operand).shape)
            first, last, batch_dim = begin, end, _dim(self.proof.batch[reader])
            for d in range(of.dim()):
                if d == batch_dim or begin <= d <= end:
                    shape[d] = of.shape[d]
            value = self.emit(aten.expand.default, value, shape)
        if reader in self.proof.windows:
            begin, size = self.proof.windows[reader]
            value = self.emit(aten.slice.Tensor, value, first, begin, begin + size)
        index = self.index
        if reader in self.proof.parts:
            # What tokens of other parts get here is read by none (``unions``).
            begin, size = self.proof.parts[reader]
            index = self.emit(aten.clamp.default, self.emit(aten.sub.Tensor, index, begin), 0, size - 1)
        merged = (last - first + 1,) if last > first else ()
        return self.emit(toca.gather_tokens.default, value, index, first, batch_dim, *merged)

    def _own(self, operand: fx.Node, reader: fx.Node, dims: Dims) -> fx.Node:
        """Of a value from outside the branch (or one for all tokens) the part that each row of ``reader`` reads."""
        how = own_rows(self.types, reader, self.proof, operand, dims)
        assert how is not None
        value = self.whole.get(operand) or self.values[operand]
        parts = (list(part) for part in (how.sizes, how.kinds, how.tokens, how.order, how.groups))
        return self.emit(toca.gather_own.default, value, self.index, *parts)


def in_turn(operands: Sequence[fx.Node], others: Mapping[fx.Node, fx.Node]) -> Callable[[fx.Node], fx.Node]:
    """The mapping by which a copied op gets these tensor operands by position, since one value may be read twice and
    differently; ``others`` has what else it is given."""
    given = iter(operands)
    return lambda node: next(given) if isinstance(value_of(node), torch.Tensor) else others[node]


def _dim(places: Sequence[FactorPos | None]) -> int:
    """The one dimension that holds these factors; −1 where there are none."""
    return places[0].dim if places and places[0] is not None else -1
