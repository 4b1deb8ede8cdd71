"""Attention and the columns of its map on a CPU: ``attention.cpp``, compiled once a machine with Inductor's compiler
and kept with its code."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def runs_on(device: torch.device) -> bool:
    """Whether the kernel does."""
    return device.type == "cpu" and sys.platform != "win32"


@cache
def load() -> Any:
    """The kernel's function.

    Raises:
        CppCompileError, InvalidCxxCompiler: the machine cannot compile.
    """
    from torch._inductor.codecache import CppCodeCache  # a second to import: compiled code alone comes here

    function = CppCodeCache.load(Path(__file__).with_suffix(".cpp").read_text(), device_type="cpu").attention
    number, address = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [*[address] * 7, ctypes.c_double, number, number]
    function.restype = None
    return function


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, stride: int) -> tuple[Tensor, Tensor]:
    """softmax(scale·q·kᵀ)·v, and the sums over every ``stride``-th row of the map.

    Args:
        query: float32 ``[batch, heads, queries, d]``, the last dimension contiguous, as of key and value.
        key, value: ``[batch, heads, keys, d]``.

    Returns:
        ``[batch, heads, queries, d]``, laid out with the heads beside their features as torch lays it out on a CPU, and
        ``[batch, heads, keys]``.
    """
    (batch, heads, queries, size), keys, of_value = query.shape, key.shape[-2], value.shape[-1]
    threads = torch.get_num_threads()
    groups = -(-threads // (batch * heads))
    out = query.new_empty(batch, queries, heads, of_value).transpose(1, 2)
    received = query.new_empty(batch, heads, groups, keys)
    sizes = _numbers(batch, heads, queries, keys, size, of_value, groups)
    strides = _numbers(*(n for x in (query, key, value, out) for n in x.stride()[:3]))
    tensors = (x.data_ptr() for x in (query, key, value, out, received))
    load()(*tensors, sizes, strides, scale, stride, threads)
    return out, received.sum(2)


def _numbers(*numbers: int) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(numbers))(*numbers)
