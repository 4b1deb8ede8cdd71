"""Products of few rows and convolutions of patches, rewritten as a GPU is given them, on the CPU."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from toca_compile.lowerings.few_rows import FEW, convolution_of_patches, fuse_few_rows, linear_as_sum

aten = torch.ops.aten
MADE = (linear_as_sum, convolution_of_patches)


def rewritten(f: Callable[..., Tensor], *inputs: Tensor | None) -> tuple[fx.GraphModule, list[Tensor]]:
    """A function's graph after the rewriting, and its inputs."""
    given = [x for x in inputs if x is not None]
    module = make_fx(f, tracing_mode="fake", pre_dispatch=True)(*given)
    fuse_few_rows(module.graph)
    module.recompile()
    return module, given


def made(module: fx.GraphModule) -> list[str]:
    return [n.target.__name__ for n in module.graph.nodes if n.target in MADE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8,), (FEW, 8), (2, 2, 8)])
def test_few_rows_are_a_sum(shape: Sequence[int], dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*s, dtype=dtype) for s in (shape, (6, 8), (6,)))
    for own in (bias, None):
        module, given = rewritten(lambda x, w, *b: F.linear(x, w, *b), x, weight, own)
        assert made(module) == ["linear_as_sum"]
        torch.testing.assert_close(module(*given), F.linear(x, weight, own))


@pytest.mark.parametrize("shape", [(FEW + 1, 8), (0, 8), (2, 3, 8)])
def test_more_rows_stay_a_product(shape: Sequence[int]) -> None:
    module, _ = rewritten(F.linear, torch.randn(*shape), torch.randn(6, 8))
    assert not made(module)


def test_a_bias_by_name_is_kept() -> None:
    graph = fx.Graph()
    x, weight, bias = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    graph.output(graph.call_function(aten.linear.default, (x, weight), {"bias": bias}))
    values = torch.randn(2, 8), torch.randn(6, 8), torch.randn(6)
    x.meta["val"] = values[0]
    fuse_few_rows(graph)
    module = fx.GraphModule({}, graph)
    assert made(module) == ["linear_as_sum"]
    torch.testing.assert_close(module(*values), F.linear(*values))


@pytest.mark.parametrize(
    ("convolve", "size", "window"),
    [(F.conv1d, (9,), (4,)), (F.conv2d, (8, 6), (2, 3)), (F.conv2d, (7, 5), (2, 2)), (F.conv3d, (3, 4, 6), (1, 2, 2))],
)
def test_patches_are_rows(convolve: Callable[..., Tensor], size: tuple[int, ...], window: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(2, 3, *size), torch.randn(5, 3, *window), torch.randn(5)
    for own in (bias, None):
        module, given = rewritten(lambda x, w, *b: convolve(x, w, *(b or (None,)), stride=window), x, weight, own)
        assert made(module) == ["convolution_of_patches"]
        expected = convolve(x, weight, own, stride=window)
        torch.testing.assert_close(module(*given), expected)
        assert module(*given).stride() == expected.stride()


@pytest.mark.parametrize(
    "other", [{"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "dilation": 2}, {"stride": 2, "groups": 3}]
)
def test_other_convolutions_stay(other: dict[str, int]) -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(6, 3 // other.get("groups", 1), 2, 2)
    module, _ = rewritten(lambda x, w: F.conv2d(x, w, **other), x, weight)
    assert not made(module)
