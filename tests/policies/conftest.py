"""What tests of several policies share."""

from typing import Any

import pytest

import toca_compile
from tests.models import PlainDiT, randomize
from toca_compile import FullCompute


@pytest.fixture(scope="session")
def dit() -> tuple[Any, Any]:
    """A model of four blocks and 15 tokens, and it optimised: traced once for all policies."""
    model = randomize(PlainDiT((6, 10), depth=4))
    return model, toca_compile.optimize(model, FullCompute(), lowering="eager")
