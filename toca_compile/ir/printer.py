"""Text forms of calls, values, graphs and variants, for reading and for golden tests."""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any, cast

import torch
from torch import fx

from toca_compile.ir.calls import tensors
from toca_compile.ir.graph import CAPTURED_AS, operand_nodes, value_of
from toca_compile.ir.names import Names
from toca_compile.ir.program import Chain, Form, Program, Segment, StandIn, Variant
from toca_compile.ir.state import Slot
from toca_compile.ir.types import Site, Type

_COLUMN = 72  # where types begin


def print_graph(graph: fx.Graph) -> str:
    """One line a node: ``name = op(arguments)  # shape``, values numbered as they are in the graph."""
    lines = []
    for node in graph.nodes:
        value = value_of(node)
        shape = f"  # {list(value.shape)}" if isinstance(value, torch.Tensor) and node.op != "output" else ""
        lines.append(print_call(node) + shape)
    return "\n".join(lines)


def print_call(node: fx.Node) -> str:
    """``name = op(arguments)``, without a type."""
    if node.op == "placeholder":
        return f"{node.name} = input"
    if node.op == "get_attr":
        return f"{node.name} = constant"
    if node.op == "output":
        return f"return {_arg(node.args[0])}"
    parts = [_arg(a) for a in node.args] + [f"{k}={_arg(v)}" for k, v in node.kwargs.items()]
    return f"{node.name} = {_target(node)}({', '.join(parts)})"


def print_value(value: Any) -> str:
    """Dtype and shape: ``f32[2, 16, 8]``; of equal values, once: ``6 × f32[2, 1, 8]``; of a number, its type."""
    if isinstance(value, torch.Tensor):
        return f"{_dtype(value.dtype)}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return several([print_value(v) for v in value])
    return type(value).__name__


def print_line(call: str, value: str, notes: Sequence[str] = ()) -> str:
    """A call with its type and what is known of it."""
    return (f"{call:<{_COLUMN}} : {value}" if value else call) + (f"  // {', '.join(notes)}" if notes else "")


def done(action: Form) -> str:
    """What a site does in a variant."""
    return str(action)


def variant_name(segment: Segment, actions: Sequence[Form]) -> str:
    """A variant as it is called in reports and logs: ``template1[reuse; rows]``, ``blocks[skip]``, or, of several
    segments as one, ``segments1-5[reuse]``."""
    if isinstance(segment, StandIn):
        return f"blocks[{segment.does}]"
    if isinstance(segment, Chain):
        return f"segments{segment.at[0]}-{segment.at[-1]}[{'; '.join(dict.fromkeys(map(done, actions)))}]"
    return f"template{segment.template}[{'; '.join(map(done, actions))}]"


# -- variants ---------------------------------------------------------------------------------------------------------


def print_variant(variant: Variant, program: Program, segment: Segment, actions: Sequence[Form]) -> str:
    """The rewritten graph of ``segment``, with its inputs, its slots and what each of its sites does."""
    names = Names(program)
    if isinstance(segment, StandIn):
        owners = [_Owner(s.name, (names.types.type_of(s.output),)) for s in segment.owners]
        head = f"// {segment.does} segments {segment.range.first} to {segment.range.last - 1}"
        return _Typed(names, {}, {}).text(head, variant, segment.inputs, owners)
    streams = {s.index: s for part in _parts(segment) if isinstance(part, StandIn) for s in part.owners}
    sites = [program.sites[i] for i in segment.sites if i not in streams]
    owners = [
        _Owner(streams[i].name, (names.types.type_of(streams[i].output),))
        if i in streams
        else _Owner(program.sites[i].name, _buffer_types(program.sites[i], program, names))
        for i in segment.sites
    ]
    if isinstance(segment, Chain):
        does = "; ".join(dict.fromkeys(map(done, actions)))
        head = f"// segments {segment.at[0]} to {segment.at[-1]} as one: {does}"
        originals = {n.meta.get(CAPTURED_AS, n.name): n for s in program.segments for n in s.nodes}
        return _Typed(names, originals, {}).text(head, variant, segment.inputs, owners)
    does = "; ".join(f"{s.name} {done(a)}" for s, a in zip(sites, actions, strict=True)) or "no site"
    notes = {n: [s.name for s in sites if n in s.region] for n in segment.nodes}
    typed = _Typed(names, {n.meta.get(CAPTURED_AS, n.name): n for n in segment.nodes}, notes)
    return typed.text(f"// template {segment.template}: {does}", variant, segment.inputs, owners)


def _parts(segment: Segment) -> Sequence[Segment]:
    return segment.parts if isinstance(segment, Chain) else (segment,)


@dataclass(frozen=True)
class _Owner:
    """Whose slots they are: a site or an output of a range, and the types that its buffers may have."""

    name: str
    types: tuple[Type, ...]


def _buffer_types(site: Site, program: Program, names: Names) -> tuple[Type, ...]:
    """What a site may keep: outputs, a number for each token, what its proofs take from the cache, and scores."""
    kept = [*(site.row_proof.stale_inputs if site.row_proof else ())]
    kept += [*(site.query_proof.dense_inputs if site.query_proof else ())]
    output, *types = (names.types.type_of(n) for n in (site.output, *kept))
    scorers = [program.sites[s.site] for s in (site.score_by_keys, site.score_by_queries) if s is not None]
    for attention in (a for s in (site, *scorers) for a in s.attention):
        heads = tuple((f,) for f in names.types.factors.resolve(attention.lead) if f not in site.batch)
        for over in (attention.key_axis, attention.axis):
            types += [(site.batch, over), (site.batch, *heads, over)]
    return (output, (site.batch, site.axis.factors), *types)


