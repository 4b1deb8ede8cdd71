"""Storage: how a value that is kept lies in memory, in which dtype and on which device.

A policy chooses it; what is kept is the same. Emissions write and read buffers as they are *seen*: in the value's own
dtype or a narrower one, beside the value. Where they *lie* otherwise, a pass (``passes/variants/store.py``) puts the
way there and back around what the emissions did.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from toca_compile.ir.fields import Device, Dtype

TAIL = 16
"""Bytes behind a packed row, its exponent in each: so many, so that rows begin where whole vectors do."""


@dataclass(frozen=True)
class Storage:
    """How a kept value lies.

    Args:
        dtype: None: the value's own. Numbers of one byte are packed, row by row, with an exponent that they share.
        device: None: the value's own.
    """

    dtype: Annotated[torch.dtype, Dtype()] | None = None
    device: Annotated[str, Device()] | None = None

    def packs(self, value: torch.Tensor) -> bool:
        """Whether a value is packed: one of real numbers, in rows."""
        return self.dtype is not None and self.dtype.itemsize == 1 and value.is_floating_point() and value.dim() > 0

    def seen(self, value: torch.Tensor) -> torch.Tensor:
        """A fake tensor like what emissions keep a (fake) value in."""
        return value.new_empty(value.shape, dtype=None if self.packs(value) else self.dtype)

    def lies(self, seen: torch.Tensor) -> torch.Tensor:
        """A fake tensor like the buffer in memory."""
        if self.packs(seen):
            *lead, size = seen.shape
            return seen.new_empty([*lead, size + TAIL], dtype=torch.uint8, device=self.device)
        return seen if self.device is None else seen.new_empty(seen.shape, device=self.device)
