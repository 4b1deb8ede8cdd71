"""Inductor: each distinct variant compiled once per process, with the host numbers (K, step) symbolic.

The artifact is found again by the graph's text, its inputs' shapes, dtypes and devices, and Inductor's own settings:
layers that are the same block, two models of one architecture, and two policies with other ratios share it.
``artifacts.py`` keeps it for the next process.
"""

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import config, standalone_compile
from torch._inductor.dependencies import StarDep, WeakDep
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch._inductor.loop_body import LoopBody
from torch._inductor.scheduler import SchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._ordered_set import OrderedSet

from toca_compile.errors import LoweringError, cannot_write
from toca_compile.ir.graph import is_mutable, viewed
from toca_compile.ir.program import Variant
from toca_compile.lowerings import artifacts
from toca_compile.lowerings.few_rows import fuse_few_rows
from toca_compile.lowerings.fused_scores import fuse_scores
from toca_compile.lowerings.registry import lowering

_ARTIFACTS: OrderedDict[tuple[Any, ...], Callable[..., Sequence[Any]]] = OrderedDict()
_KEPT = 512  # artifacts that are found again; models that run hold their own
SIDE_BY_SIDE: dict[str, Any] = {"combo_kernels": True, "combo_kernel_per_subkernel_blocks": True}
"""Inductor's settings for a GPU: kernels that need nothing of one another are one launch, each with blocks of its own
sizes. What is compared with has them too."""
if hasattr(config, "combo_kernel_max_num_nodes"):  # since torch 2.13; before, eight
    SIDE_BY_SIDE["combo_kernel_max_num_nodes"] = 64

compiles = 0
"""How many variants were new to this process: a counter for tests and reports."""
loads = 0
"""How many of them an earlier process had compiled."""


@lowering("inductor", compiles=True)
def lower(variant: Variant, examples: Sequence[Any]) -> Callable[..., Sequence[Any]]:
    """The compiled artifact.

    ``examples`` are fake tensors, and plausible values of the host numbers. Buffers are changed in place; the numbers
    may take any value without a recompile.

    Raises:
        LoweringError: the machine cannot compile.
    """
    with compile_lock:  # one at a time: threads that sample with two models meet here, and where torch traces one
        key = (*told(variant.module.graph, examples), config.save_config_portable().__repr__())
        if key not in _ARTIFACTS:
            # Outside inference mode, whose tensors could not be changed in place by a call under plain no_grad.
            try:
                with torch.inference_mode(False), torch.no_grad():
                    _ARTIFACTS[key] = _kept_or_compiled(key, variant.module, examples)
            except Exception as error:
                trouble = machine_trouble(error)
                if trouble is None:
                    raise
                raise trouble from error
            if len(_ARTIFACTS) > _KEPT:
                _ARTIFACTS.popitem(last=False)
        _ARTIFACTS.move_to_end(key)
        return _ARTIFACTS[key]


def machine_trouble(error: BaseException | None) -> LoweringError | None:
    """What is wrong with the machine, if that is behind an error of Inductor's; None otherwise."""
    while error is not None:
        if isinstance(error, InvalidCxxCompiler | CppCompileError):
            return LoweringError(
                f"Inductor found no C++ compiler that works ({str(error).splitlines()[0]}): install g++ or clang, name "
                "it in CXX, or take lowering='eager'"
            )
        if isinstance(error, OSError):
            return cannot_write(error)
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None


def clear() -> None:
    """Forget all artifacts."""
    _ARTIFACTS.clear()


def _kept_or_compiled(key: tuple[Any, ...], module: fx.GraphModule, examples: Sequence[Any]) -> artifacts.Artifact:
    """The artifact that an earlier process left, or a new one, which is left for later ones."""
    global compiles, loads
    compiles += 1
    device = next((e.device for e in examples if isinstance(e, torch.Tensor)), torch.device("cpu"))
    name = artifacts.key_of(*key, device=device) if artifacts.enabled() else None
    kept = artifacts.load(name) if name is not None else None
    if kept is not None:
        loads += 1
        return kept
    made = _compile(module, examples)
    if name is not None:
        artifacts.save(name, made)
    return made


def _compile(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Sequence[Any]]:
    mode = symbolic_mode()
    values: list[Any] = [
        fake(mode, e) if isinstance(e, torch.Tensor) else symbol(mode, f"toca_number_{i}", e)
        for i, e in enumerate(examples)
    ]
    graph = with_values(module.graph, values)
    own = fx.GraphModule(module, graph)
    with settings(), config.patch(SIDE_BY_SIDE if _on_gpu(values) else {}), tracing(TracingContext(mode)):
        return standalone_compile(own, values, dynamic_shapes="from_tracing_context")


def symbolic_mode() -> FakeTensorMode:
    """Where sizes may be symbols. 0 and 1 are sizes as any other: K may be 1, and no guard may tell it from 2."""
    return FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False, duck_shape=False))


