"""A range of blocks that some steps skip: whole segments in a row, what they make that others read, and what enters in
its place. What a skipped range yields is what entered, and what the range added when it was computed."""

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from toca_compile.errors import PolicyError
from toca_compile.ir.gates import FilteredInput
from toca_compile.ir.graph import ancestors, operand_nodes, source_line, uncast, value_of
from toca_compile.ir.plan import Skip
from toca_compile.ir.program import BlockRange, Entry, Probe, Program, Stream
from toca_compile.ir.types import AxisTypes, Site, TokenAxis, Type

aten = torch.ops.aten

_LAYERS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.convolution.default, aten.conv2d.default)


def find_range(program: Program, skipped: Set[int], skip: Skip) -> BlockRange:
    """The range that holds the sites ``skipped``.

    Raises:
        PolicyError: they are no whole blocks in a row, or make something that is no stream of tokens, or a threshold
            has no blocks before them to be measured on.
    """
    assert program.types is not None
    names = {s.index: s.name for s in program.sites}
    touched = [i for i, s in enumerate(program.segments) if set(s.sites) & skipped]
    first, last = touched[0], touched[-1] + 1
    left = [names[i] for s in program.segments[first:last] for i in s.sites if i not in skipped]
    if left:
        raise PolicyError(f"only whole blocks in a row can be skipped, and {left[0]} stands among those to skip")
    inside = {n for s in program.segments[first:last] for n in s.nodes}
    read = {n for s in program.segments[last:] for n in s.inputs} | set(
        program.module.graph.output_node().all_input_nodes
    )  # fmt: skip
    outputs = tuple(n for s in program.segments[first:last] for n in s.outputs if n in read)
    # What branches are added to enters; where they start may lie far before (a skip from an early block).
    entered = [_residual(s, inside) for s in program.sites if s.index in skipped]
    sources = [n for n in entered if n not in inside]
    # A stream that no site starts from (text that a joint attention updates) is known by the addition that made it, or
    # the concatenation (with registers).
    entering = [n for s in program.segments[first:last] for n in s.inputs if n not in inside]
    order = {node: i for i, node in enumerate(program.module.graph.nodes)}
    made = (aten.add.Tensor, aten.cat.default)
    added = sorted((n for n in entering if n.target in made), key=order.__getitem__, reverse=True)
    candidates = list(dict.fromkeys([*sources, *added]))
    tokens = {f for s in program.sites for f in s.axis.factors}
    for node in outputs:
        if not any(f in tokens for dim in program.types.type_of(node) for f in dim):
            raise PolicyError(f"the blocks cannot be skipped: {_told(node)} is made among them and read after them")
        if node in program.writes:
            raise PolicyError(
                f"the blocks cannot be skipped: {_told(node)} is made among them, and written to an input"
            )
    entries = [_entry(program.types, node, candidates, tokens) if skip.residual else None for node in outputs]
    numbered = enumerate(zip(outputs, entries, strict=True), len(program.sites))
    probe = None
    if skip.threshold is not None:
        probe = _change(program, first, sources) if skip.gate.first else _input(program, first, last, skip)
        probe = replace(probe, groups=program.types.groups)
    return BlockRange(first, last, tuple(Stream(i, *stream) for i, stream in numbered), probe)


def _residual(site: Site, inside: Set[fx.Node]) -> fx.Node:
    """The stream that a site's branch is added to, before blocks cast it."""
    node = next(n for n in operand_nodes(site.add) if site.output not in ancestors([n], stop=[site.source]))
    before = uncast(node)
    while before is not None and node in inside:
        node, before = before, uncast(before)
    return node


