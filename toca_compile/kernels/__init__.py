"""Kernels: for a GPU in Triton, which comes with torch's builds for one, so that each is imported where it is called;
for a CPU in C++."""

from functools import cache
from importlib.util import find_spec

import torch


def run_on(device: torch.device) -> bool:
    """Whether those in Triton do."""
    return device.type == "cuda" and _is_there()


@cache
def _is_there() -> bool:
    return find_spec("triton") is not None
