"""Samples: which graphs compute each sample of a batch on its own, and what stops the proof."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.models import PlainDiT, randomize
from tests.programs import program_of
from tests.sampling import noise
from toca_compile.ir.factors import Factors
from toca_compile.ir.types import AxisTypes
from toca_compile.passes.proof.follow import Blocked
from toca_compile.passes.proof.samples import sample_factor, samples_in

Change = Callable[[Tensor], Tensor]


class Changed(PlainDiT):
    """A DiT whose latents or whose answer is changed by something."""

    def __init__(self, before: Change, after: Change) -> None:
        super().__init__(depth=1)
        self.before, self.after = before, after

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.after(super().forward(self.before(x), t, y))


def proof(before: Change = lambda x: x, after: Change = lambda x: x, batch: int = 4) -> int | Blocked:
    model = randomize(Changed(before, after))
    program = program_of(model, noise(batch), torch.zeros(batch), torch.zeros(batch, dtype=torch.long))
    # A tensor that the model finds elsewhere is an input of the graph too, and no request's.
    return sample_factor(program, [n for n in program.varying if n.meta["val"].dtype != TABLE.dtype])


TABLE = torch.linspace(0, 1, 4, dtype=torch.float64)

MIXING: dict[str, tuple[Change, str]] = {
    "a mean over samples": (lambda x: x - x.mean(0, keepdim=True), "mixes the samples"),
    "a sum of all": (lambda x: x / x.abs().sum(), "reduces over the samples"),
    "the largest of all": (lambda x: x / x.abs().max(), "reduces over the samples"),
    "a place in the batch": (
        lambda x: x + torch.arange(4)[:, None, None, None], "tells the samples apart by their place",
    ),
    "a running sum": (lambda x: x.cumsum(0), "mixes the samples"),
    "another order": (lambda x: x.flip(0), "samples"),
    "the first sample": (lambda x: x + x[:1], "samples"),
    "one half for both": (lambda x: torch.cat([x[:2], x[:2]]), ""),
    "one against another": (
        lambda x: x + (x.flatten(1) @ x.flatten(1).T).softmax(-1).sum(-1)[:, None, None, None], "samples",
    ),
    "weights of places": (lambda x: (x.permute(1, 2, 3, 0) * TABLE.float()).permute(3, 0, 1, 2), "a row for each sample"),
    "another sample's pixels": (lambda x: x.reshape(2, 2, 2, 8, 8).transpose(0, 2).reshape(4, 2, 8, 8), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_what_lets_samples_know_of_one_another_stops_it(name: str) -> None:
    change, why = MIXING[name]
    for found in (proof(before=change), proof(after=change)):
        assert isinstance(found, Blocked), name
        assert why in str(found)


ALONE: dict[str, Change] = {
    "nothing": lambda x: x,
    "a mean over pixels": lambda x: x - x.mean((2, 3), keepdim=True),
    "the same for all": lambda x: x + torch.ones(4, 1, 1, 1),
    "samples and rows in one dimension": lambda x: (
        (x.transpose(1, 2).reshape(32, 2, 8) + 1).reshape(4, 8, 2, 8).transpose(1, 2)
    ),
    "samples in the last dimension": lambda x: (x.permute(1, 2, 3, 0) * 2).permute(3, 0, 1, 2),
    "positions for each": lambda x: x + torch.arange(8).expand(4, 1, 8, 8),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_each_sample_computes_of_itself_does_not(name: str) -> None:
    assert isinstance(proof(before=ALONE[name], after=ALONE[name]), int)


def test_where_samples_lie_among_the_factors_of_a_dimension() -> None:
    factors = Factors()
    (b,), (h,), (c,) = factors.new(4), factors.new(3), factors.new(5)
    types = AxisTypes(factors)
    assert samples_in(((b,), (h, c)), b, types) == (0, 1)
    assert samples_in(((c,), (h, b)), b, types) == (1, 3)
    assert samples_in(((c,), (b, h)), b, types) == (1, 1)
    assert samples_in(((c,), (h,)), b, types) is None
