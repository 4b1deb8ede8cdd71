"""Capture: Dynamo's graph as a functional, pre-dispatch ATen graph.

``linear``, ``layer_norm``, ``scaled_dot_product_attention`` and ``gelu`` stay whole; there are no methods, no mutation
and no aliasing ops; every node keeps the user's source line and module path. All later passes see this form only::

    hidden.add_(block(hidden))                    →    add = torch.ops.aten.add.Tensor(hidden, linear_7)
"""

import logging
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._C._functorch import get_dynamic_layer_stack_depth, pop_dynamic_layer_stack
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode, dispatch_functionalize
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from toca_compile.errors import RuleError, UnsupportedGraphError
from toca_compile.ir.calls import tensors
from toca_compile.ir.graph import CAPTURED_AS, operand_nodes, source_line, writes
from toca_compile.passes.infer_axes import call_of
from toca_compile.rules.registry import RULES, Work, work_of

aten = torch.ops.aten
higher_order = torch.ops.higher_order

# What runs a graph inside the graph, and where among its arguments those of that graph begin. Without gradients a
# checkpoint means nothing else.
_INNER = {higher_order.tag_activation_checkpoint: 1, higher_order.invoke_subgraph: 2}

# Checks and switches that say nothing about values in an inference graph.
_NO_VALUE = {aten._assert_tensor_metadata.default, torch._C._set_grad_enabled}

# Of their operand they read the dtype and the device alone.
_NEW = {
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_full.default: aten.full.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_zeros.default: aten.zeros.default,
}
_SQUEEZES = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}


