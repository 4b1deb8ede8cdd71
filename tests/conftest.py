"""One process, many compilations: each test starts with an empty Dynamo."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

from tests.programs import printed_stages

torch.set_num_threads(1)  # models this small are slower on several, and the suite runs in several processes
# pytest listens to every logger that does not propagate, and torch would print all that it traces to be heard.
logging.getLogger("torch.__trace").propagate = True
os.environ["TOCA_VERIFY"] = "all"  # every partial variant is held against its dense meaning


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def graphs() -> dict[str, str]:
    """The printed stages of a small model."""
    return printed_stages()
