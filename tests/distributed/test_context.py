"""Models of whose tokens two processes have a part each: the same as the whole model where all tokens are alike, and
where some are computed, what computing all and blending by mask gives."""

from typing import Any

import pytest

from tests.distributed.context import EXACT, MODELS, PARTIAL
from tests.distributed.spawn import needs_gloo, spawned
from tests.versions import newer

pytestmark = [
    needs_gloo,
    pytest.mark.skipif(not newer("2.13"), reason="torch splits a model at the collectives in it"),
    pytest.mark.xdist_group("processes"),
]
pytest.importorskip("diffusers.hooks.context_parallel")

Found = list[dict[str, Any]]  # of each process, by model and policy


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return spawned("tests.distributed.context", 2, tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", EXACT)
def test_what_takes_all_tokens_alike_is_the_whole_model(found: Found, model: str, policy: str) -> None:
    for told in (process[model] for process in found):
        assert told["uncached"] < 1e-5
        assert told[policy]["far"] < 1e-5
    kinds = {"full": "ffffff", "fora": "frrfrr", "blocks": "fssfss"}
    assert told[policy]["kinds"] == kinds.get(policy, told[policy]["kinds"])
    assert "s" in told["adaptive"]["kinds"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", PARTIAL)
def test_processes_compute_the_same_places_each_among_its_own_tokens(found: Found, model: str, policy: str) -> None:
    first, other = (process[model][policy] for process in found)
    assert first == other
    assert first["kinds"] == "fppfpp"
    assert first["alike"]
    assert first["from dense"] < 1e-5
    image = next(site for site in first["k"][1] if site.endswith((".mlp", "ff.net")))
    assert (first["k"][0][image], first["k"][1][image]) == (8, 3)  # of 16 tokens; 0.4 of its 8
    assert first["fresh"][image] == [3, 3]


def test_attention_is_partial_where_its_queries_are_sent_by_rows(found: Found) -> None:
    for model in ("ulysses", "ring"):
        sites = found[0][model]["sites"]
        kinds = {name: kind for name, (kind, _, _) in sites.items()}
        assert sorted(kinds.values()) == ["joint_attention", "joint_attention", "mlp", "mlp", "self_attention"]
        assert all("queries" in actions for kind, actions, _ in sites.values() if kind != "mlp")
        assert not any(name.startswith("forward") for name in sites)
    sent = found[0]["ulysses"]["sent"]
    assert 0 < sent["partial"] < sent["full"]


def test_what_no_graph_holds_is_refused_by_name(found: Found) -> None:
    for said, far in (process["uneven"] for process in found):
        assert "ContextParallelSplitHook on the model with ulysses_anything=True" in said
        assert "leave it out" in said
        assert far == 0


@pytest.mark.parametrize("sharded", ["whole", "blocks"])
def test_weights_that_are_brought_in(found: Found, sharded: str) -> None:
    for told in (process["weights"][sharded] for process in found):
        assert told["kinds"] == "fppfpp"
        assert max(told[what] for what in ("fora", "blocks", "attention", "uncached")) < 1e-5
        named = "the hooks of fully_shard, which bring in the weights of blocks.0 and 1 more" in told["text"]
        assert named == (sharded == "blocks")
