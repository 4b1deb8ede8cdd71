"""A machine on which Inductor cannot work is named, with the remedy."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.runs import optimized, steps
from tests.sampling import noise, sample
from toca_compile import FullCompute, TocaError


@pytest.mark.parametrize("trouble", ["compiler", "disk", "folder"])
def test_a_machine_that_cannot_compile_is_named(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import exc

    from toca_compile.lowerings import inductor

    error: Exception = {
        "compiler": exc.InvalidCxxCompiler(),
        "disk": OSError(28, "No space left on device", "/tmp/x"),
        "folder": PermissionError(13, "Permission denied", "/nowhere"),
    }[trouble]

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(inductor, "standalone_compile", fail)
    inductor.clear()
    model = randomize(PlainDiT(depth=1))
    opt = toca_compile.optimize(model, FullCompute())
    wanted = {"compiler": r"C\+\+ compiler", "disk": "TORCHINDUCTOR_CACHE_DIR", "folder": "TORCHINDUCTOR_CACHE_DIR"}
    with torch.no_grad(), pytest.raises(TocaError, match=wanted[trouble]):
        opt(noise(), torch.full((2,), 900), torch.arange(2))
    assert torch.isfinite(steps(model, noise(), [900])).all()
    sample(optimized(model, FullCompute()), 1, noise())


def test_a_cache_folder_that_cannot_be_made_is_named() -> None:
    """torch makes it when Dynamo is imported."""
    code = "try:\n from toca_compile import optimize\nexcept Exception as e:\n print(type(e).__name__, e)"
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere"}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert told.startswith("LoweringError")
    assert "TORCHINDUCTOR_CACHE_DIR" in told
