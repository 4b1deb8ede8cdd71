"""Packed rows: one byte a number, and an exponent that a row shares."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import toca_compile.ops  # noqa: F401  (defines the ops)
from toca_compile.ir.storage import TAIL

toca = torch.ops.toca
ONE_BYTE = [torch.float8_e4m3fn, torch.float8_e5m2]


def back(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """There and back."""
    return toca.unpack(toca.pack(value, dtype, TAIL), dtype, TAIL, value.dtype)


@pytest.mark.parametrize("dtype", ONE_BYTE)
@given(power=st.integers(-90, 90), seed=st.integers(0, 99), wide=st.sampled_from([torch.float32, torch.bfloat16]))
def test_each_number_keeps_its_digits_at_any_size(dtype: torch.dtype, power: int, seed: int, wide: torch.dtype) -> None:
    """Relative to itself, or where a number is small beside its row's largest, to that."""
    value = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed))
    value = (value * 2.0**power * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]).to(wide)
    info = torch.finfo(dtype)
    largest = value.abs().amax(-1, keepdim=True).double()
    bound = value.abs().double() * info.eps / 2 + largest * info.smallest_normal / info.max * 2
    assert ((back(value, dtype).double() - value.double()).abs() <= bound * 1.01).all()


@pytest.mark.parametrize("dtype", ONE_BYTE)
def test_rows_are_their_own(dtype: torch.dtype) -> None:
    value = torch.randn(4, 6)
    packed = toca.pack(value, dtype, TAIL)
    assert packed.shape == (4, 6 + TAIL)
    assert packed.dtype is torch.uint8
    other = value.clone()
    other[2] *= 1e6
    assert torch.equal(toca.pack(other, dtype, TAIL)[[0, 1, 3]], packed[[0, 1, 3]])
    # What was rounded is not rounded again: a buffer that is read and written stays as it is.
    assert torch.equal(back(back(value, dtype), dtype), back(value, dtype))


@pytest.mark.parametrize("dtype", ONE_BYTE)
def test_zeros_and_what_is_no_number(dtype: torch.dtype) -> None:
    assert torch.equal(back(torch.zeros(2, 3), dtype), torch.zeros(2, 3))
    fresh = torch.zeros(2, 3 + TAIL, dtype=torch.uint8)  # as a buffer begins
    assert torch.equal(toca.unpack(fresh, dtype, TAIL, torch.float32), torch.zeros(2, 3))
    for wrong in (torch.nan, torch.inf, -torch.inf):
        told = back(torch.tensor([[1.0, wrong], [1.0, 2.0]]), dtype)
        assert not told[0].isfinite().all()
        assert torch.equal(told[1], torch.tensor([1.0, 2.0]))
