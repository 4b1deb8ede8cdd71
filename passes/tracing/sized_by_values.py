"""Sized by values: what has a size that only values tell, outlined into one op between values of known sizes.

A mask's ones are gathered, attended to and padded again; a token's expert computes those that chose it. Dynamo follows
that with sizes that are unknown, which stop every later pass. What is connected by them becomes one op, and the rest is
a graph as any other::

    at = nonzero(mask); y = pad(attend(cat([q, k[at]])))        →        y = toca.sized_by_values([mask, q, k], name)[0]

Places and sizes, which are cheap, are made anew in each such op that reads them: else a mask that all blocks share
would make the model one.
"""

import copy
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from toca_compile.errors import UnknownSizeError
from toca_compile.ir.graph import ancestors, outer_inputs, source_line, writes
from toca_compile.ops.sized_by_values import OP, Layout, Part, named


def outlined(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with an op for each part that is sized by values; itself where nothing is.

    Raises:
        UnknownSizeError: such a size leaves the graph, or the part cannot stand in one place.
    """
    if not any(_is_unknown(node) for node in gm.graph.nodes):
        return gm
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    unknown = dict.fromkeys(node for node in gm.graph.nodes if _is_unknown(node))
    for node in gm.graph.output_node().all_input_nodes:
        if node in unknown:
            raise _refused(node, "and the model, or a part of it, gives it back")
    for node in reversed(gm.graph.nodes):
        if _checks(node, unknown) or (node in unknown and not node.users and _written(node) is None):
            gm.graph.erase_node(node)
            unknown.pop(node, None)
    nodes = list(gm.graph.nodes)
    casting, last = _casting(nodes), {node: i for i, node in enumerate(nodes)}
    for group in sorted(_connected(nodes, unknown), key=lambda group: last[group[-1]]):
        _outline(gm, group, unknown, casting)
    gm.recompile()
    return gm


def _outline(
    gm: fx.GraphModule,
    group: Sequence[fx.Node],
    unknown: dict[fx.Node, None],
    casting: dict[fx.Node, tuple[Any, ...]],
) -> None:
    """Put one op where the last of a group stands."""
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    members = sorted(_with_between(group), key=place.__getitem__)
    inner = sorted(_with_places(members, unknown), key=place.__getitem__)
    given = outer_inputs(inner)
    first, last = members[0], members[-1]
    for node in given:
        if not isinstance(_value(node), torch.Tensor):
            raise _refused(first, f"and it reads {node.name}, which is no tensor")
    changed = _changed(inner, given)
    window = [node for node in list(place)[place[inner[0]] : place[last]] if node not in members]
    _check_window(first, [*inner, *given], changed, window)
    if len({casting[node] for node in members}) > 1:
        raise _refused(first, "in part under torch.autocast")
    results = [node for node in members if node not in unknown and any(user not in inner for user in node.users)]
    for node in results:
        if not isinstance(_value(node), torch.Tensor):
            raise _refused(node, "and it is no tensor")
    # What a call changes and gives back is the same memory.
    same = [node for node in results if _storage(node) in map(_storage, changed)]
    for node in same:
        if _written(node) not in changed:
            raise _refused(node, "and is a view of what is changed")
    results = [node for node in results if node not in same]
    _move_behind(last, [node for node in window if node not in inner], results)

    graph = _copied(inner, given, changed, results)
    open_casts = casting[first]
    layouts = tuple(Layout.of(_value(node)) for node in (*results, *changed))
    name = named(Part(fx.GraphModule(gm, graph), layouts, open_casts[-1] if open_casts else None))

    with gm.graph.inserting_after(last):
        call = gm.graph.call_function(OP, (list(given), name))
    call.meta = {**first.meta, "example_value": tuple(_value(node) for node in (*results, *changed))}
    after = call
    for i, node in enumerate((*results, *changed)):
        with gm.graph.inserting_after(after):
            after = gm.graph.call_function(operator.getitem, (call, i))
        after.meta = dict(node.meta)
        if node in changed:
            with gm.graph.inserting_after(after):
                after = gm.graph.call_method("copy_", (node, after))
            after.meta = dict(node.meta)
            for alias in (other for other in same if _written(other) is node):
                alias.replace_all_uses_with(after)
        else:
            node.replace_all_uses_with(after)
    for node in reversed(inner):
        if not node.users:  # places may be read elsewhere
            gm.graph.erase_node(node)


def _copied(
    inner: Sequence[fx.Node], given: Sequence[fx.Node], changed: Sequence[fx.Node], results: Sequence[fx.Node]
) -> fx.Graph:
    """A graph of its own, which gives the results, and what becomes of what is changed."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in given}
    for node in changed:
        copies[node] = graph.call_method("clone", (copies[node],))
    for node in inner:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in (*results, *changed)))
    for node in graph.nodes:
        node.meta = {}  # fake tensors, which would be kept
    return graph


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _is_unknown(node: fx.Node) -> bool:
    """Whether the value, or its size, is a number that only values tell."""
    leaves = pytree.tree_leaves(_value(node))
    return any(
        isinstance(x, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)) and free_unbacked_symbols(x)
        for x in leaves
    )


