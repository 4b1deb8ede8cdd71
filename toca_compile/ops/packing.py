"""Numbers of one byte with an exponent that the numbers of a row share, a power of two in a byte of its own (E8M0, of
the OCP Microscaling Formats specification 1.0): a coarse float has few digits, but with that any range."""

import torch
from torch import Tensor

from toca_compile.ops.registry import op

_EXPONENT = 23  # where the exponent of a float32 begins: an E8M0 byte is that field
_LARGEST = 254  # the next would be infinity


@op("pack(Tensor value, ScalarType dtype, int tail) -> Tensor")
def pack(value: Tensor, dtype: torch.dtype, tail: int) -> Tensor:
    """Rows (the last dimension) in a dtype of one byte, each multiplied by the power of two that brings its largest
    number to within a factor of two of the dtype's limit: uint8 ``[…, size + tail]``, whose last ``tail`` bytes are the
    row's exponent. A row that holds an infinity, or NaN, holds one afterwards."""
    wide = value.float()
    limit = torch.finfo(dtype).max
    # Of a positive float32 the bits above the exponent's begin are the exponent: one more is beyond the number.
    largest = wide.abs().amax(-1, keepdim=True) / limit
    exponent = ((largest.view(torch.int32) >> _EXPONENT) + 1).clamp(max=_LARGEST)
    numbers = (wide / (exponent << _EXPONENT).view(torch.float32)).to(dtype)
    return torch.cat([numbers.view(torch.uint8), exponent.to(torch.uint8).expand(*exponent.shape[:-1], tail)], -1)


@op("unpack(Tensor packed, ScalarType dtype, int tail, ScalarType into) -> Tensor")
def unpack(packed: Tensor, dtype: torch.dtype, tail: int, into: torch.dtype) -> Tensor:
    """What ``pack`` made of rows in ``dtype``, in the dtype ``into``: ``[…, size]``. Of zeros, zeros."""
    exponent = packed[..., -1:].to(torch.int32) << _EXPONENT
    numbers = packed[..., :-tail].contiguous().view(dtype)
    return (numbers.float() * exponent.view(torch.float32)).to(into)