def fake(mode: FakeTensorMode, example: torch.Tensor) -> torch.Tensor:
    """A tensor like an example."""
    with mode:
        return torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device)


def symbol(mode: FakeTensorMode, name: str, example: int) -> torch.SymInt:
    """A number that may be any."""
    env, source = mode.shape_env, ConstantSource(name)
    assert env is not None
    made = env.create_symintnode(env.create_symbol(example, source, DimDynamic.DYNAMIC), hint=example, source=source)
    assert isinstance(made, torch.SymInt)
    return made


@contextmanager
def settings() -> Iterator[None]:
    """How Inductor compiles variants. A buffer is written in place only if what reads it before is not moved behind the
    write. What torch's own caches hold is found again by the names of our ops, which another version of them shares."""
    tag = f"{torch.compiler.config.cache_key_tag} toca {artifacts.sources()}"
    tagged = torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
    with config.patch(reorder_for_locality=False), tagged:
        with _order_kept(), _reads_told():
            yield


@contextmanager
def _reads_told() -> Iterator[None]:
    """Where it fuses loops for a CPU, torch asks of what waits for a buffer in which order it reads that, and fails if
    it reads none of it (pytorch/pytorch#196570): then it is told none, and leaves the buffer where it is."""
    expression = LoopBody.get_read_expr

    def told_expression(self: LoopBody, buffer_name: str) -> Any:
        try:
            return expression(self, buffer_name)
        except KeyError:
            return None

    with patch.object(LoopBody, "get_read_expr", told_expression):
        yield


@contextmanager
def _order_kept() -> Iterator[None]:
    """torch 2.11 forgets, where it fuses loops for a CPU, that a buffer is overwritten after it was read, and may turn
    the two about (pytorch/pytorch#177816): there a node is given back what it must wait for."""
    recompute = SchedulerNode.recompute_size_and_body
    if torch.torch_version.TorchVersion(torch.__version__) >= "2.12":
        yield
        return

    def recomputed(self: SchedulerNode, *args: Any, **kwargs: Any) -> None:
        waits_for = [dep for dep in self.read_writes.reads if isinstance(dep, WeakDep | StarDep)]
        recompute(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.with_read(OrderedSet(waits_for)).rename(self.mutation_renames))

    with patch.object(SchedulerNode, "recompute_size_and_body", recomputed):
        yield


def with_values(graph: fx.Graph, values: Sequence[Any], *, alone: bool = False) -> fx.Graph:
    """A copy of a graph, given these, as it is compiled: an attention and its score are one op, and on
    a GPU products of few rows are sums.

    Args:
        alone: the code will run without this package, whose kernel joins the two on a CPU.
    """
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    # Segments meet at contiguous values: Inductor is free to lay out what it computes, and the next segment was
    # compiled for one layout.
    outputs = copy.graph_copy(graph, env)
    copy.output(tuple(copy.call_function(torch.ops.aten.contiguous.default, (o,)) for o in outputs))  # type: ignore[union-attr]
    for node, value in zip((n for n in copy.nodes if n.op == "placeholder"), values, strict=True):
        node.meta = {"val": value, "example_value": value}
    if _on_gpu(values):
        fuse_few_rows(copy)
    for node in copy.nodes:
        if node.op != "placeholder":
            node.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    _keep_apart(copy)
    if not alone or _on_gpu(values):
        fuse_scores(copy)
    return copy


def _keep_apart(graph: fx.Graph) -> None:
    """Read what is moved from one buffer to another before it is overwritten. Inductor writes inputs at the end of a
    graph, in their own order, and takes an input for its copy, which may hold its new value by then
    (pytorch/pytorch#198131); what is computed of it, it reads in time."""
    changing = [node for node in graph.nodes if is_mutable(node)]
    written = {node.args[0] for node in changing}
    for node in changing:
        for value in dict.fromkeys(arg for arg in node.args[1:] if isinstance(arg, fx.Node)):
            source = viewed(value)
            if source in written and source is not node.args[0]:
                with graph.inserting_before(node):
                    node.replace_input_with(value, graph.call_function(torch.ops.aten.maximum.default, (value, value)))


def _on_gpu(values: Sequence[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.device.type == "cuda" for value in values)


def told(graph: fx.Graph, examples: Sequence[Any]) -> tuple[str, Any]:
    """What tells a variant from others: its text, and the kinds of its inputs."""
    return _text(graph), tuple(_kind(e) for e in examples)


def _kind(example: Any) -> Any:
    if isinstance(example, torch.Tensor):
        return tuple(example.shape), tuple(example.stride()), example.dtype, str(example.device)
    return None


def _text(graph: fx.Graph) -> str:
    """The graph with nodes numbered, free of names."""
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: _Ref(number[n]))
        target = "" if node.op in ("placeholder", "output") else _target(node.target)
        lines.append(f"{node.op} {target} {args!r}")
    return "\n".join(lines)


def _target(target: Any) -> str:
    return "getitem" if target is operator.getitem else str(target)


class _Ref(str):
    def __repr__(self) -> str:
        return str(self)