class _Typed:
    """A rewritten graph with types. A copy of a call (of ``originals``, by their names) has the type of that, with K
    for the tokens that are selected from; any other call has the type of an operand, if its shape is that one's."""

    def __init__(self, names: Names, originals: Mapping[str, fx.Node], notes: Mapping[fx.Node, Sequence[str]]) -> None:
        self.names, self.originals, self.notes = names, originals, notes
        self.types: dict[fx.Node, tuple[Type, ...]] = {}

    def text(self, head: str, variant: Variant, inputs: Sequence[fx.Node], owners: Sequence[_Owner]) -> str:
        """``inputs``: what the variant's values are numbered among; ``owners``: what its slots' positions are."""
        *nodes, end = variant.module.graph.nodes
        count = len(variant.values)
        lines = []
        for node, i in zip(nodes, variant.values, strict=False):
            lines.append(self._line(f"{node.name} = input", node, self._types(inputs[i])))
        for node, slot in zip(nodes[count:], variant.slots, strict=False):
            owner = owners[slot.position]
            lines.append(self._line(f"{node.name} = {slot_name(slot)} of {owner.name}", node, owner.types))
        for node in nodes[count + len(variant.slots) :]:
            original = self.originals.get(node.meta.get(CAPTURED_AS, ""))
            notes = self.notes.get(original, ()) if original is not None else ()
            types = self._types(original) if original is not None else ()
            if original is None or original.target != node.target:
                types = (*types, *self._operands(node), *(t for owner in owners for t in owner.types))
            lines.append(self._line(print_call(node), node, types, notes))
        told = set(re.findall(r"\w+", " ".join(part for line in lines for part in re.findall(r"\] (\[.*)", line))))
        legend = self.names.legend(told.__contains__) + (["K = the tokens selected"] if "K" in told else [])
        return "\n".join([head, *(f"// {line}" for line in wrapped(legend)), "", *lines, print_call(end)])

    def _types(self, original: fx.Node) -> tuple[Type, ...]:
        types = self.names.types
        return tuple(types.type_of(original, i) for i in range(len(types.results.get(original, ()))))

    def _operands(self, node: fx.Node) -> list[Type]:
        if node.target is operator.getitem:
            source, index = cast(tuple[fx.Node, int], node.args)
            return list(self.types.get(source, ())[index : index + 1])
        return [self.types[operand][0] for operand in operand_nodes(node)]

    def _line(self, call: str, node: fx.Node, types: Sequence[Type], notes: Sequence[str] = ()) -> str:
        """The call with the first of ``types`` that each of its values fits."""
        if "val" not in node.meta:
            return print_line(call, "", notes)
        value, told = value_of(node), []
        for i, tensor in enumerate(tensors(value)):
            known = types if i == 0 else types[i : i + 1]
            fits = [(t, self.names.fitted(t, tensor.shape, some=some)) for some in (False, True) for t in known]
            fits += [(t, self.names.spread(t, tensor.shape)) for t in known]
            kind, text = next(((t, text) for t, text in fits if text is not None), ((), "" if tensor.shape else "[]"))
            self.types[node] = (*self.types.get(node, ()), kind)
            told.append(text)
        return print_line(call, " ".join([print_value(value), several(told, once=True)]).rstrip(), notes)


def slot_name(slot: Slot) -> str:
    """What a slot is: a buffer of a kind, or a number of the host."""
    index = f" {slot.index}" if slot.index else ""
    return f"{'buffer' if slot.is_buffer else 'number'} {slot.kind.value}{index}"


def wrapped(entries: Sequence[str], width: int = 100) -> list[str]:
    """Entries with commas between, as many in a line as fit."""
    lines: list[str] = []
    for entry in entries:
        if lines and len(lines[-1]) + len(entry) + 2 <= width:
            lines[-1] += f", {entry}"
        else:
            lines.append(entry)
    return lines


def several(told: Sequence[str], *, once: bool = False) -> str:
    """What is told of a value's parts: where it is the same of all, that, with or without their number."""
    if len(set(told)) <= 1:
        return "".join(told[:1]) if once or len(told) <= 1 else f"{len(told)} × {told[0]}"
    return f"({', '.join(told)})"


def _dtype(dtype: torch.dtype) -> str:
    """``float32`` as ``f32``, ``bfloat16`` as ``bf16``."""
    return re.sub(r"^(b?[a-z])[a-z]*(?=\d)", r"\1", str(dtype).removeprefix("torch."))


def _target(node: fx.Node) -> str:
    if isinstance(node.target, BuiltinFunctionType):
        return node.target.__name__
    name = str(node.target)
    return (
        name.removeprefix("aten.").removesuffix(".default") if isinstance(node.target, torch._ops.OpOverload) else name
    )


def _arg(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return arg.name
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_arg(a) for a in arg) + "]"
    return str(arg)
