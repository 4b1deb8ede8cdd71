"""One process, many compilations: each test starts with an empty Dynamo."""

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

import toca_compile
from tests.programs import printed_stages
from toca_compile import FullCompute

torch.set_num_threads(1)  # models this small are slower on several, and the suite runs in several processes
# pytest listens to every logger that does not propagate, and torch would print all that it traces to be heard.
logging.getLogger("torch.__trace").propagate = True
gc.set_threshold(*gc.get_threshold()[:2], 50)  # all that is alive is looked through five times less often
os.environ["TOCA_VERIFY"] = "all"  # every partial variant is held against its dense meaning
os.environ["TORCH_WARM_POOL"] = "0"  # torch.compile would start processes for GPUs' kernels, each with its own torch


_modules = 0  # that were imported when the garbage collector was told to leave alone what there is


def leave_imports_alone() -> None:
    """Tracing makes many objects, so garbage is looked for often, and not each time among those of all imports: a tenth
    of the time that tests take. Many modules are first imported by a test."""
    global _modules
    if len(sys.modules) > _modules + 50:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


def pytest_unconfigure() -> None:
    """Triton's bindings name, at the process's end, each object of theirs that nobody collected."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    leave_imports_alone()


@pytest.fixture
def traced() -> Callable[..., tuple[Any, Any]]:
    """Gives a model by its class and settings, and it optimised: traced once for all policies and weights of a test."""

    @cache
    def make(kind: Callable[..., torch.nn.Module], *, lowering: str = "eager", **settings: Any) -> tuple[Any, Any]:
        model = kind(**settings).eval()
        return model, toca_compile.optimize(model, FullCompute(), lowering=lowering)

    return make


@pytest.fixture(scope="session")
def graphs() -> dict[str, str]:
    """The printed stages of a small model."""
    return printed_stages()