def _entry(types: AxisTypes, node: fx.Node, sources: Sequence[fx.Node], tokens: Set[int]) -> Entry | None:
    """The entering stream of a value's kind, or several that make it up along one dimension, or one that holds the same
    in another layout."""
    wanted = types.type_of(node)

    def matches(source: fx.Node, type_: Type) -> bool:
        """Equal but for features, which each linear layer numbers anew."""
        sizes = tuple(types.factors.size(dim) for dim in type_)
        same = zip(types.type_of(source), type_, strict=False)
        return tuple(value_of(source).shape) == sizes and all(a == b or not tokens & {*a, *b} for a, b in same)

    for source in sources:
        if matches(source, wanted):
            return Entry((source,))
    for d, dim in enumerate(wanted):
        parts, joined = types.factors.segments(dim), []
        while parts:
            # A source may be several parts, joined before (registers before text).
            fitting = [
                (s, held)
                for s in sources
                for own in types.type_of(s)[d : d + 1]
                if (held := types.factors.segments(own)) == parts[: len(held)]
                and matches(s, (*wanted[:d], own, *wanted[d + 1 :]))
            ]
            if not fitting:
                break
            source, held = max(fitting, key=lambda fit: len(fit[1]))
            joined.append(source)
            parts = parts[len(held) :]
        if joined and not parts:
            return Entry(tuple(joined), d)
    for source in sources:
        given = [f for dim in types.type_of(source) for f in dim]
        target = [f for dim in wanted for f in dim]
        if len(set(target)) == len(target) and sorted(given) == sorted(target):
            sizes = tuple(types.factors.size((f,)) for f in given)
            return Entry((source,), 0, sizes, tuple(given.index(f) for f in target))
    return None


def _input(program: Program, first: int, last: int, skip: Skip) -> Probe:
    """What the first linear layer is given on the way of the picture's tokens into the range, and what of the range
    makes it."""
    sites = [program.sites[i] for s in program.segments[first:last] for i in s.sites]
    block = [site for site in sites if site.block == sites[0].block]
    main = max((site.axis for site in block), key=lambda axis: axis.size)
    site = next(site for site in block if site.axis == main)
    inside = [n for s in program.segments[first:last] for n in s.nodes]
    own, reached = set(inside), {site.source}
    for node in inside:
        if reached.isdisjoint(node.all_input_nodes):
            continue
        reached.add(node)
        if node.target in _LAYERS:
            value = next(n for n in node.all_input_nodes if n in reached)
            break
    else:
        raise PolicyError(f"no linear layer reads the stream {_told(site.source)}: its input is not measured")
    needed = ancestors([value], within=own.__contains__)
    if not needed.isdisjoint(s.output for s in sites):
        raise PolicyError(f"what {_told(value)} is made of is computed among the blocks to skip: it is not measured")
    nodes = tuple(n for n in inside if n in needed)
    given = tuple(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in needed))
    places = _places(program.types, value, main, skip.gate) if isinstance(skip.gate, FilteredInput) else None
    return Probe(given or (value,), nodes, value, at_each_step=skip.gate.adds_up, filter=places)


def _places(types: AxisTypes | None, value: fx.Node, axis: TokenAxis, gate: FilteredInput) -> tuple[Any, ...]:
    """Where the picture lies in a value, and how it is filtered."""
    assert types is not None
    if axis.grid is None:
        raise PolicyError(
            "the picture's height and width in tokens are not known, and it is filtered over them: "
            "optimize(grid=(h, w))"
        )
    dims = [d for d, dim in enumerate(types.type_of(value)) if set(dim) & set(axis.factors)]
    if not dims or dims != list(range(dims[0], dims[-1] + 1)):
        raise PolicyError(f"the tokens of {_told(value)} lie in dimensions {dims}: they are not filtered")
    return dims[0], len(dims), (axis.frames, *axis.grid), axis.offset, gate.power


def _change(program: Program, first: int, sources: Sequence[fx.Node]) -> Probe:
    """What changes of the stream of the picture's tokens from before the first block to before the range."""
    assert program.types is not None
    before = [i for s in program.segments[:first] for i in s.sites]
    if not before:
        raise PolicyError("a threshold is measured on the blocks before those to skip: compute at least one of them")
    main = max((program.sites[i].axis for i in before), key=lambda axis: axis.size)
    stream = next(program.sites[i].source for i in before if program.sites[i].axis == main)
    kind = program.types.type_of(stream)
    # Its first value that a segment hands out: branches before may be of other tokens (of a frame's places alone).
    given = {n for s in program.segments for n in (*s.inputs, *s.outputs)}
    starts = (program.sites[i].source for i in before)
    start = next((s for s in starts if s in given and program.types.type_of(s) == kind), None)
    enters = next((s for s in sources if program.types.type_of(s) == kind), None)
    if start is None or enters is None:
        raise PolicyError(f"the stream {_told(stream)} does not enter the blocks to skip: their change is not measured")
    return Probe((start, enters), (), enters, start)


def _told(node: fx.Node) -> str:
    return f"{node.name} ({source_line(node)})"
