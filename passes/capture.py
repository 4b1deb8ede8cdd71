"""Capture: Dynamo's graph as a functional, pre-dispatch ATen graph.

``linear``, ``layer_norm``, ``scaled_dot_product_attention`` and ``gelu`` stay whole; there are no methods, no mutation
and no aliasing ops; every node keeps the user's source line and module path. All later passes see this form only::

    hidden.add_(block(hidden))                    →    add = torch.ops.aten.add.Tensor(hidden, linear_7)
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from toca_compile.errors import UnsupportedGraphError
from toca_compile.ir.calls import tensors
from toca_compile.ir.graph import CAPTURED_AS, operand_nodes, source_line, writes
from toca_compile.passes.tracing.cuts import cut_alone, whole_of
from toca_compile.passes.tracing.inline import Inlining
from toca_compile.passes.tracing.sized_by_values import outlined
from toca_compile.passes.tracing.wrappers import dispatched
from toca_compile.rules.registry import RULES, Work, work_of

aten = torch.ops.aten

# Checks and switches that say nothing about values in an inference graph.
_NO_VALUE = {aten._assert_tensor_metadata.default, torch._C._set_grad_enabled}

# What Dynamo makes of ``x.data = y``; since torch 2.14 the second.
_REWIRES = (torch.Tensor.set_, getattr(aten, "shallow_copy_data_", torch.Tensor.set_))

# Of their operand they read the dtype and the device alone.
_NEW = {
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_full.default: aten.full.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_zeros.default: aten.zeros.default,
}
_SQUEEZES = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}


def capture(
    gm: fx.GraphModule, inputs: Sequence[Any], writable: Sequence[bool] = ()
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The canonical graph of ``gm``, with one placeholder per input in the same order.

    Sizes are specialised: another shape is another graph, and a guard on it is left with Dynamo.

    Args:
        writable: which inputs the graph may change in place.

    Returns:
        The graph, and which inputs it changes: what they become stands behind its results, in this order.

    Raises:
        UnsupportedGraphError: the graph changes another of its inputs in place, which a cached step could not repeat,
            or has a transform of functions that cannot be traced.
        UnknownSizeError: it has sizes that only values tell, where no op can hold them together.
    """
    gm, mode = outlined(_without_rewiring(gm, inputs)), FakeTensorMode(allow_non_fake_inputs=True)
    with torch.inference_mode(False), torch.no_grad():
        fakes = [_fake(mode, value) for value in inputs]
    mutated: list[int] = []

    def run(*args: Any) -> Any:
        out = Inlining(gm).run(*args)
        changed = torch._functionalize_has_data_mutation  # type: ignore[attr-defined]
        for i, arg in enumerate(args):
            if isinstance(arg, FunctionalTensor) and changed(arg.elem):
                mutated.append(i)
        return (*out, *(args[i] for i in mutated))

    functional = dispatch_functionalize(run, _Functional(pre_dispatch=True, export=True))
    # In inference mode torch 2.12 does not follow what an op without tensors makes.
    with torch.inference_mode(False), torch.no_grad(), preserve_node_meta(), tracing(None), mode:
        captured = make_fx(functional, pre_dispatch=True, tracing_mode="real")(*fakes)
    # The graph keeps the mode, which would know the model's parameters by weak references: torch swaps no such tensor.
    mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()
    placeholders = gm.graph.find_nodes(op="placeholder")
    for i in mutated:
        why = "a cached step would skip that" if not any(writable[i : i + 1]) else _shared(gm, inputs, i)
        if why:
            at = next((f" ({source_line(n)})" for n in placeholders[i].users if writes(n, placeholders[i])), "")
            raise UnsupportedGraphError(
                f"the model changes its input {placeholders[i].name!r} in place{at}; {why}. Clone it in forward, or "
                "keep the state outside the model."
            )
    for node in captured.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(captured, node.target, None), FakeTensor):
            raise UnsupportedGraphError(
                f"the model makes a tensor that tracing does not see ({source_line(next(iter(node.users), node))}): "
                "make it outside of forward, or by an op of torch"
            )
    for node in reversed(captured.graph.nodes):
        if node.target in _NO_VALUE and not node.users:
            captured.graph.erase_node(node)
    captured.graph.eliminate_dead_code()  # an op that an autocast casts the operands of is traced once without, in vain
    for node in captured.graph.nodes:
        _canonical(node)
        cut_alone(node)
        whole = whole_of(node) if isinstance(node.meta.get("val"), torch.Tensor) else None
        if whole is not None:
            node.replace_all_uses_with(whole)
    _join_sums(captured.graph)
    captured.graph.eliminate_dead_code()
    for node in captured.graph.nodes:
        node.meta[CAPTURED_AS] = node.name
    captured.recompile()
    return captured, tuple(mutated)


def _join_sums(graph: fx.Graph) -> None:
    """Sums of the same two values are one: ``h + y + mlp(h + y)`` says the next stream twice."""
    known: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if len(node.all_input_nodes) == len(node.args) == 2 and not node.kwargs:
            first = known.setdefault(frozenset(node.args), node)
            handed_out = any(user.op == "output" for user in node.users)  # to whoever may write to it
            if first is not node and not handed_out and first.meta["val"].stride() == node.meta["val"].stride():
                node.replace_all_uses_with(first)


