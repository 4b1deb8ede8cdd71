"""Inductor for a GPU that is not there: fake CUDA tensors up to the generated source, and machine code of its kernels.

It needs Triton, which brings ptxas; the CPU build of torch is enough. Everything that is put in place of a driver is
taken away again by leaving ``fake_gpu()``, but for one thing that Python does not undo: ``Tensor.__getitem__``,
replaced once, leaves a slot of sequences on the class, and ``torch.tensor([tensor(1.0)])`` fails from then on. Hence
give it a process of its own.
"""

import logging
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config, ir
from torch._inductor.codecache import PyCodeCache
from torch._inductor.codegen.simd import SIMDScheduling
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.dependencies import MemoryDep
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ForeachKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import sympy_product
from torch.nn.attention import SDPBackend
from torch.utils import _triton

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
_HEADS = 4  # dimensions of queries and keys: batch, heads, tokens, features

# What Inductor and Triton ask of an H100.
_H100: dict[str, Any] = {
    "name": "H100", "multi_processor_count": 132, "major": 9, "minor": 0, "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "warp_size": 32, "total_memory": 80 << 30,
    "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448, "L2_cache_size": 50 << 20,
    "gcnArchName": "",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel or library call of a compiled graph.

    Attributes:
        kind: ``"triton"``, ``"gemm"``, ``"attention"``, ``"other"`` (any other library call) or ``"host copy"``.
        moved: bytes read and written, as Inductor counts them, but for what is read of a part of a buffer.
        flops: of products.
    """

    kind: str
    moved: int
    flops: int


@dataclass(frozen=True)
class Generated:
    """What Inductor made of a graph: the source of the wrapper with its kernels, and what it launches in turn."""

    source: str
    launches: tuple[Launch, ...]


class _Driver:
    """Triton's view of the device."""

    utils = SimpleNamespace(
        get_device_properties=lambda device=0: {
            "max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32
        }
    )  # fmt: skip

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA


def _method(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method of tensors, as an op for those on the fake device: the method itself asks for a driver."""
    method = getattr(Tensor, name)
    return lambda self, *args, **kwargs: (op if self.device.type == "cuda" else method)(self, *args, **kwargs)


def _indexed(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` of slices, numbers, None and Ellipsis."""
    index = index if isinstance(index, tuple) else (index,)
    rest, dim = x.dim() - sum(i is not None and i is not Ellipsis for i in index), 0
    for i in index:
        if i is Ellipsis:
            dim += rest
        elif i is None:
            x, dim = aten.unsqueeze.default(x, dim), dim + 1
        elif isinstance(i, slice):
            x, dim = aten.slice.Tensor(x, dim, i.start, i.stop, i.step or 1), dim + 1
        else:
            x = aten.select.int(x, dim, i)
    return x


def _always(value: Any = None) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


# What is asked of the device, and where: of Dynamo's interface to devices (and its workers'), and of torch itself.
_ASKED: dict[str, Callable[..., Any]] = {
    "is_available": _always(True), "device_count": _always(1), "current_device": _always(0),
    "get_device_properties": _always(SimpleNamespace(**_H100)), "is_bf16_supported": _always(True),
    "synchronize": _always(),
}  # fmt: skip
_OF_INTERFACE = _ASKED | {
    "get_compute_capability": _always(90), "get_raw_stream": _always(0), "is_triton_capable": _always(True),
    "raise_if_triton_unavailable": _always(),
}  # fmt: skip
_OF_WORKER = {name: _ASKED[name] for name in ("current_device", "get_device_properties")}
_OF_TORCH = _ASKED | {
    "get_device_capability": _always((9, 0)), "_lazy_init": _always(), "_exchange_device": _always(0),
    "_maybe_exchange_device": _always(0), "get_rng_state": _always(torch.zeros(0)), "set_rng_state": _always(),
}  # fmt: skip
_METHODS: dict[str, Callable[..., Tensor]] = {
    "copy_": aten.copy_.default, "contiguous": aten.contiguous.default, "__getitem__": _indexed
}  # fmt: skip


@contextmanager
def fake_gpu() -> Iterator[list[Generated]]:
    """Inductor compiles for an H100 inside, up to the source; the list fills with what each compilation generated."""
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import driver

    made: list[Generated] = []

    parts: dict[str, list[list[BaseSchedulerNode]]] = {}
    combine = SIMDScheduling.generate_combo_kernel_code

    def combined(self: Any, nodes: list[BaseSchedulerNode], *args: Any, **kwargs: Any) -> list[Any]:
        kernels = combine(self, nodes, *args, **kwargs)
        parts[nodes[0].get_name()] = [own for *_, own in kernels]
        return kernels

    def keep(graph: GraphLowering) -> Any:
        parts.clear()
        source = graph.codegen()[0].value
        made.append(Generated(source, tuple(_launches(graph, parts))))
        return SimpleNamespace(call=_always(), __file__=None)

    with ExitStack() as stack:
        enter = stack.enter_context
        interfaces = ((CudaInterface, _OF_INTERFACE), (CudaInterface.Worker, _OF_WORKER))
        patches: list[tuple[Any, str, Any]]
        patches = [(owner, name, staticmethod(f)) for owner, functions in interfaces for name, f in functions.items()]
        patches += [(torch.cuda, name, f) for name, f in _OF_TORCH.items()]
        patches += [(Tensor, name, _method(name, op)) for name, op in _METHODS.items()]
        patches += [
            (torch.version, "cuda", "12.8"),
            (torch, "_fused_sdp_choice", _always(SDPBackend.FLASH_ATTENTION.value)),
            (joint_graph, "lazy_init", _always()),  # it makes real CUDA tensors, for patterns
            (triton_helpers, "set_driver_to_gpu", _always()),
            (driver, "_active", _Driver()),
            (PythonWrapperCodegen, "generate_and_run_autotune_block", _always()),
            (GraphLowering, "compile_to_module", keep),
            (SIMDScheduling, "generate_combo_kernel_code", combined),
            (logging.getLogger("torch._inductor.standalone_compile"), "disabled", True),  # nothing can be saved
        ]
        for owner, name, value in patches:
            enter(patch.object(owner, name, value))
        enter(config.patch({"joint_graph_constant_folding": False, "triton.autotune_at_compile_time": False}))
        enter(config.patch({"force_disable_caches": True, "compile_threads": 1}))
        stack.callback(_ask_again)
        _ask_again()
        # In inference a graph is traced below autograd, whose kernels would ask for the device.
        enter(torch._C._AutoDispatchBelowAutograd())
        enter(torch.no_grad())
        yield made


def _ask_again() -> None:
    """torch remembers whether there is a device for Triton."""
    for function in vars(_triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _launches(graph: GraphLowering, parts: dict[str, list[list[BaseSchedulerNode]]]) -> Iterator[Launch]:
    """``parts``: the kernels that were made of loops side by side, which not one needs to hold, by the first."""
    for node in graph.scheduler.nodes:
        if isinstance(node, ForeachKernelSchedulerNode):
            for loops in parts[node.snodes[0].get_name()]:
                moved, flops = ([of(loop, "triton", graph) for loop in loops] for of in (_moved, _flops))
                yield Launch("triton", sum(moved), sum(flops))
            continue
        kind = _kind(node)
        if kind is not None:
            yield Launch(kind, _moved(node, kind, graph), _flops(node, kind, graph))


def _moved(node: BaseSchedulerNode, kind: str, graph: GraphLowering) -> int:
    """Bytes read and written: as Inductor counts them, but for buffers of which a part is read, where it counts the
    whole: at indices that a loop looks up (a table of embeddings), and rows of a weight."""
    call: Any = node.node
    if kind != "gemm":
        moved, hint = node.get_read_write_buffer_accesses(True, True), graph.sizevars.optimization_hint
        for name, read in _parts(node).items():
            moved[name] = min(moved.get(name, 0), read)  # none where the kernel keeps it to itself
        for name, looks in _looks(node).items():
            moved[name] = min(moved[name], graph.get_dtype(name).itemsize * hint(looks))
        return sum(moved.values())
    numbers = 0
    for value in (*call.inputs, call):
        layout = value.get_layout()
        held = [size for size, stride in zip(layout.size, layout.stride, strict=True) if stride != 0]
        numbers += layout.dtype.itemsize * sympy_product(held)
    return int(graph.sizevars.optimization_hint(numbers))


def _parts(node: BaseSchedulerNode) -> dict[str, int]:
    """Bytes of a buffer that loops read at places that are known, if all of them are (rows of a weight)."""
    by_name: dict[str, list[Any]] = {}
    for dep in node.read_writes.reads_and_writes():
        by_name.setdefault(dep.name, []).append(dep)
    known = {name: deps for name, deps in by_name.items() if all(_is_known(dep) for dep in deps)}
    return {name: sum(dep.numbytes_hint() for dep in deps) for name, deps in known.items()}


def _is_known(dep: Any) -> bool:
    return isinstance(dep, MemoryDep) and not dep.is_indirect()


def _looks(node: BaseSchedulerNode) -> dict[str, Any]:
    """How often loops read a buffer at places that they look up, if none reads it elsewhere."""
    looks: dict[str, Any] = {}
    for dep in node.read_writes.reads:
        if isinstance(dep, MemoryDep) and dep.is_indirect():
            looks[dep.name] = looks.get(dep.name, 0) + sympy_product(dep.size)
    direct = {dep.name for dep in node.read_writes.reads_and_writes() if not getattr(dep, "is_indirect", bool)()}
    return {name: count for name, count in looks.items() if name not in direct}


def _flops(node: BaseSchedulerNode, kind: str, graph: GraphLowering) -> int:
    """By torch's counter; of attention, which that leaves out, and of our own kernel by hand: each query with each key,
    and each weight with each value."""
    call: Any = node.node
    given: Any = getattr(call, "inputs", ())
    own = isinstance(call, ir.UserDefinedTritonKernel) and len(given[0].get_size()) == _HEADS
    products = 2 if kind == "attention" else 1 if own else 0
    if not products:
        return node.estimate_flops() or 0
    query, key = (value.get_size() for value in given[:2])
    return int(graph.sizevars.optimization_hint(2 * products * sympy_product(query) * key[-2]))


def _kind(node: BaseSchedulerNode) -> str | None:
    """What a node of the schedule launches; None: nothing."""
    if isinstance(node, NopKernelSchedulerNode):
        return None
    call = node.node
    if not node.is_extern() or not isinstance(call, ir.ExternKernel):
        return "triton"
    if isinstance(call, ir.UserDefinedTritonKernel):
        return "triton"
    if isinstance(call, ir.MultiOutput | ir.MutationOutput):
        return None
    if isinstance(call, ir.DeviceCopy | ir.DynamicScalar):
        return "host copy"
    name = str(getattr(call, "op_overload", None) or call.get_kernel_name())
    if "scaled_dot_product" in name:
        return "attention"
    return "gemm" if name.split(".")[1] in ("mm", "addmm", "bmm", "baddbmm") else "other"


def on_gpu(graph: fx.Graph) -> None:
    """Turn a graph that was traced elsewhere into one for the GPU, in place: what it creates lies there, and attention
    is the fused kernel that a GPU takes, which here nothing can choose."""
    for node in list(graph.nodes):
        if node.op == "call_function" and "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
        if node.target is aten.scaled_dot_product_attention.default:
            with graph.inserting_before(node):
                fused = _fused_attention(graph, node)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)


def _fused_attention(graph: fx.Graph, node: fx.Node) -> fx.Node:
    query, key, value, *rest = node.args
    names = ("attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, (None, 0.0, False), strict=True)), **dict(zip(names, rest, strict=False)), **node.kwargs}
    mask, dropout, causal, scale = *(given[name] for name in names), node.kwargs.get("scale")
    if mask is None:
        call = graph.call_function(
            aten._scaled_dot_product_flash_attention.default, (query, key, value, dropout, causal), {"scale": scale}
        )
    else:
        bias = graph.call_function(_bias, (query, key, mask))
        call = graph.call_function(
            aten._scaled_dot_product_efficient_attention.default,
            (query, key, value, bias, False, dropout, causal),
            {"scale": scale},
        )
    return graph.call_function(operator.getitem, (call, 0))


def _bias(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """A mask as the memory-efficient kernel takes it."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf")).to(query.dtype)
    return mask.expand(*query.shape[:-1], key.shape[-2])


def assemble(source: str, capability: int, known: set[tuple[str, int]]) -> int:
    """Compile each Triton kernel of a generated source to machine code for sm_``capability``, unless it is ``known``.
    To be called inside ``fake_gpu()``.

    Returns:
        How many were new.

    Raises:
        Exception: ptxas or Triton refused one.
    """
    new = 0
    device = f"cc={capability}, major={capability // 10}"
    for name, code in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", source, re.S):
        code = re.sub(r"cc=\d+, major=\d+", device, code)
        if (code, capability) not in known:
            known.add((code, capability))
            getattr(PyCodeCache.load(code), name).precompile(warm_cache_only=True)
            new += 1
    return new
