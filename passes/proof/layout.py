"""Layout: where the rows of a restricted branch lie in its values, and what of it cannot be gathered or scattered so.

Of the dimensions that hold tokens the first becomes one of rows, and the others go. An op that counts dimensions gets
those back, of size 1. So frames and patches in neighbouring dimensions are one of rows, and so are windows beside
samples and places within them beside features::

    [(b windows), heads, places, d]      →      [(b K), heads, d], and for an attention [(b K), heads, 1, d]
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from toca_compile.ir.graph import operand_nodes
from toca_compile.ir.spec import Dims
from toca_compile.ir.types import AxisTypes, FactorPos, RowProof
from toca_compile.passes.proof.follow import Blocked, Branch, label_at, occurrence_of
from toca_compile.rules.registry import RULES, Work


def reads_whole(types: AxisTypes, node: fx.Node, proof: RowProof) -> list[bool]:
    """For each operand of an op of the branch, whether the op reads it for all tokens, or for all of a window, and not
    by its rows. One op may read one value both ways: an attention of a value with itself."""
    if node not in proof.tokens:  # an op with several results, of which the first is not needed
        return [False] * len(operand_nodes(node))
    return [not all(leaf_places(types, node, proof, dims)[0]) for dims in types.specs[node].operands]


def leaf_places(
    types: AxisTypes, node: fx.Node, proof: RowProof, dims: Dims
) -> tuple[tuple[FactorPos | None, ...], tuple[FactorPos | None, ...]]:
    """Where the tokens and the batch lie in an operand of ``node`` (its dimensions ``dims``); None: it broadcasts."""
    if node not in proof.tokens:
        return (), ()
    spec = types.specs[node]

    def locate(places: tuple[FactorPos, ...]) -> tuple[FactorPos | None, ...]:
        labels = [label_at(types, node, spec.results[0], o) for o in places]
        return tuple(occurrence_of(types, node, dims, label) if label else None for label in labels)

    return locate(proof.tokens[node]), locate(proof.batch[node])


def span(places: Sequence[FactorPos | None]) -> tuple[int, int]:
    """The dimensions that hold these factors, first and last; (−1, −1) where there are none."""
    dims = dims_of(places)
    return (dims[0], dims[-1]) if dims else (-1, -1)


def dims_of(places: Sequence[FactorPos | None]) -> list[int]:
    """The dimensions that hold these factors, in order."""
    return sorted({p.dim for p in places if p is not None})


def check_layout(types: AxisTypes, branch: Branch, proof: RowProof) -> Blocked | None:
    """What in a proven restriction cannot be gathered or scattered as rows."""
    for node, places in proof.tokens.items():
        if any(FactorPos(d, i) not in places for d in dims_of(places)[1:] for i in range(len(types.type_of(node)[d]))):
            return Blocked(node, "spreads the tokens over several dimensions")
        ends = node in (branch.source, branch.output) or node in proof.stale_inputs
        together = _together(types, node, places, proof.batch[node])
        if ends and not together and not (_whole(types, node, places) and _whole(types, node, proof.batch[node])):
            return Blocked(node, "has tokens or samples in one dimension with something else")
        if ends and len({p.dim for p in proof.batch[node]}) > 1:
            return Blocked(node, "has samples in several dimensions")
    for node in proof.placed:
        # Their places are those of the rows where these are all that is counted, for each sample.
        places, samples = proof.tokens[node], proof.batch[node]
        apart = len(dims_of(places)) == 1 and _whole(types, node, places) and _whole(types, node, samples)
        if not apart or dims_of(samples) not in ([], [0]) or node in proof.parts:
            return Blocked(node, next(iter(types.specs[node].because.values()), "counts its queries"))
    for node in proof.rows:
        spec = types.specs.get(node)
        if spec is not None and restored(types, node, proof) is None:
            return Blocked(node, "spreads the tokens over several dimensions")
        for i, (operand, dims) in enumerate(zip(operand_nodes(node), spec.operands if spec else (), strict=False)):
            tokens, batch = leaf_places(types, node, proof, dims)
            if not any(tokens) or (operand in proof.tokens and None not in tokens):
                continue
            pointwise = RULES[node.target].pointwise  # type: ignore[index]
            if by_row(types, node, proof, tokens):
                if own_rows(types, node, proof, operand, dims) is None:
                    return Blocked(node, "reads a value that varies along part of the token axis only")
                continue
            together = _together(types, operand, tokens, batch) and node not in {*proof.windows, *proof.parts}
            partly = None in tokens or not (together or _whole(types, operand, tokens))  # type: ignore[arg-type]
            if partly and not (pointwise and _aligned(types, operand, tokens)):
                return Blocked(node, "reads a value that varies along part of the token axis only")
            shared = proof.batch[node] and not any(batch)
            # A fused attention's mask broadcasts as operands of a pointwise op do.
            mask = i == 3 and RULES[node.target].work is Work.ATTENTION  # type: ignore[index]
            if shared and not (pointwise or mask):
                return Blocked(node, "reads a table of tokens that all samples share")
            if None in batch and any(batch):
                return Blocked(node, "reads a value that varies along part of the batch only")
            if not together and not _whole(types, operand, batch if any(batch) else ()):  # type: ignore[arg-type]
                return Blocked(node, "reads a value with samples in one dimension with something else")
    return None


def restored(types: AxisTypes, node: fx.Node, proof: RowProof) -> frozenset[int] | None:
    """Which operands an op that counts dimensions reads by rows of tokens that are spread: they need their dimensions
    back. None where that cannot be: the op spreads tokens itself, not all that it reads by rows are spread alike, or
    its rows do not come to lie in the first dimension that has tokens."""
    spread = [len(dims_of(proof.tokens.get(n, ()))) > 1 for n in (node, *operand_nodes(node))]
    if RULES[node.target].any_rank or not any(spread):  # type: ignore[index]
        return frozenset()
    rows = _by_rows(types, node, proof)
    given = [proof.tokens[operand_nodes(node)[i]] for i in rows]
    if not any(spread[1:]) or len({(len(dims_of(places)), _ahead(places)) for places in given}) != 1:
        return None
    if node not in proof.tokens:
        return frozenset(rows)
    dims, lands = dims_of(proof.tokens[node]), proof.tokens[node][_ahead(given[0])].dim
    return frozenset(rows) if lands == dims[0] or dims[-1] - dims[0] + 1 == len(dims) else None


def _by_rows(types: AxisTypes, node: fx.Node, proof: RowProof) -> list[int]:
    whole = reads_whole(types, node, proof)
    return [i for i, n in enumerate(operand_nodes(node)) if n in proof.tokens and not whole[i]]


def _ahead(places: Sequence[FactorPos]) -> int:
    """Which of the tokens' factors stands first: rows lie in its dimension."""
    return min(range(len(places)), key=lambda t: _order(places[t]))


