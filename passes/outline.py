"""Outline: cut the graph into segments, so that each distinct block is compiled once however deep the model is.

Sites in sequence form a period (attention, MLP, attention, MLP, …). One period is a block; two blocks are the same if
their graphs match node by node, walking back in lockstep from their additions until both reach the same node, a
parameter each, or the residual stream. No module path or class name is asked. What lies outside the blocks is glue::

    embed → [attn, mlp] → [attn, mlp] → … → head      ⇒      glue, block ×28 (one template), glue
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import fx

from toca_compile.ir.graph import ancestors, in_order, outer_inputs, signature, value_of
from toca_compile.ir.program import Segment
from toca_compile.ir.types import Site


def outline(graph: fx.Graph, sites: tuple[Site, ...]) -> tuple[tuple[Segment, ...], tuple[Site, ...]]:
    """Segments in execution order, and the sites with their place in a stack of blocks."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    blocks: list[Segment] = []
    loose: list[Site] = []
    placed = list(sites)
    for group in _periods(sites):
        matched = _match_blocks(group, sites, order, len(blocks)) if len(group) > 1 else None
        if matched is None:
            loose.extend(site for members in group for site in members)
        else:
            blocks.extend(matched)
        for depth, members in enumerate(group):
            for site in members:
                placed[site.index] = replace(site, depth=depth, depths=len(group))
    for together in _overlapping(loose):
        blocks.append(_alone(together, blocks, order))
    segments = _with_glue(graph, blocks, order)
    if segments is None or not all(_holds(segment, sites) for segment in segments):
        segments = _whole(graph, sites, order)
    number = {i: b for b, s in enumerate(s for s in segments if s.sites) for i in s.sites}
    return segments, tuple(replace(s, block=number[s.index]) for s in placed)


