"""A FLUX that four processes share, linear by linear or token by token."""

from typing import Any

import pytest

from tests.distributed.four import DEGREES, POLICIES
from tests.distributed.spawn import needs_gloo, spawned
from tests.versions import newer

pytestmark = [needs_gloo, pytest.mark.xdist_group("processes")]
pytest.importorskip("diffusers.hooks.tensor_parallel")
pytest.importorskip("diffusers.hooks.context_parallel")


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


@pytest.mark.skipif(not newer("2.12"), reason="torch splits a model at the hooks by which its tokens are parted")
@pytest.mark.parametrize("way", DEGREES)
def test_each_of_four_has_tokens_of_its_own(found: list[dict[str, Any]], way: str) -> None:
    first, *others = (process[way] for process in found)
    assert first["uncached"] < 1e-5
    for policy, kinds in {"full": "ffffff", "blocks": "fssfss"}.items():
        assert first[policy]["kinds"] == kinds
        assert first[policy]["far"] < 1e-5
    assert first["queries"]["kinds"] == "fppfpp"
    assert first["queries"]["alike"]
    assert first["queries"]["from dense"] < 1e-5
    image = next(site for site in first["queries"]["k"][1] if site.endswith("ff.net"))
    assert (first["queries"]["k"][0][image], first["queries"]["k"][1][image]) == (4, 1)  # 0.4 of its four, rounded down
    assert all(other["queries"] == first["queries"] for other in others)
