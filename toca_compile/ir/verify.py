"""What a legal program is after each pass. The pass manager checks it; a pass that breaks it is named in the error."""

from collections.abc import Collection

import torch
from torch import fx

from toca_compile.errors import VerifyError
from toca_compile.ir.calls import shape, tensors
from toca_compile.ir.graph import is_mutable, value_of
from toca_compile.ir.program import Program, Segment, Variant
from toca_compile.ir.state import Slot


def verify(program: Program) -> None:
    """Check every fact that the program claims against the graph.

    Raises:
        VerifyError: the first that does not hold.
    """
    graph = program.module.graph
    graph.lint()
    _functional(graph)
    if program.types is not None:
        _types(program)
    nodes = set(graph.nodes)
    for site in program.sites:
        _require(site.add in nodes and site.output in site.region, f"site {site.name} is not part of the graph")
        _require(site.source not in site.region, f"site {site.name} starts inside its own branch")
        if site.row_proof is not None:
            _require(site.source in site.row_proof.tokens, f"site {site.name}: the proof does not reach its input")
    if program.segments:
        _segments(program)
        for segment in program.segments:
            lost = {n for i in segment.sites for n in program.sites[i].region} - set(segment.nodes)
            _require(not lost, f"segment {segment.template} does not make its sites' {lost}")


def verify_variant(variant: Variant, segment: Segment) -> None:
    """A variant yields values of the same shapes and dtypes as the segment that it stands for.

    Raises:
        VerifyError: it does not.
    """
    outputs = variant.module.graph.output_node().args[0]
    _require(len(outputs) == len(segment.outputs), "a variant has another number of results than its segment")  # type: ignore[arg-type]
    for new, old in zip(outputs, segment.outputs, strict=True):  # type: ignore[arg-type]
        a, b = new.meta.get("val"), value_of(old)
        same = a is not None and tuple(a.shape) == tuple(b.shape) and a.dtype == b.dtype and a.device == b.device
        _require(same, f"a variant's result {new} is {_kind(a)}, the segment's {old} is {_kind(b)}")


def verify_kept(variant: Variant, kept: Collection[Slot]) -> None:
    """A variant is in order, and writes the buffers ``kept``: those that steps to come read as this one leaves them.

    Raises:
        VerifyError: it does not.
    """
    try:
        variant.module.graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"a variant's graph is not legal: {str(error).splitlines()[0]}") from error
    missing = set(kept) - written_slots(variant)
    _require(
        not missing, f"a variant does not write what later steps read of it: {sorted(slot.name for slot in missing)}"
    )


def written_slots(variant: Variant) -> set[Slot]:
    """The buffers that a variant changes."""
    graph = variant.module.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"][len(variant.values) :]
    named = dict(zip(inputs, variant.slots, strict=True))
    return {named[n.args[0]] for n in graph.nodes if is_mutable(n) and n.args[0] in named}


def _functional(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if is_mutable(node):
            raise VerifyError(f"{node.target} mutates; the captured graph is functional")
        if node.op == "call_method":
            raise VerifyError(f"{node} is a method call; the captured graph has ATen ops only")


def _types(program: Program) -> None:
    assert program.types is not None
    size = program.types.factors.size
    for node, results in program.types.results.items():
        for dims, value in zip(results, tensors(value_of(node)), strict=False):
            sizes = tuple(map(size, dims))  # refined or not, they are as many
            if sizes != value.shape:  # worded only then: this is asked of each value after each pass
                raise VerifyError(f"{node}: its axes multiply to {sizes}, its shape is {shape(value)}")


def _segments(program: Program) -> None:
    ready = {n for n in program.module.graph.nodes if n.op in ("placeholder", "get_attr")}
    first: dict[int, Segment] = {}
    done: set[fx.Node] = set()
    for segment in program.segments:
        _require(set(segment.inputs) <= ready, f"segment {segment.template} runs before its inputs are there")
        _require(not done & set(segment.nodes), f"segment {segment.template} repeats nodes of another")
        _require(len(set(segment.inputs)) == len(segment.inputs), f"segment {segment.template} has an input twice")
        done |= set(segment.nodes)
        ready |= set(segment.nodes)
        exemplar = first.setdefault(segment.template, segment)
        for ours, theirs in ((segment.inputs, exemplar.inputs), (segment.outputs, exemplar.outputs)):
            same = [_kind(value_of(n)) for n in ours] == [_kind(value_of(n)) for n in theirs]
            _require(same, f"segments of template {segment.template} differ at their boundary")
    missing = [n for n in program.module.graph.nodes if n.op == "call_function" and n not in done]
    _require(not missing, f"no segment computes {missing[:3]}")


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}@{value.device}"
    return type(value).__name__


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise VerifyError(message)