def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The canonical graph of ``gm``, with one placeholder per input in the same order.

    Sizes are specialised: another shape is another graph, and a guard on it is left with Dynamo.

    Raises:
        UnsupportedGraphError: the graph changes one of its inputs in place, which a cached step could not repeat, or
            has a transform of functions that cannot be traced.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [_fake(mode, value) for value in inputs]
    mutated: list[int] = []

    def run(*args: Any) -> Any:
        out = _Inlining(gm).run(*args)
        for i, arg in enumerate(args):
            changed = torch._functionalize_has_data_mutation  # type: ignore[attr-defined]
            if isinstance(arg, FunctionalTensor) and changed(arg.elem):
                mutated.append(i)
        return out

    functional = dispatch_functionalize(run, _Functional(pre_dispatch=True, export=True))
    with preserve_node_meta(), tracing(None), mode, _transforms_undone(gm):
        captured = make_fx(functional, pre_dispatch=True, tracing_mode="real")(*fakes)
    if mutated:
        changed = [n for n in gm.graph.nodes if n.op == "placeholder"][mutated[0]]
        at = next((f" ({source_line(n)})" for n in changed.users if writes(n, changed)), "")
        raise UnsupportedGraphError(
            f"the model changes its input {changed.name!r} in place{at}; a cached step would skip that. "
            "Clone it in forward, or keep the state outside the model."
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
    for node in captured.graph.nodes:
        _canonical(node)
        whole = _whole(node) if isinstance(node.meta.get("val"), torch.Tensor) else None
        if whole is not None:
            node.replace_all_uses_with(whole)
    captured.graph.eliminate_dead_code()
    for node in captured.graph.nodes:
        node.meta[CAPTURED_AS] = node.name
    captured.recompile()
    return captured


@contextmanager
def _transforms_undone(gm: fx.GraphModule) -> Iterator[None]:
    """Dynamo spells ``torch.vmap`` and its like out as calls that begin and end it: where tracing stops between them,
    end it, since what is begun is a state of the process.

    Raises:
        UnsupportedGraphError: tracing stopped there.
    """
    depth = get_dynamic_layer_stack_depth()
    try:
        yield
    except Exception as error:
        if get_dynamic_layer_stack_depth() == depth:
            raise
        begun = next(n for n in gm.graph.nodes if getattr(n.target, "__name__", "").endswith("_increment_nesting"))
        raise UnsupportedGraphError(
            f"the model uses torch.vmap, or another transform of functions, which cannot be traced here "
            f"({source_line(begun)}): make what it makes (a block mask, say) outside of forward, or without it"
        ) from error
    finally:
        while get_dynamic_layer_stack_depth() > depth:  # one by one: 2.11 cannot undo a stack of one
            pop_dynamic_layer_stack()


class _Functional(FunctionalTensorMode):
    """Spells composite ops out that other libraries bring or wrapper tensors come into; these say what other ops do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wrapper: Any = next((t for t in types if is_traceable_wrapper_subclass_type(t)), None)
        foreign = func.namespace not in ("aten", "prim", "prims") and func not in RULES
        if (wrapper is not None or foreign) and func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if wrapper is not None:
            with self:
                return wrapper.__torch_dispatch__(func, types, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Inlining(fx.Interpreter):
    """Runs graphs inside the graph as if they stood in it, and spells out what ``torch.autocast`` in it casts: an op
    whose result Dynamo saw in another dtype than its operands give had them cast to that one."""

    def __init__(self, module: fx.GraphModule, casting: Sequence[bool] = ()) -> None:
        super().__init__(module)
        self.casting = list(casting)  # whether each autocast that is open, the innermost last, casts
        self.dtype: torch.dtype | None = None  # what operands are cast to

    def run_node(self, n: fx.Node) -> Any:
        if n.target is _enter_autocast:
            self.casting.append(_casts(n.args))
            return None
        if n.target is _exit_autocast:
            return self.casting.pop() and None
        seen = next(iter(tensors(n.meta.get("example_value"))), None)
        if not any(self.casting[-1:]) or n.op not in ("call_function", "call_method") or seen is None:
            return super().run_node(n)
        try:
            with _quiet():
                result = super().run_node(n)
            if next(iter(tensors(result))).dtype == seen.dtype:
                return result
        except RuntimeError:  # the operands' dtypes do not go together
            pass
        self.dtype = seen.dtype
        try:
            return super().run_node(n)
        finally:
            self.dtype = None

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def cast(value: Any) -> Any:
            return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        found = super().fetch_args_kwargs_from_env(n)
        return found if self.dtype is None else pytree.tree_map(cast, found)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.Tensor and isinstance(args[0], torch.Tensor):  # Dynamo's word for one without its subclass
            return args[0].detach()
        if target in _INNER:
            return _Inlining(args[0], self.casting).run(*args[_INNER[target] :])
        return super().call_function(target, args, kwargs)


def _casts(arguments: Any) -> bool:
    """Whether an autocast in the graph casts, by its device, dtype and switch.

    Raises:
        UnsupportedGraphError: the call itself stands under another one, which would cast all the same.
    """
    device, dtype, enabled, *_ = arguments
    around = torch.is_autocast_enabled(device)
    if around and not (enabled and dtype in (None, torch.get_autocast_dtype(device))):
        raise UnsupportedGraphError(
            "the model is called under torch.autocast and switches it off or to another dtype for a part of it, which "
            "cannot be traced: open torch.autocast inside forward alone, or call the model without"
        )
    return bool(enabled)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own report of an op that fails: the operands may be about to be cast."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


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


def _whole(node: fx.Node) -> fx.Node | None:
    """The value that a slice of all of it is, or a concatenation of its parts in order; None for any other op."""
    parts = operand_nodes(node) if node.target is aten.cat.default else [node]
    cuts = [_cut(part) for part in parts]
    source, at = cuts[0][0] if cuts and cuts[0] else None, 0
    for cut in cuts:
        if source is None or cut is None or cut[:3] != (source, cuts[0][1], at):  # type: ignore[index]
            return None
        at += cut[3]
    return source if source is not None and source.meta["val"].shape == node.meta["val"].shape else None


def _cut(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """Of a slice, or one of several: of what, along which dimension, from where on, how much."""
    cut: Any = node.args[0] if node.target is operator.getitem else node
    try:
        spec = RULES[cut.target].spec(call_of(cut))
    except (KeyError, RuleError):
        return None
    dims = spec.results[node.args[1] if cut is not node else 0]  # type: ignore[index]
    found = [(d, label) for d, dim in enumerate(dims) for label in dim if label in spec.windows]
    if len(found) != 1 or spec.windows[found[0][1]].step != 1:
        return None
    ((dim, label),) = found
    return operand_nodes(cut)[0], dim, spec.windows[label].start, spec.sizes[label]


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
        return mode.from_tensor(value, static_shapes=True)
    if isinstance(value, torch.SymInt):
        return int(value)
    return value
