"""The generated CUDA kernels of small models, run on the CPU by Triton's interpreter, against the graphs they are made of.

    python benchmarks/interpret.py            # needs Triton

Every call of every variant in short runs under several policies is held against the same graph run eagerly: results, and
buffers that are changed in place. Library calls are those of the CPU; a GPU's own arithmetic is not tried.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything of Triton's is imported

import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cuda_codegen import generate
from fake_gpu import fake_gpu
from torch import Tensor

import toca_compile
from toca_compile import FullCompute, TaylorSeer, TaylorToCa, ToCa
from toca_compile.ir.program import Variant
from toca_compile.lowerings.registry import lowering

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample

POLICIES = {
    "FullCompute": FullCompute(),
    "ToCa": ToCa(4, 3, 0.3, schedule="constant"),
    "ToCa, random": ToCa(4, 3, 0.3, schedule="constant", score="random"),
    "TaylorSeer": TaylorSeer(5, 3, 1),
    "queries": TaylorToCa(5, 3, 1, 0.3, keys="update"),
}
# Where the source says CUDA, and what takes its place.
REPLACED = {
    "async_compile = AsyncCompile()": "from interpret import Kernels, flash; async_compile = Kernels()",
    "empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda": "empty_strided_cuda = empty_strided_cpu",
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = lambda device: 0",
    "torch.ops.aten._scaled_dot_product_flash_attention.default(": "flash(",
    "with torch.cuda._DeviceGuard(0):": "if True:",
    "torch.cuda.set_device(0)": "pass",
}
BLOCKS = {"XBLOCK": 64, "YBLOCK": 16, "R0_BLOCK": 64}
HEAD = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


def flash(query: Tensor, key: Tensor, value: Tensor, *args: Any, scale: float | None = None) -> list[Tensor]:
    """Attention in the layout that the GPU's kernel gives it."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
    return [out.transpose(1, 2).contiguous().transpose(1, 2)]


class Kernels:
    """What the generated source compiles its kernels with."""

    def triton(self, name: str, code: str, **settings: Any) -> "Kernel":
        """A kernel from its source."""
        return Kernel(name, code[code.index("@triton.jit") :])

    def wait(self, scope: dict[str, Any]) -> None:
        """Nothing is compiled."""


class Kernel:
    """One kernel, interpreted."""

    def __init__(self, name: str, code: str) -> None:
        self._function = getattr(_module(HEAD + code), name)
        signature = re.search(r"def \w+\((.*?)\):", code, re.S)
        assert signature is not None
        self._names = [part.split(":")[0].strip() for part in signature.group(1).split(",")]

    def run(self, *args: Any, stream: int) -> None:
        """Call it on the CPU, block by block."""
        given = dict(zip(self._names, args, strict=False))
        blocks = {name: BLOCKS[name] for name in self._names[len(args) :]}
        sizes = [(given[f"{axis}numel"], blocks[f"{axis.upper()}BLOCK"]) for axis in "xy" if f"{axis}numel" in given]
        self._function[tuple(-(-size // block) for size, block in sizes)](*args, **blocks)


def _module(source: str) -> Any:
    """A source as a module: Triton reads the text of its kernels from a file."""
    path = Path(tempfile.mkdtemp()) / "generated.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("generated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lowering("interpreted")
def interpreted(variant: Variant, examples: Sequence[Any]) -> Callable[..., Any]:
    """A lowering: the graph, which holds the generated kernels against itself at each call."""
    with fake_gpu() as made:
        source = generate(variant.module, examples, made).source
    for old, new in REPLACED.items():
        source = source.replace(old, new)
    call = _module(source).call

    def run(*args: Any) -> Any:
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
        theirs = call(list(copies))
        ours = variant.module(*args)
        pairs = [*zip(ours, theirs, strict=True), *zip(args, copies, strict=True)]
        for mine, other in pairs:
            if isinstance(mine, Tensor):
                torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-4)
        COMPARED.append(len(pairs))
        return ours

    return run


COMPARED: list[int] = []


def main() -> None:
    """Sample a small model under each policy."""
    model = randomize(PlainDiT(depth=2))
    for name, policy in POLICIES.items():
        COMPARED.clear()
        opt = toca_compile.optimize(model, policy, lowering="interpreted")
        sample(opt, getattr(policy, "num_steps", 2), noise())
        print(f"{name}: {len(COMPARED)} calls of variants are what their graphs are", flush=True)


if __name__ == "__main__":
    sys.modules["interpret"] = sys.modules["__main__"]
    main()
