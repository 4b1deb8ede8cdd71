"""Transforms: what ``torch.vmap`` maps is ops of the whole."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.programs import program_of
from tests.versions import LOSES_TRANSFORMS, needs_transforms
from toca_compile import UnsupportedGraphError
from toca_compile.passes.tracing import transforms


class Mapped(nn.Module):
    """Adds what a mapped function makes."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.table = make, nn.Buffer(torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x.cos() + self.make(x) * self.table


def nested(x: Tensor) -> Tensor:
    places = torch.arange(3)
    return torch.vmap(torch.vmap(lambda i, j: (i >= j) * x.sum(), (None, 0)), (0, None))(places, places)[:2]


def written(x: Tensor) -> Tensor:
    def one(row: Tensor) -> Tensor:
        row = row.clone()
        row[0] = 7
        return row.mul_(2)

    return torch.vmap(one)(x)


def differentiated(x: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(lambda row: (row**3).sum()))(x)


MAPPED = [nested, written, differentiated, torch.vmap(lambda row: row.new_zeros(3) + row.sum())]


@needs_transforms
@pytest.mark.parametrize("make", MAPPED)
def test_what_is_mapped_becomes_ops(make: Callable[[Tensor], Tensor]) -> None:
    net, x = Mapped(make), torch.randn(2, 3)
    program = program_of(net, x)
    calls = [n.target for n in program.module.graph.nodes if n.op == "call_function"]
    assert all(isinstance(target, torch._ops.OpOverload) for target in calls)
    given = [x if p.meta["val"].dim() > 1 else net.table for p in program.placeholders]
    torch.testing.assert_close(program.module(*given)[0], net(x))
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0


@pytest.mark.skipif(not LOSES_TRANSFORMS, reason="torch sees what a transform makes from 2.12 on")
@pytest.mark.parametrize("make", MAPPED)
def test_what_a_transform_makes_is_refused_where_torch_loses_it(make: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedGraphError, match="makes a tensor that tracing does not see"):
        program_of(Mapped(make), torch.randn(2, 3))


def test_a_transform_that_cannot_be_traced_is_named_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it begins is a state of the process: left open, Dynamo's own guard fails."""

    def stops(*_: object) -> None:
        torch._C._functorch._vmap_increment_nesting(3, "error")
        raise NotImplementedError

    monkeypatch.setattr(transforms, "run_traced", stops)
    with pytest.raises(UnsupportedGraphError, match=r"torch\.vmap.*test_transforms\.py"):
        program_of(Mapped(nested), torch.randn(2, 3))
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