def _is_place(node: fx.Node) -> bool:
    """Whether it is whole numbers or truths."""
    leaves = pytree.tree_leaves(_value(node))
    return not any(isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()) for x in leaves)


def _written(node: fx.Node) -> fx.Node | None:
    """What a call changes."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) and writes(node, first) else None


def _checks(node: fx.Node, unknown: dict[fx.Node, None]) -> bool:
    """Whether it looks at a size, and makes nothing."""
    reads = any(i in unknown for i in node.all_input_nodes)
    return reads and _value(node) is None and not node.users and _written(node) is None and node.op != "output"


def _connected(nodes: Sequence[fx.Node], unknown: dict[fx.Node, None]) -> list[list[fx.Node]]:
    """What must stand in one op: all that is connected by values of unknown size, but for places and sizes, and what is
    made of these."""
    own: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        reads = any(i in unknown for i in node.all_input_nodes)
        target = _written(node)
        if target in unknown and _is_place(target):
            raise _refused(node, "and is changed in place")
        if (node in unknown and _is_place(node)) or not (node in unknown or reads):
            continue
        group = [node]
        for read in outer_inputs(_with_places([node], unknown)):
            if read in own and read in unknown and own[read] is not group:
                group += own[read]
                own.update(dict.fromkeys(group, group))
        own.update((member, group) for member in group)
    order = {node: i for i, node in enumerate(nodes)}
    return [sorted(group, key=order.__getitem__) for group in {id(group): group for group in own.values()}.values()]


def _with_places(members: Iterable[fx.Node], unknown: dict[fx.Node, None]) -> set[fx.Node]:
    """Members, and the places and sizes that they read."""
    members = list(members)
    read = [i for node in members for i in node.all_input_nodes]
    return set(members) | ancestors(read, within=lambda node: node in unknown and _is_place(node))


def _with_between(members: Sequence[fx.Node]) -> set[fx.Node]:
    """Members, and what is made of some of them and read by others."""
    own, made = set(members), set(members)
    for node in members[0].graph.nodes:
        if any(i in made for i in node.all_input_nodes):
            made.add(node)
    return own | (made & ancestors(members, within=lambda node: node in made))


def _changed(inner: Sequence[fx.Node], given: Sequence[fx.Node]) -> list[fx.Node]:
    """What of the given tensors the part writes to."""
    written = {_storage(target) for target in map(_written, inner) if target is not None}
    found = [node for node in given if _storage(node) in written]
    if len({_storage(node) for node in found}) < len(found):
        raise _refused(inner[0], "and it changes memory that it reads in two ways")
    return found


def _check_window(
    first: fx.Node, read: Sequence[fx.Node], changed: Sequence[fx.Node], window: Sequence[fx.Node]
) -> None:
    """What stands between the members neither changes what they read nor reads what they change, so that they may stand
    where the last one does."""
    memory, written = {_storage(node) for node in read}, {_storage(node) for node in changed}
    for node in window:
        target = _written(node)
        is_view = _storage(node) in written
        reads = not is_view and any(_storage(i) in written for i in node.all_input_nodes)
        mapped = "_nesting" in str(getattr(node.target, "__name__", node.target))
        if mapped or reads or (target is not None and _storage(target) in memory):
            raise _refused(first, f"and {node.name} ({source_line(node)}) stands in between")


def _move_behind(last: fx.Node, window: Sequence[fx.Node], results: Sequence[fx.Node]) -> None:
    """What reads results before the last member stands behind it."""
    made, after = set(results), last
    for node in window:
        if any(i in made for i in node.all_input_nodes):
            changes = next(filter(_written, window), None)
            if changes is not None:
                raise _refused(last, f"and {changes.name} ({source_line(changes)}) stands in between")
            made.add(node)
            after.append(node)
            after = node


def _storage(node: fx.Node) -> Any:
    value = _value(node)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else node


def _casting(nodes: Iterable[fx.Node]) -> dict[fx.Node, tuple[Any, ...]]:
    """The arguments of the autocasts that are open around each node."""
    found: dict[fx.Node, tuple[Any, ...]] = {}
    stack: tuple[Any, ...] = ()
    for node in nodes:
        if node.target is _enter_autocast:
            stack = (*stack, tuple(node.args))
        elif node.target is _exit_autocast:
            stack = stack[:-1]
        found[node] = stack
    return found


def _refused(node: fx.Node, why: str) -> UnknownSizeError:
    return UnknownSizeError(
        f"the size of what {source_line(node)} makes follows from values, {why}: no pass can follow it. Without "
        "Dynamo's capture_dynamic_output_shape_ops and capture_scalar_outputs torch.compile splits the model there"
    )
