"""What a dtype loses, and where there is none."""

import pytest
import torch

from toca_compile.ir.precision import rounding_error, unusable


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 11), (torch.bfloat16, 8), (torch.float8_e5m2, 3)])
def test_half_a_digit_is_lost(dtype: torch.dtype, digits: int) -> None:
    assert 2.0**-digits / 4 < rounding_error(dtype) < 2.0**-digits / 2


def test_a_gpu_that_cannot_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ask = unusable.__wrapped__  # whatever was asked before
    assert "8.9" in (ask(torch.float8_e4m3fn, torch.device("cuda")) or "")
    assert unusable(torch.float8_e4m3fn, torch.device("cpu")) is None
    assert unusable(torch.float8_e5m2, torch.device("cpu")) is None