def _periods(sites: tuple[Site, ...]) -> list[list[tuple[Site, ...]]]:
    """The sites as runs of equal periods: ``A M A M A M`` is three blocks of two."""
    shape = [
        (s.kind, s.axis, tuple(value_of(s.output).shape), s.source in s.add.all_input_nodes, _ops(s)) for s in sites
    ]
    groups: list[list[tuple[Site, ...]]] = []
    at = 0
    while at < len(sites):
        best = (1, 1)
        for period in range(1, (len(sites) - at) // 2 + 1):
            count = 1
            while shape[at : at + period] == shape[at + count * period : at + (count + 1) * period]:
                count += 1
            if count > 1:
                best = (period, count)
                break
        period, count = best
        groups.append([sites[at + i * period : at + (i + 1) * period] for i in range(count)])
        at += period * count
    return groups


def _ops(site: Site) -> tuple[str, ...]:
    """What the branch is made of, constants and all: windows that shift in every second block make a period of two."""
    return tuple(sorted(str(signature(node)) for node in site.region))


def _holds(segment: Segment, sites: Sequence[Site]) -> bool:
    """Whether a segment makes all of its sites' branches: a variant can keep, and leave out, only what it makes."""
    made = set(segment.nodes)
    return all(sites[i].region <= made for i in segment.sites)


def _match_blocks(
    group: list[tuple[Site, ...]], sites: tuple[Site, ...], order: dict[fx.Node, int], template: int
) -> list[Segment] | None:
    """The blocks of a group as segments of one template; None where they are not the same graph."""
    adds = {s.add for s in sites}
    a, b = group[-2], group[-1]
    inner = _lockstep([s.add for s in a], [s.add for s in b], adds - {s.add for s in a}, adds - {s.add for s in b})
    if inner is None:
        return None
    exemplar = sorted(inner.values(), key=order.__getitem__)
    maps = []
    for members in group:
        mapping = _bind([s.add for s in b], [s.add for s in members], set(exemplar))
        if mapping is None:
            return None
        maps.append(mapping)
    chosen = set(exemplar)
    leaves = list(dict.fromkeys(i for n in exemplar for i in n.all_input_nodes if i not in chosen))
    # A value is an output of the template if any of its blocks is asked for it from outside.
    bodies = [{m[n] for n in exemplar} for m in maps]
    live = [n for n in exemplar if any(set(m[n].users) - body for m, body in zip(maps, bodies, strict=True))]
    if any(not _is_tensor(n) for n in (*live, *leaves)):
        return None
    blocks = []
    for members, mapping in zip(group, maps, strict=True):
        nodes = tuple(sorted((mapping[n] for n in exemplar), key=order.__getitem__))
        inputs = tuple(mapping[n] for n in leaves)
        if not _convex(set(nodes), inputs) or not _alike(mapping, b, members) or len(set(inputs)) < len(inputs):
            # One value where the template has two: a branch beside another is no branch after it.
            return None
        numbers = tuple(s.index for s in members)
        blocks.append(Segment(template, inputs, nodes, tuple(mapping[n] for n in live), numbers))
        if not _holds(blocks[-1], sites):
            return None
    claimed: set[fx.Node] = set()
    for block in blocks:
        if claimed & set(block.nodes):
            return None
        claimed |= set(block.nodes)
    return blocks


def _alike(mapping: Mapping[fx.Node, fx.Node], ours: Sequence[Site], theirs: Sequence[Site]) -> bool:
    """Whether the sites of two blocks correspond: what is proven of those of one then holds of the other's."""
    return all(
        (mapping.get(a.source), mapping.get(a.output)) == (b.source, b.output)
        and {mapping.get(n) for n in a.region} == b.region
        for a, b in zip(ours, theirs, strict=True)
    )


def _lockstep(
    roots_a: list[fx.Node], roots_b: list[fx.Node], stop_a: set[fx.Node], stop_b: set[fx.Node]
) -> dict[fx.Node, fx.Node] | None:
    """Nodes of two blocks that correspond, walking back from their roots."""

    def is_leaf(u: fx.Node, v: fx.Node) -> bool:
        if u is v or u in stop_a or v in stop_b or u.op != "call_function" or v.op != "call_function":
            return True
        if signature(u) != signature(v) or len(u.all_input_nodes) != len(v.all_input_nodes):
            return True
        # A part of a tuple that is itself a leaf: cut after the part, so that only tensors cross the boundary.
        return u.target is operator.getitem and is_leaf(u.args[0], v.args[0])  # type: ignore[arg-type]

    pairs: dict[fx.Node, fx.Node] = {}
    todo = list(zip(roots_a, roots_b, strict=True))
    if any(signature(u) != signature(v) for u, v in todo):
        return None
    while todo:
        u, v = todo.pop()
        if u in pairs:
            if pairs[u] is not v:
                return None
            continue
        pairs[u] = v
        todo.extend((x, y) for x, y in zip(_operands(u), _operands(v), strict=True) if not is_leaf(x, y))
    return pairs if len(set(pairs.values())) == len(pairs) else None


def _bind(roots: list[fx.Node], targets: list[fx.Node], inner: set[fx.Node]) -> dict[fx.Node, fx.Node] | None:
    """The template over ``inner`` laid onto the block that ends in ``targets``: nodes and leaves, or None."""
    mapping: dict[fx.Node, fx.Node] = {}
    todo = list(zip(roots, targets, strict=True))
    while todo:
        u, v = todo.pop()
        if u in mapping:
            if mapping[u] is not v:
                return None
            continue
        if u in inner:
            if signature(u) != signature(v) or len(_operands(u)) != len(_operands(v)):
                return None
            todo.extend(zip(_operands(u), _operands(v), strict=True))
        elif signature(u)[2] != signature(v)[2]:
            return None
        mapping[u] = v
    body = [mapping[n] for n in inner]
    return mapping if len(set(body)) == len(body) else None


def _operands(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []

    def visit(arg: fx.Node) -> fx.Node:
        found.append(arg)
        return arg

    fx.node.map_arg((node.args, node.kwargs), visit)
    return found


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(value_of(node), (tuple, list))


def _convex(nodes: set[fx.Node], inputs: Iterable[fx.Node]) -> bool:
    """No input depends on what the segment computes."""
    return not (ancestors(inputs) & nodes)


def _overlapping(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites that share nodes (two streams in one attention), or of which each reads what is made in the other (two
    streams that read each other), together; others each for itself."""
    needs = {s.index: ancestors(s.region) for s in sites}

    def tied(a: Site, b: Site) -> bool:
        return bool(a.region & b.region or (needs[a.index] & b.region and needs[b.index] & a.region))

    groups: list[list[Site]] = []
    for site in sites:
        joined = [g for g in groups if any(tied(site, other) for other in g)]
        groups = [g for g in groups if g not in joined] + [[*(s for g in joined for s in g), site]]
    return groups


def _alone(sites: Sequence[Site], blocks: Sequence[Segment], order: dict[fx.Node, int]) -> Segment:
    """Some sites as a segment of their own: everything between their sources and their additions."""
    taken = {n for s in blocks for n in s.nodes}
    sources = {s.source for s in sites}
    below = ancestors([s.add for s in sites], stop=sources)
    nodes = [n for n in below if n.op == "call_function" and n not in taken and _reaches(n, sources, below)]
    # All parts of what comes in several go with it, so that only tensors cross the boundary.
    nodes += [u for n in nodes if not _is_tensor(n) for u in n.users if u not in below and u not in taken]
    return _segment(nodes, order, len(blocks), tuple(s.index for s in sites))


def _reaches(node: fx.Node, sources: set[fx.Node], within: set[fx.Node]) -> bool:
    todo, seen = [node], set()
    while todo:
        n = todo.pop()
        for parent in n.all_input_nodes:
            if parent in sources:
                return True
            if parent in within and parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return False


def _segment(nodes: Iterable[fx.Node], order: dict[fx.Node, int], template: int, sites: tuple[int, ...]) -> Segment:
    body = tuple(sorted(nodes, key=order.__getitem__))
    inside = set(body)
    outputs = tuple(n for n in body if any(u not in inside for u in n.users))
    return Segment(template, outer_inputs(body), body, outputs, sites)


def _with_glue(graph: fx.Graph, blocks: list[Segment], order: dict[fx.Node, int]) -> tuple[Segment, ...] | None:
    """Blocks in graph order with the rest of the nodes between, as early as can be; what is made of a block and read by
    none stands behind all, so that no range holds a final layer. None where no order of whole segments exists."""
    in_order = _sorted(blocks, order)
    if in_order is None:
        return None
    blocks = in_order
    level: dict[fx.Node, int] = {n: i + 1 for i, block in enumerate(blocks) for n in block.nodes}
    inside = set(level)
    read = ancestors(n for block in blocks for n in block.inputs)
    glue: list[list[fx.Node]] = [[] for _ in range(len(blocks) + 1)]
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            level[node] = 0
        elif node.op != "output" and node not in inside:
            level[node] = max((level[i] for i in node.all_input_nodes), default=0)
            if level[node] and node not in read:
                level[node] = len(blocks)
            glue[level[node]].append(node)
    segments: list[Segment] = []
    count = len({b.template for b in blocks})
    for i, block in enumerate([None, *blocks]):
        if block is not None:
            if any(level[n] >= i for n in block.inputs):
                return None
            segments.append(block)
        if glue[i]:
            part = _segment(glue[i], order, count, ())
            if any(not _is_tensor(n) for n in part.outputs):
                return None
            count += 1
            segments.append(part)
    return _renumbered(segments)


def _sorted(blocks: Sequence[Segment], order: dict[fx.Node, int]) -> list[Segment] | None:
    """The blocks so that each follows those that it needs, else as the graph has them; None where two need each
    other."""
    blocks = sorted(blocks, key=lambda block: order[block.nodes[-1]])
    owner = {n: i for i, block in enumerate(blocks) for n in block.nodes}
    found = in_order([{owner[n] for n in ancestors(block.inputs) if n in owner} for block in blocks])
    return None if found is None else [blocks[i] for i in found]


def _renumbered(segments: list[Segment]) -> tuple[Segment, ...]:
    numbers: dict[tuple[bool, int], int] = {}
    return tuple(replace(s, template=numbers.setdefault((bool(s.sites), s.template), len(numbers))) for s in segments)


def _whole(graph: fx.Graph, sites: tuple[Site, ...], order: dict[fx.Node, int]) -> tuple[Segment, ...]:
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    return (_segment(nodes, order, 0, tuple(s.index for s in sites)),)
