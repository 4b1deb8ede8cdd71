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
def unusable(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch cannot keep values in a dtype on a device."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is not None and capability < (8, 9) and dtype is torch.float8_e4m3fn:
        return "Triton has it from compute capability 8.9 on; 'float8_e5m2' it has before"
    try:
        torch.ones(2, 2, device=device).to(dtype).float()
    except RuntimeError as error:  # NotImplementedError is one
        return str(error).splitlines()[0]
    return None
