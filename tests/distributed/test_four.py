"""A FLUX that four processes share, linear by linear."""

from typing import Any

import pytest

from tests.distributed.four import POLICIES
from tests.distributed.spawn import needs_gloo, spawned

pytestmark = [needs_gloo, pytest.mark.xdist_group("processes")]
pytest.importorskip("diffusers.hooks.tensor_parallel")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawned("tests.distributed.four", 4, tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("policy", POLICIES)
def test_four_processes_are_one_model(found: list[dict[str, Any]], policy: str) -> None:
    for told in (process[policy] for process in found):
        assert told["far"] < 1e-5
        assert told["tokens as alone"]
        assert told["fresh"] == found[0][policy]["fresh"]
    kinds = {"fora": "frrfrr", "attention": "p", "queries": "p", "adaptive": "s"}
    assert kinds[policy] in told["kinds"]


def test_single_blocks_are_partial_and_a_partial_step_sends_less(found: list[dict[str, Any]]) -> None:
    sites = found[0]["queries"]["sites"]
    ((_, actions),) = [told for name, told in sites.items() if name.startswith("single")]
    assert {"partial", "queries"} & set(actions)
    sent = found[0]["queries"]["sent"]
    assert 0 < sent["partial"] < sent["full"]
