"""Processes that share a model and part ways: all are told of it in time, and of what differs and of whom."""

from typing import Any

import pytest

from tests.distributed.apart import SECONDS
from tests.distributed.spawn import needs_gloo, spawned

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawned("tests.distributed.apart", 3, tmp_path_factory.mktemp("store"), dies=2)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("policies", ["policy: Fora(num_steps=4", "interval=2) (plan ", "interval=4) (plan ", "(processes 0, 1)",
                      "(process 2)", "the same inputs, policy and settings"]),
        ("shapes", ["input 0: float32 [2, 2, 8, 8] (processes 0, 2), float32 [3, 2, 8, 8] (process 1)"]),
        ("settings", ["'lowering': 'dense'", "(process 0)", "(processes 1, 2)"]),
        ("dead", ["step 2 of a sampling", "process 2 does not answer: it died"]),
        ("still dead", ["process 2 did not begin this sampling within 6 s"]),
    ],
)  # fmt: skip
def test_all_are_told_who_does_otherwise(found: list[dict[str, Any]], what: str, said: list[str]) -> None:
    assert len(found) == 2
    for told in (process[what] for process in found):
        assert all(part in told["error"] for part in said), told["error"]
        assert told["seconds"] < 1.5 * SECONDS


def test_those_that_do_alike_hear_nothing_and_go_on_after_an_error(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert not process["alike"]["error"]
        assert process["after"] == process["uncached"] == 0
