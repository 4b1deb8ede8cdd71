"""Kernels in Triton, each imported where it is called: Triton comes with the builds of torch for a GPU."""

from functools import cache
from importlib.util import find_spec

import torch


def run_on(device: torch.device) -> bool:
    """Whether the kernels do."""
    return device.type == "cuda" and _is_there()


@cache
def _is_there() -> bool:
    return find_spec("triton") is not None