def _without_rewiring(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph without ``x.data = y`` for inputs that are one memory already: bitsandbytes' layers write so at each
    call.

    Raises:
        UnsupportedGraphError: they are not.
    """
    if not any(node.target in _REWIRES for node in gm.graph.nodes):
        return gm
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in [node for node in gm.graph.nodes if node.target in _REWIRES]:
        places = [_place(given.get(operand)) for operand in node.args]
        if len(places) != 2 or places[0] is None or places[0] != places[1]:
            raise UnsupportedGraphError(
                f"the model puts other memory under a tensor ({source_line(node)}), which a cached step would skip: "
                "assign to .data before the sampling, not in forward"
            )
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _place(value: Any) -> tuple[Any, ...] | None:
    """Which memory a tensor is, and how it lies there."""
    if not isinstance(value, torch.Tensor):
        return None
    return value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype


def _shared(gm: fx.GraphModule, inputs: Sequence[Any], written: int) -> str:
    """With what an input that is written to shares its memory, so that this would see the write, or not; or nothing."""
    storage = inputs[written].untyped_storage()._cdata
    others = (x for i, x in enumerate(inputs) if i != written and isinstance(x, torch.Tensor))
    if any(x.untyped_storage()._cdata == storage for x in others):
        return "another of its inputs shares its memory"
    like = gm.graph.find_nodes(op="placeholder")[written].meta.get("example_value")
    if like is None:
        return "what it gives back may share its memory"
    own = like.untyped_storage()._cdata
    results = (n.meta.get("example_value") for n in gm.graph.output_node().all_input_nodes)
    if any(isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == own for x in results):
        return "what it gives back shares its memory"
    return ""


class _Functional(FunctionalTensorMode):
    """Spells composite ops out that other libraries bring or wrapper tensors come into; these say what other ops do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wrapper: Any = next((t for t in types if is_traceable_wrapper_subclass_type(t)), None)
        foreign = func.namespace not in ("aten", "prim", "prims") and func not in RULES
        if (wrapper is not None or foreign) and func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if wrapper is not None:
            return dispatched(self, wrapper, func, types, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)


def _canonical(node: fx.Node) -> None:
    """Rewrite ops whose meaning depends on more than their operands' values."""
    source: Any = node.args[0] if node.args else None
    if node.target in _SQUEEZES:
        _name_what_goes(node, source.meta["val"].shape)
    elif node.target in (aten.view.default, aten._unsafe_view.default):
        # A cached value need not lie in memory as the computed one did; reshape copies where it must.
        node.target = aten.reshape.default
    elif node.target is aten.type_as.default:
        # Of its second operand it reads the dtype alone.
        dtype = node.meta["val"].dtype
        if source.meta["val"].dtype == dtype:
            node.replace_all_uses_with(source)
        else:
            node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}
    elif node.target in (aten.concat.default, aten.concatenate.default):
        node.target = aten.cat.default
    elif node.target in _NEW:
        made = node.meta["val"]
        node.target, node.args = _NEW[node.target], node.args[1:]
        node.kwargs = {"dtype": made.dtype, "device": made.device}
    elif work_of(node) in (Work.CONTRACT, Work.ATTENTION):
        _cast_operands(node)


def _cast_operands(product: fx.Node) -> None:
    """A product of operands of several dtypes stood in an autocast, which cast them to the result's. The result's dtype
    need not tell: fake kernels take it from the first operand and let the others be."""
    dtype = next(iter(tensors(product.meta["val"]))).dtype
    for operand in dict.fromkeys(operand_nodes(product)):
        value = operand.meta["val"]
        if value.is_floating_point() and value.dtype != dtype and dtype.is_floating_point:
            with product.graph.inserting_before(product):
                cast = product.graph.call_function(aten._to_copy.default, (operand,), {"dtype": dtype})
            cast.meta = {**product.meta, "val": value.to(dtype)}
            product.replace_input_with(operand, cast)


def _name_what_goes(squeeze: fx.Node, shape: Sequence[int]) -> None:
    """Which dimensions are dropped depends on sizes, and a partial step has other sizes: name those of size 1."""
    named: Any = squeeze.args[1] if len(squeeze.args) > 1 else range(len(shape))
    listed = [named] if isinstance(named, int) else list(named)
    go = [d for d in listed if shape and shape[d] == 1]
    if squeeze.target is aten.squeeze.default or go != listed:
        squeeze.target, squeeze.args = aten.squeeze.dims, (squeeze.args[0], go)


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if isinstance(value, FakeTensor):
            sizes, strides = [int(s) for s in value.shape], [int(s) for s in value.stride()]
            with mode:
                return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        return mode.from_tensor(value, static_shapes=True).detach()  # gradients are none of ours
    if isinstance(value, torch.SymInt):
        return int(value)
    return value
