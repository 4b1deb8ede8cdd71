"""Models that two processes share, tensor parallel: the same as the whole model, under every kind of policy."""

from typing import Any

import pytest

from tests.distributed.sharded import MODELS, POLICIES, WORLD
from tests.distributed.spawn import needs_gloo, spawned

pytestmark = [needs_gloo, pytest.mark.xdist_group("processes")]

Found = list[dict[str, Any]]  # of each process, by model and policy


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return spawned("tests.distributed.sharded", WORLD, tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("model", [name for name in MODELS if name != "scattered"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_shared_model_is_the_whole_one(found: Found, model: str, policy: str) -> None:
    for rank in found:
        told = rank[f"{model}, {policy}"]
        assert told["far"] < 1e-5
        assert told["kinds"] == told["kinds alone"]
        assert told["tokens as alone"]


@pytest.mark.parametrize("case", [f"{model}, {policy}" for model in MODELS for policy in POLICIES])
def test_processes_never_part_ways(found: Found, case: str) -> None:
    first, *others = ({k: told[case][k] for k in ("tokens", "kinds")} for told in found)
    assert all(other == first for other in others)


def test_policies_do_what_they_are_asked_for(found: Found) -> None:
    kinds = {policy: found[0][f"diffusers, {policy}"]["kinds"] for policy in POLICIES}
    assert {"p" in kinds[p] for p in ("random", "attention", "queries", "clusters")} == {True}
    assert "s" in kinds["blocks"]
    assert {"f", "s"} == set(kinds["adaptive"])
    assert found[0]["diffusers, adaptive"]["agreed"] == 1  # in the graph that decides, whatever runs it


def test_a_partial_step_sends_its_rows_alone(found: Found) -> None:
    """Three MLPs of 16 tokens and 16 features in float32, and a guidance pair."""
    sent = found[0]["by hand, queries"]["sent"]
    assert sent["full"] == 3 * 2 * 16 * 16 * 4
    (fresh,) = {sum(map(sum, step["blocks.0.mlp"])) for step in found[0]["by hand, queries"]["tokens"][1:4]}
    assert sent["partial"] == 3 * fresh * 16 * 4
    assert found[0]["by hand, fora"]["sent"]["reuse"] == 0
    assert "0.006 MB in a full step, 0.0 MB in a reuse step" in found[0]["by hand, fora"]["text"]


def test_where_processes_hold_parts_of_the_tokens_nothing_is_partial(found: Found) -> None:
    """A token of which one process alone has the sum cannot be taken for all; what reuses everything is the same."""
    told = found[0]["scattered, random"]
    assert "p" not in told["kinds"]
    assert "not partial" in told["text"]
    assert found[0]["scattered, fora"]["far"] < 1e-5
