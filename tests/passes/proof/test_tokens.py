"""What the tokens of a fragment are, in which no attention tells."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import toca_compile
from tests.models import randomize
from toca_compile import FullCompute, NoSiteError


class Halves(nn.Module):
    """A residual MLP on ``shape``, and a break before it."""

    def __init__(self, breaks: bool = True) -> None:
        super().__init__()
        self.breaks, self.first, self.up, self.down = breaks, nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.down(F.gelu(self.up(x)))


@torch.no_grad()
@pytest.mark.parametrize(("shape", "tokens"), [((2, 6, 8), 6), ((2, 3, 4, 8), 12), ((1, 6, 8), 6)])
def test_rows_of_linear_layers_beside_samples(shape: tuple[int, ...], tokens: int) -> None:
    net = randomize(Halves())
    opt = toca_compile.optimize(net, FullCompute(), lowering="eager")
    x = torch.randn(shape)
    assert torch.equal(opt(x), net(x))
    (site,) = toca_compile.explain(opt).sites
    assert (site.tokens, "partial" in site.actions) == (tokens, True)


@torch.no_grad()
@pytest.mark.parametrize(("breaks", "shape"), [(True, (6, 8)), (False, (2, 6, 8))])
def test_samples_are_no_tokens_and_a_whole_model_has_to_tell_them(breaks: bool, shape: tuple[int, ...]) -> None:
    opt = toca_compile.optimize(randomize(Halves(breaks)), FullCompute(), lowering="eager")
    with pytest.raises(NoSiteError):
        opt(torch.randn(shape))
