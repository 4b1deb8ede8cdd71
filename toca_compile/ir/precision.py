"""What a dtype loses of the values kept in it, measured."""

from functools import cache

import torch


@cache
def rounding_error(dtype: torch.dtype) -> float:
    """Relative error of normal values after a round trip through a dtype: root mean square over root mean square."""
    values = torch.randn(4096, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    back = torch.empty(values.shape, dtype=dtype, device="cpu").copy_(values).float()
    return float((back - values).norm() / values.norm())


@cache
def unusable(dtype: torch.dtype, device: torch.device, *, rows: bool) -> str | None:
    """Why torch cannot keep values in a dtype on a device: whole values, or (``rows``) some tokens of them."""
    values, index = torch.ones(2, 2, device=device), torch.zeros(1, 2, dtype=torch.int64, device=device)
    try:
        kept = torch.zeros(2, 2, dtype=dtype, device=device).copy_(values)
        if rows:
            kept.scatter_(0, index, kept.gather(0, index))
        kept.float()
    except RuntimeError as error:  # NotImplementedError is one
        return str(error).splitlines()[0]
    return None
