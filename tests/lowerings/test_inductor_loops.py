"""Loops that Inductor fuses for a CPU around a buffer that another waits for."""

import torch
from torch import Tensor

from toca_compile.lowerings.inductor import settings


@torch.no_grad()
def test_what_waits_for_a_buffer_need_not_read_it() -> None:
    """Without our settings torch fails here (pytorch/pytorch#196570)."""
    side = torch.arange(8)

    def biased(x: Tensor) -> Tensor:
        bias = torch.full((8, 8), -9.0)
        bias[side[:, None], side[None]] = 1.0
        return (x + bias).softmax(-1)

    x = torch.randn(8, 8)
    torch._dynamo.reset()
    with settings():
        torch.testing.assert_close(torch.compile(biased)(x), biased(x))