def _order(place: FactorPos) -> tuple[int, int]:
    return place.dim, place.index


def by_row(types: AxisTypes, reader: fx.Node, proof: RowProof, tokens: Sequence[FactorPos | None]) -> bool:
    """Whether each row of an op reads a part of a value of its own: where the value has some of the factors of the
    tokens (its ``tokens``), or the op has them in another order than the axis."""
    at = proof.tokens[reader]
    plain = _whole(types, reader, at) or _together(types, reader, at, proof.batch[reader])
    return not plain or (None in tokens and not RULES[reader.target].pointwise)  # type: ignore[index]


@dataclass(frozen=True)
class OwnRows:
    """How a value is taken apart for the rows that read it (the last arguments of ``toca::gather_own``): the factors of
    its dimensions, and for each the number of the token factor that it is, −2 if it numbers samples, −1 of others; the
    sizes of all token factors; of what is left, in which order it lies (−1: the rows, −2: samples), and how many of
    that each dimension holds."""

    sizes: tuple[int, ...]
    kinds: tuple[int, ...]
    tokens: tuple[int, ...]
    order: tuple[int, ...]
    groups: tuple[int, ...]


def own_rows(types: AxisTypes, reader: fx.Node, proof: RowProof, operand: fx.Node, dims: Dims) -> OwnRows | None:
    """How an operand (its dimensions ``dims`` in the op's spec) is taken apart for the rows of ``reader``; None where
    it cannot be."""
    tokens, batch = leaf_places(types, reader, proof, dims)
    at, rule = proof.tokens[reader], RULES[reader.target]  # type: ignore[index]
    wide, own, size = types.type_of(reader), types.type_of(operand), types.factors.size
    numbered = [p for p in batch if p is not None]
    if reader in proof.windows or reader in proof.parts or len(numbered) not in (0, len(batch)):
        return None
    given = [] if rule.any_rank else [proof.tokens[operand_nodes(reader)[i]] for i in _by_rows(types, reader, proof)]
    ahead = _ahead(given[0] if given else at)
    # Among values that broadcast, dimensions are the reader's, from the last on; else they are the operand's.
    aligned = rule.pointwise or rule.work is Work.ATTENTION
    shift = len(wide) - len(own) if aligned else 0
    lie: Sequence[FactorPos | None] = at if aligned else tokens
    samples, held = (proof.batch[reader], wide) if aligned else (numbered, own)
    astray = any(p and p.dim + shift != q.dim for p, q in zip(tokens, lie, strict=True) if q)
    if shift < 0 or astray or lie[ahead] is None or numbered != sorted(numbered, key=_order):
        return None
    first, kinds = lie[ahead].dim, list[int]()  # type: ignore[union-attr]
    order, groups = list[int](), list[int]()
    for d in range(len(held)):
        places = [FactorPos(d - shift, i) for i in range(len(own[d - shift]))] if d >= shift else []
        here = [tokens.index(p) if p in tokens else -2 if p in batch else -1 for p in places]
        made = rest = [kinds.count(-1) + n for n in range(here.count(-1))]
        kinds += here
        if d in (first, *dims_of(samples)):
            of = [FactorPos(d, i) for i in range(len(held[d]))]
            made = list(dict.fromkeys(-1 if p in lie else -2 if p in samples else 0 for p in of))
            if rest or 0 in made:
                return None
        elif d in dims_of(lie):  # rows are none of it: it goes, or, where dimensions are counted, is of size 1
            if -2 in here or (rest and (rule.pointwise or len(rest) < len(here))):
                return None
            if rule.pointwise:
                continue
        order += made
        groups.append(len(made))
    if order.count(-2) != bool(proof.batch[reader]) or order.count(-1) != 1:
        return None
    sizes = tuple(size((f,)) for dim in own for f in dim)
    of_tokens = tuple(size((wide[p.dim][p.index],)) for p in at)
    return OwnRows(sizes, tuple(kinds), of_tokens, tuple(order), tuple(groups))


def _aligned(types: AxisTypes, node: fx.Node, places: Sequence[FactorPos | None]) -> bool:
    """Whether an operand that broadcasts along some of the tokens holds the others in dimensions of their own."""
    there = [p for p in places if p is not None]
    return all(len({p for p in there if p.dim == d}) == len(types.type_of(node)[d]) for d in {p.dim for p in there})


def _together(
    types: AxisTypes, node: fx.Node, tokens: Sequence[FactorPos | None], batch: Sequence[FactorPos | None]
) -> bool:
    """Whether samples and tokens fill one dimension, sample by sample."""
    places = [*batch, *tokens]
    if not any(batch) or None in places or len({p.dim for p in places if p is not None}) > 1:
        return False
    first, _ = span(places)
    return places == [FactorPos(first, i) for i in range(len(types.type_of(node)[first]))]


def _whole(types: AxisTypes, node: fx.Node, places: tuple[FactorPos, ...]) -> bool:
    """Whether the places fill whole neighbouring dimensions of the value, in order (or there are none)."""
    if not places:
        return True
    first, last = span(places)
    held = [FactorPos(d, i) for d in range(first, last + 1) for i in range(len(types.type_of(node)[d]))]
    return list(places) == held
