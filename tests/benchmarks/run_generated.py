"""Inductor's code for a GPU, run in Triton's interpreter on CPU tensors, of kernels and matrix products alone."""

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._inductor.runtime import triton_helpers

BLOCKS = {"X": 8, "Y": 8, "R": 16}  # places of a block, by the first letter of its name

# What the interpreter lacks has the same meaning in the language itself.
_INSTEAD = (
    (r"libdevice\.(exp|sqrt)\b", r"tl.\1"),
    (r"libdevice\.rsqrt\b", "tl.rsqrt"),
    (r"tl_math\.(sin|cos)\b", r"tl.\1"),
    (r"^( *)tl\.device_assert.*$", r"\1pass"),
    (r"^@triton_heuristics\.\w+\(", "@Launched.of("),
)
# The wrapper around them asks for a device.
_ON_CPU = (
    (r"^from torch._C import _cuda_getCurrentRawStream.*$", "get_raw_stream = int"),
    (r"^empty_strided_cuda = .*$", "empty_strided_cuda = empty_strided_cpu"),
    (r"^async_compile = .*$", "async_compile = Kernels(__file__)"),
    (r"^async_compile\.wait.*$", ""),
    (r"with torch\.cuda\._DeviceGuard\(0\):", "if True:"),
    (r"torch\.cuda\.set_device\(0\)", "pass"),
)


class Launched:
    """A kernel that is launched by its interpreter, over the grid that Inductor says."""

    def __init__(self, function: Any, meta: dict[str, Any]) -> None:
        self._function, self._meta = function, meta

    @classmethod
    def of(cls, **meta: Any) -> Callable[[Any], "Launched"]:
        return lambda function: cls(function, meta)

    def run(self, *args: Any, stream: int) -> None:
        signature = self._meta["triton_meta"]["signature"]
        blocks = {name: BLOCKS[name[0]] for name, kind in signature.items() if kind == "constexpr"}
        given = dict(zip((name for name in signature if name not in blocks), args, strict=True))
        sizes = self._meta["inductor_meta"].get("combo_grid_meta")
        if sizes is None:
            grid = [-(-given[f"{d}numel"] // blocks[f"{d.upper()}BLOCK"]) for d in "xy" if f"{d}numel" in given]
        else:
            each = [-(-sizes[f"xnumel_{i}"] // blocks[f"XBLOCK_{i}"]) for i in range(sizes["num_kernels"])]
            grid = [sum(each)]
        self._function[tuple(grid)](**given, **blocks)


class Kernels:
    """In place of what compiles kernels; they are written to files beside the wrapper, where the interpreter reads
    them."""

    def __init__(self, wrapper: str) -> None:
        self._folder = Path(wrapper).parent

    def triton(self, name: str, source: str, device_str: str) -> Launched:
        code = f"from {__name__} import Launched\n{_replaced(source, _INSTEAD)}"
        kernel: Launched = getattr(_module(self._folder / f"{name}.py", code), name)
        return kernel


def run_generated(source: str, inputs: Sequence[Tensor], folder: Path) -> Sequence[Tensor]:
    """What a generated wrapper returns. To be called in a process in which Triton interprets."""
    triton_helpers.set_driver_to_gpu = lambda: None  # type: ignore[assignment]
    code = f"from {__name__} import Kernels\n{_replaced(source, _ON_CPU)}"
    results: Sequence[Tensor] = _module(folder / "wrapper.py", code).call(list(inputs))
    return results


def difference(file: str) -> float:
    """How far the results of what a file holds, ``(source, inputs, expected)``, lie from those expected."""
    source, inputs, expected = torch.load(file)
    made = run_generated(source, inputs, Path(file).parent)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, expected, strict=True))


def _replaced(source: str, pairs: Sequence[tuple[str, str]]) -> str:
    for pattern, instead in pairs:
        source = re.sub(pattern, instead, source, flags=re.M)
    return source


def _module(path: Path, code: str) -> ModuleType:
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
