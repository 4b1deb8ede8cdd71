"""What a call tells of itself."""

import torch

from toca_compile.ir.signature import UNKNOWN, called


def test_calls_alike_are_told_by_one_object() -> None:
    """A signature checks its fields when it is made: not at every step."""
    latents = torch.zeros(2, 4, 8, 8)
    call = called({"t": torch.ones(2), "x": latents})
    assert (call.size, call.dtype) == ((4, 8, 8), "float32")
    assert called({"x": torch.ones(3, 4, 8, 8)}) is call
    assert called({"x": latents.double()}) != call
    assert called({"t": torch.ones(2)}) is UNKNOWN
