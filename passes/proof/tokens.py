"""Tokens: where a branch's tokens may lie, and what is known of their axis (its grid).

They are the index space of an attention's queries. A fragment of a model that torch.compile split within its attention
holds none that would tell, nor does a model that mixes its tokens by convolutions or running sums alone: there they are
the rows of its linear layers. Where layers run over tokens as others do over features, the norms tell which is which.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from torch import fx

from toca_compile.ir.graph import operand_nodes
from toca_compile.ir.types import AxisTypes, FactorPos, TokenAxis
from toca_compile.rules.registry import RULES, Work, work_of


def row_factors(graph: fx.Graph, types: AxisTypes) -> set[int]:
    """What the rows of layers with weights run over beside samples, which lie in the first dimension everywhere (frames
    do in places), and what no layer takes for features: those are what its weight is told by, too. Places that a
    convolution looks around are not."""
    rows: set[int] = set()
    others: set[int] = set()
    for node in graph.nodes:
        spec = types.specs.get(node)
        if spec is None or work_of(node) is not Work.CONTRACT or len(spec.operands) < 2:
            continue
        weight = operand_nodes(node)[1]
        if RULES[node.target].trailing or weight.op in ("placeholder", "get_attr"):
            weighed = {x for dim in spec.operands[1] for x in dim}
            for x in (x for labels in spec.operands[0][1:] for x in labels):
                if x in spec.carried:
                    rows |= set(types.label(node, x))
                elif x in weighed:
                    others |= set(types.label(node, x))
    return rows - others


def layered_rows(types: AxisTypes, static: AbstractSet[fx.Node]) -> set[int]:
    """What some layers take row by row and others mix, beside samples (an MLP mixer's tokens, and its features alike):
    without what norms run over, if anything is left then. ``static``: what is made of weights alone."""
    rows, mixed, others, normed = set[int](), set[int](), set[int](), set[int]()
    for node, spec in types.specs.items():
        made = {x for dim in spec.results[0] for x in dim}
        if work_of(node) is Work.NORM and RULES[node.target].trailing:  # type: ignore[index]
            normed |= {f for x in spec.mixed for f in types.label(node, x)}
        if work_of(node) is not Work.CONTRACT:
            continue
        both = list(zip(operand_nodes(node), spec.operands, strict=True))
        weighed = {x for operand, dims in both if operand in static for dim in dims for x in dim}
        for operand, dims in both:
            for x in (x for dim in dims[1:] for x in dim if operand not in static and weighed):
                found = mixed if x not in made else others if x in weighed else rows
                found.update(types.label(node, x))
    found = rows & mixed - others
    return found - normed or found


def mixes(types: AxisTypes, rows: set[int]) -> bool:
    """Whether an op puts something together from several rows for each row: what mere samples are not for."""
    for node, spec in types.specs.items():
        before = {f for operand in operand_nodes(node)[:1] for dim in types.type_of(operand) for f in dim}
        kept = {f for x in spec.carried for f in types.label(node, x)}
        if rows & before & {f for dim in types.type_of(node) for f in dim} - kept:
            return True
    return False


def token_dims(
    types: AxisTypes, output: fx.Node, shape: Sequence[int], token_factors: set[int]
) -> list[tuple[FactorPos, ...]]:
    """Where the tokens may lie in a branch's output, best choice first.

    Tokens in neighbouring dimensions that hold nothing else (frames and patches) are one axis, if the branch allows it.
    Else the largest dimension that holds nothing else is selected from, and the others number samples. Last, all that
    the dimensions hold which have tokens: an attention's queries may run over windows of them, or a sample's alone.
    """
    dims = types.type_of(output)
    by_dim = {d: tuple(FactorPos(d, i) for i, f in enumerate(dim) if f in token_factors) for d, dim in enumerate(dims)}
    whole = [d for d, places in by_dim.items() if places and len(places) == len(dims[d])]
    single = max((p for p in by_dim.values() if p), key=lambda p: (p[0].dim in whole, shape[p[0].dim]), default=())
    run, wide = _run(whole), _run([d for d, places in by_dim.items() if places])
    choices = [tuple(o for d in run for o in by_dim[d])] if len(run) > 1 else []
    choices += [single] if single else []
    for those in (wide, [single[0].dim] if single else []):
        choices.append(tuple(FactorPos(d, i) for d in those for i in range(len(dims[d]))))
    return list(dict.fromkeys(choice for choice in choices if choice))


def fill_dims(types: AxisTypes, output: fx.Node, tokens: Sequence[FactorPos]) -> bool:
    """Whether the tokens are all that their dimensions hold."""
    return all(FactorPos(t.dim, i) in tokens for t in tokens for i in range(len(types.type_of(output)[t.dim])))


def _run(dims: Sequence[int]) -> list[int]:
    """The first neighbouring dimensions, or the last dimension where none are."""
    run: list[int] = []
    for d in dims:
        run = [*run, d] if run and d == run[-1] + 1 else run if len(run) > 1 else [d]
    return run


def axis_of(
    graph: fx.Graph, types: AxisTypes, factors: tuple[int, ...], count: int, grid: tuple[int, int] | None
) -> TokenAxis:
    size, offset, frames = types.factors.size(factors), 0, 1
    found = None
    for part in types.factors.segments(factors):
        found = _grid(graph, types, part)
        if found is not None:
            frames = types.factors.size(part) // (found[0] * found[1])
            break
        offset += types.factors.size(part)
    if grid is not None and (grid[0] * grid[1] == size or (count == 0 and grid[0] * grid[1] < size)):
        # Tokens that are not part of the picture (registers, a class token) stand before it by convention.
        found, offset, frames = grid, size - grid[0] * grid[1], 1
    name = "image" if found is not None else "tokens"
    return TokenAxis(
        name if count == 0 else f"{name}{count}", factors, size, found, offset if found else 0, frames
    )  # fmt: skip


def _grid(graph: fx.Graph, types: AxisTypes, factors: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width: the last two of the neighbouring dimensions that the axis is in the first value which has it
    as several (the patch embedding: height and width, or frames before them)."""
    for node in graph.nodes:
        for result in range(len(types.results.get(node, ()))):
            dims = types.type_of(node, result)
            for first in range(len(dims) - 1):
                for last in range(first + 1, len(dims)):
                    run = dims[first : last + 1]
                    if all(run) and tuple(f for dim in run for f in dim) == factors:
                        return types.factors.size(run[-2]), types.factors.size(run[-1])
    return None
