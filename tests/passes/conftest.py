"""One small program for the tests of all passes, none of which changes it."""

import pytest

from tests.programs import tiny_program
from toca_compile.ir.program import Program


@pytest.fixture(scope="session")
def program() -> Program:
    """``Tiny`` after all passes."""
    return tiny_program()
