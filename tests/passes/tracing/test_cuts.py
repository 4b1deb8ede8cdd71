"""Cuts: one spelling for values that are cut, joined and written over part by part."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.programs import program_of

aten = torch.ops.aten


class Does(nn.Module):
    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(x) + 1


def targets(what: Callable[[Tensor], Tensor]) -> list[object]:
    """The ops of a graph, which must compute what the function does."""
    x = torch.randn(3, 8, 2)
    program = program_of(Does(what), x)
    assert torch.equal(program.module(x)[0], what(x) + 1)
    return [n.target for n in program.module.graph.nodes if n.op == "call_function"]


def written(*parts: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    def write(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for factor, (start, end) in enumerate(parts, 2):
            out[:, start:end] = factor * x[:, start:end]
        return out

    return write


def test_tokens_are_cut_out_one_by_one_and_features_together() -> None:
    tokens = targets(lambda x: sum(x.split((3, 5), 1)[i].sum(1, keepdim=True) * x for i in range(2)))  # type: ignore[misc]
    assert tokens.count(aten.slice.Tensor) == 2
    assert aten.split_with_sizes.default not in tokens
    features = targets(lambda x: torch.cat(x.chunk(2, -1)[::-1], -1))
    assert aten.slice.Tensor not in features


@pytest.mark.parametrize(
    "parts", [((0, 3), (3, 8)), ((3, 8), (0, 3)), ((2, 5), (5, 8), (0, 2)), ((0, 8), (4, 8), (0, 4))]
)
def test_what_is_written_over_all_of_a_value_is_joined(parts: tuple[tuple[int, int], ...]) -> None:
    ops = targets(written(*parts))
    assert aten.cat.default in ops
    assert not {aten.slice_scatter.default, aten.copy.default} & set(ops)


@pytest.mark.parametrize(
    "parts", [((0, 3), (4, 8)), ((0, 8), (4, 8), (0, 3)), ((0, 4), (3, 8)), ((0, 4), (0, 4)), ((0, 8), (3, 8), (0, 4))]
)
def test_what_is_left_of_before_or_written_twice_is_not(parts: tuple[tuple[int, int], ...]) -> None:
    assert aten.slice_scatter.default in targets(written(*parts))


def test_a_result_lies_in_memory_as_what_was_written_over() -> None:
    class Laid(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = torch.empty_like(x.mT).mT
            out[:, :3], out[:, 3:] = x[:, :3], 2 * x[:, 3:]
            return out

    x = torch.randn(3, 8, 2)
    (out,) = program_of(Laid(), x).module(x)
    assert torch.equal(out, Laid()(x))
    assert out.stride() == Laid()(x).stride()
