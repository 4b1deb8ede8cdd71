"""Host numbers as sizes of empty tensors (what is compiled of it: ``tests/exported/test_archive.py``)."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from toca_compile.ir.state import sizes_of
from toca_compile.lowerings.aot import by_sizes


@given(number=st.integers(-(2**48), 2**48))
def test_a_number_is_told_by_sizes_and_takes_no_memory(number: int) -> None:
    tensor = torch.empty(sizes_of(number), dtype=torch.int8)
    assert tensor.numel() == 0
    assert tensor.shape[1] - tensor.shape[2] == number


def test_a_graph_that_is_told_its_numbers_by_sizes() -> None:
    graph = fx.Graph()
    x, k, step = (graph.placeholder(name) for name in ("x", "k", "step"))
    shifted = graph.call_function(torch.ops.aten.add.Tensor, (x, step))
    graph.output((graph.call_function(torch.ops.aten.narrow.default, (shifted, 0, 0, k)), k))
    module = fx.GraphModule({}, by_sizes(graph, [False, True, True]))
    for k_now, step_now in ((1, 0), (3, -7)):
        told = [torch.empty(sizes_of(n), dtype=torch.int8) for n in (k_now, step_now)]
        rows, same = module(torch.zeros(4), *told)
        assert torch.equal(rows, torch.full((k_now,), float(step_now)))
        assert same == k_now
