"""What tests of several policies share."""

from typing import Any

import pytest

from tests.models import PlainDiT
from tests.shared import Traced


@pytest.fixture(scope="session")
def _of_all_files() -> Traced:
    return Traced()


@pytest.fixture
def dit(_of_all_files: Traced) -> tuple[Any, Any]:
    """A model of four blocks and 15 tokens, and it optimised: traced once for all policies."""
    return _of_all_files(PlainDiT, size=(6, 10), depth=4)
