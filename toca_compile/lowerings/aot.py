"""AOTInductor: a variant as machine code in files, which a process without Dynamo and Inductor can run.

Such code takes tensors alone. A host number (K, the step) is therefore told by the size of an empty tensor, which is
read on the host, and is a symbol as in any other lowering (``ir/state.py``, ``sizes_of``)::

    forward(x, cache, k)        ⇒        forward(x, cache, k[0, p, n]):  k = p − n

Buffers are changed in place.
"""

import operator
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch._inductor import aot_compile, config

from toca_compile.ir.program import Variant
from toca_compile.ir.state import sizes_of
from toca_compile.ir.table import OpenSizes, at
from toca_compile.lowerings.guards import hold
from toca_compile.lowerings.inductor import fake, machine_trouble, settings, symbol, symbolic_mode, told, with_values

aten = torch.ops.aten


Files = dict[str, bytes]  # by name, as ``torch.export.pt2_archive`` takes them

_KEPT = 256 << 20
"""Bytes of code that are held for equal variants of later exports, such as those of a pipeline's other transformer."""
_made: OrderedDict[Any, Files] = OrderedDict()


def compile_variant(variant: Variant, examples: Sequence[Any], sizes: OpenSizes | None = None) -> Files:
    """Compile a variant.

    Args:
        examples: a fake tensor or a plausible host number for each of the variant's inputs.
        sizes: those of the examples that may be others.

    Raises:
        LoweringError: the machine cannot compile.
        ExportError: the code would not hold for all sizes.
    """
    if sizes is not None:
        return _compile(variant, examples, sizes)
    key = (*told(variant.module.graph, examples), repr(config.save_config_portable()))
    if key not in _made:
        _made[key] = _compile(variant, examples, None)
        while len(_made) > 1 and sum(len(data) for files in _made.values() for data in files.values()) > _KEPT:
            _made.popitem(last=False)
    _made.move_to_end(key)
    return _made[key]


def _compile(variant: Variant, examples: Sequence[Any], sizes: OpenSizes | None) -> Files:
    mode = symbolic_mode()
    size = symbol(mode, "toca_size", sizes.values[-1]) if sizes is not None else None
    own = size.node.expr if size is not None else None  # now: later it is what the compiler takes for it
    device = next((e.device for e in examples if isinstance(e, torch.Tensor)), torch.device("cpu"))
    values: list[torch.Tensor] = []
    numbers: list[list[sympy.Symbol]] = []
    for i, example in enumerate(examples):
        if isinstance(example, torch.Tensor):
            if sizes is not None:
                shape, stride = ([at(one, size) for one in own[i]] for own in (sizes.shapes, sizes.strides))  # type: ignore[arg-type]
                with mode:
                    values.append(torch.empty_strided(shape, stride, dtype=example.dtype, device=example.device))
                continue
            values.append(fake(mode, example))
        else:
            none, *parts = sizes_of(example)
            told = [symbol(mode, f"toca_number_{i}_{j}", part) for j, part in enumerate(parts)]
            numbers.append([one.node.expr for one in told])
            with mode:
                values.append(torch.empty((none, *told), dtype=torch.int8, device=device))
    are_numbers = [not isinstance(e, torch.Tensor) for e in examples]
    graph = with_values(by_sizes(variant.module.graph, are_numbers), values, alone=True)
    module = fx.GraphModule(variant.module, graph)
    files = _files(module, values)
    if sizes is not None and own is not None:
        assert mode.shape_env is not None
        hold(mode.shape_env, own, numbers, sizes)
    return files


def compile_step(module: fx.GraphModule, inputs: Sequence[torch.Tensor | int]) -> Files:
    """Compile a program of whole steps (``compiler/emit_step.py``, ``by_inputs``).

    Args:
        inputs: a tensor like each of its inputs; of one that tells a number of tokens, its second dimension.

    Raises:
        LoweringError: the machine cannot compile.
    """
    mode = symbolic_mode()
    device = next(e.device for e in inputs if isinstance(e, torch.Tensor))
    values: list[torch.Tensor] = []
    for i, example in enumerate(inputs):
        if isinstance(example, torch.Tensor):
            values.append(fake(mode, example))
        else:
            size = symbol(mode, f"toca_number_{i}", example)
            with mode:
                values.append(torch.empty((0, size), dtype=torch.int8, device=device))
    # Up to torch 2.12 what memory a branch may take over is asked of the graph around it, which has other nodes.
    before = torch.torch_version.TorchVersion(torch.__version__) < "2.13"
    with config.patch(allow_buffer_reuse=False) if before else nullcontext():
        return _files(fx.GraphModule(module, with_values(module.graph, values, alone=True)), values)


def _files(module: fx.GraphModule, values: Sequence[torch.Tensor]) -> Files:
    """Compile a graph of tensors alone.

    Raises:
        LoweringError: the machine cannot compile.
    """
    try:
        # Outside inference mode, as every variant is compiled.
        with (
            tempfile.TemporaryDirectory() as folder,
            torch.inference_mode(False),
            torch.no_grad(),
            settings(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own
            options = {"aot_inductor.package": True, "aot_inductor.output_path": f"{folder}/code"}
            files: Any = aot_compile(module, tuple(values), options=options)
            return {Path(file).name: Path(file).read_bytes() for file in map(str, files)}
    except Exception as error:
        trouble = machine_trouble(error)
        if trouble is None:
            raise
        raise trouble from error


def by_sizes(graph: fx.Graph, numbers: Sequence[bool]) -> fx.Graph:
    """A copy of a variant's graph that is told its host numbers by the sizes of tensors. ``numbers``: which of its
    inputs are some."""
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for node in inputs:
        env[node] = copy.node_copy(node)
    for node, number in zip(inputs, numbers, strict=True):
        if number:
            parts = [copy.call_function(aten.sym_size.int, (env[node], dim)) for dim in (1, 2)]
            env[node] = copy.call_function(operator.sub, tuple(parts))
    for node in graph.nodes:
        if node.op == "output":
            copy.output(fx.node.map_arg(node.args[0], env.__getitem__))
        elif node not in env:
            env[node] = copy.node_copy(node, env.__getitem__)
    return copy
