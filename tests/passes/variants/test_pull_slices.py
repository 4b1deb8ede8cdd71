"""PullSlices: what a slice leaves out is not computed, and what it takes is the same to the last bit."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from toca_compile.passes.variants.pull_slices import pull_slices

TEXT, IMAGE, GATE = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 1, 4)
WHOLE = torch.randn(2, 8, 4)
Function = Callable[..., Any]


def pulled(f: Function, inputs: Sequence[Tensor], kept: Sequence[str] = ()) -> fx.GraphModule:
    """A function's graph with its slices pulled, held against the function; ``kept``: the ops whose results are handed
    out too."""
    module = make_fx(f, tracing_mode="fake")(*inputs)
    end = module.graph.output_node()
    results = [*end.all_input_nodes, *(n for n in module.graph.nodes if n.op == "call_function" and n.name in kept)]
    module.graph.erase_node(end)
    pull_slices(module.graph, results)
    module.graph.output(tuple(results))
    module.graph.eliminate_dead_code()
    module.recompile()
    assert torch.equal(module(*inputs)[0], f(*inputs))
    return module


def shapes(module: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    """What is computed, by name."""
    views = ("slice", "exp")
    return {
        n.name: tuple(n.meta["val"].shape)
        for n in module.graph.nodes
        if n.op == "call_function" and not n.name.startswith(views)
    }


def joined(text: Tensor, image: Tensor, gate: Tensor, whole: Tensor) -> Tensor:
    return (torch.cat([text, image], 1) + gate * whole)[:, 3:].exp()


def test_what_is_cut_off_is_not_computed() -> None:
    module = pulled(joined, (TEXT, IMAGE, GATE, WHOLE))
    assert set(shapes(module).values()) == {(2, 5, 4)}
    assert not any(n.name.startswith("cat") for n in module.graph.nodes)
    (text, *_) = module.graph.find_nodes(op="placeholder")
    assert not text.users


@pytest.mark.parametrize(
    ("f", "computed"),
    [
        (lambda t, i, g, w: torch.cat([t, i], 1)[:, 4:6].exp(), []),  # a part of a piece
        (lambda t, i, g, w: (w - i[0, :1]).neg()[:, :3].exp(), [(5, 4), (2, 3, 4), (2, 3, 4)]),  # fewer dimensions
        (lambda t, i, g, w: (w * w)[..., 1:].exp(), [(2, 8, 3)]),  # read twice by one call
        (lambda t, i, g, w: w.to(torch.float64)[:, -2:].exp(), [(2, 2, 4)]),
        (lambda t, i, g, w: (g + w)[1:].exp(), [(1, 8, 4)]),  # samples
    ],
)
def test_slices_move(f: Function, computed: list[tuple[int, ...]]) -> None:
    module = pulled(f, (TEXT, IMAGE, GATE, WHOLE))
    assert list(shapes(module).values()) == computed


@pytest.mark.parametrize(
    ("f", "kept"),
    [
        (lambda t, i, g, w: torch.cat([t, i], 1)[:, 2:].exp(), ()),  # of two pieces
        (lambda t, i, g, w: torch.cat([w, w], 2)[:, 2:].exp(), ()),  # joined along another dimension
        (lambda t, i, g, w: (g * w)[:, ::2].exp(), ()),
        (lambda t, i, g, w: w.softmax(1)[:, 2:].exp(), ()),  # mixes
        (lambda t, i, g, w: (g * w)[:, 2:].exp(), ("mul",)),  # is handed out
        (lambda t, i, g, w: torch.cat([t, i], 1)[:, 3:], ()),  # would hand out what was given
        (lambda t, i, g, w: (g * w)[:, 0:].exp(), ()),  # takes all
    ],
)
def test_what_is_needed_whole_stays(f: Function, kept: Sequence[str]) -> None:
    inputs = (TEXT, IMAGE, GATE, WHOLE)
    before = shapes(make_fx(f, tracing_mode="fake")(*inputs))
    assert shapes(pulled(f, inputs, kept)) == before


def test_what_another_reads_stays() -> None:
    def f(gate: Tensor, whole: Tensor) -> Tensor:
        both = gate * whole
        return both[:, 6:].exp() + both[:, :2].exp()

    assert shapes(pulled(f, (GATE, WHOLE)))["mul"] == (2, 8, 4)
