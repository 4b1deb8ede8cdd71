"""One process, many compilations: each test starts with an empty Dynamo, but for the models that tests share."""

import gc
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.guards
from hypothesis import settings
from torch._inductor import config as inductor_config

from tests.programs import printed_stages
from tests.shared import Traced, empty_dynamo
from toca_compile.traced import Tracing

settings.register_profile("suite", deadline=None)  # an example takes longer beside other work
settings.load_profile("suite")
torch.set_num_threads(1)  # models this small are slower on several, and the suite runs in several processes
# pytest listens to every logger that does not propagate, and torch would print all that it traces to be heard.
logging.getLogger("torch.__trace").propagate = True
gc.set_threshold(*gc.get_threshold()[:2], 200)  # all that is alive is looked through twenty times less often
os.environ["TOCA_VERIFY"] = "all"  # every partial variant is held against its dense meaning
os.environ["TORCH_WARM_POOL"] = "0"  # torch.compile would start processes for GPUs' kernels, each with its own torch
# How long the guards of a trace take, measured with emptied caches: a thirtieth of a trace, for a log that nobody reads.
setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0)  # noqa: B010
# Of what calls the kernels in an exported file; optimised, each piece of a model takes g++ three seconds more.
inductor_config.aot_inductor.compile_wrapper_opt_level = "O0"


_modules = 0  # that were imported when the garbage collector was told to leave alone what there is


def leave_imports_alone() -> None:
    """Tracing makes many objects, so garbage is looked for often, and not each time among those of all imports: a tenth
    of the time that tests take. Many modules are first imported by a test."""
    global _modules
    if len(sys.modules) > _modules + 50:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the tests of a file share is made once: they run in one process."""
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("xdist_group") is None:
            fixtures = item._fixtureinfo.name2fixturedefs.values()
            if any(fixture.scope == "module" for used in fixtures for fixture in used):
                item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_unconfigure() -> None:
    """Triton's bindings name, at the process's end, each object of theirs that nobody collected."""
    gc.unfreeze()


_kept: "deque[Tracing]" = deque(maxlen=256)  # following a model's Python is most of what a small test costs


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    leave_imports_alone()  # now that nothing of the last test is alive: what is left alone is never collected
    torch.manual_seed(0)
    empty_dynamo()
    torch._dynamo.utils.counters.clear()
    yield
    empty_dynamo()
    _kept.extend(one for one in Tracing.alive if one.kind is not None and one not in _kept)


@pytest.fixture(scope="module")
def _shared() -> Traced:
    return Traced()


@pytest.fixture
def traced(_shared: Traced) -> Traced:
    """The models that the tests of a file share: ``traced(PlainDiT, depth=2)`` is one and it optimised, traced once."""
    return _shared


@pytest.fixture(scope="session")
def graphs() -> dict[str, str]:
    """The printed stages of a small model."""
    return printed_stages()
