"""Processes that share a graph, here threads with a store in memory. (Real ones: ``tests/distributed/test_apart.py``.)"""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from toca_compile import ProcessError
from toca_compile.runtime.peers import Group, Peers, differences

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
LATE = 0.2  # seconds that one waits for another


def peers(count: int, *facts: dict[str, str]) -> list[Peers]:
    """Processes 10, 11, … of one group, with what they say of themselves."""
    store: Any = torch._C._distributed_c10d.HashStore()
    ranks = [10 + place for place in range(count)]
    groups = [Group(store, place, ranks, timedelta(seconds=LATE)) for place in range(count)]
    return [Peers([group], facts[i] if facts else {}) for i, group in enumerate(groups)]


def together(*works: Callable[[], Any]) -> list[str]:
    """What each raises."""
    said = [""] * len(works)

    def run(i: int) -> None:
        try:
            said[i] = str(works[i]() or "")
        except ProcessError as error:
            said[i] = str(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_those_that_do_the_same_go_on_run_after_run() -> None:
    both = peers(2)
    for run in ("a", "b", "c"):
        assert together(*(lambda one=one, run=run: one.begin({"policy": run}) for one in both)) == ["", ""]


def test_who_differs_and_in_what() -> None:
    three = peers(3, {"graph": "x"}, {"graph": "x"}, {"graph": "y"})
    for said in together(*(lambda one=one: one.begin({"policy": "p"}) for one in three)):
        assert "graph: x (processes 10, 11), y (process 12)" in said
        assert "policy" not in said.replace("policy and settings", "")
    assert differences({0: {"a": "1"}, 1: {}}) == ["a: 1 (process 0), none (process 1)"]


def test_who_does_not_come() -> None:
    first, second, _ = peers(3)
    for said in together(lambda: first.begin({}), lambda: second.begin({})):
        assert said.startswith("process 12 did not begin this sampling within 0.2 s")


def test_who_is_gone_and_who_failed_by_itself() -> None:
    first, second, third = peers(3)
    together(*(lambda one=one: one.begin({}) for one in (first, second, third)))
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:598] Connection closed by peer")
    assert second.failed(ValueError("no room"), 4) is None  # what is its own is raised as it is
    assert first.failed(ProcessError("told already"), 4) is None
    assert str(first.failed(lost, 4)) == (
        "step 4 of a sampling that processes share failed: process 11 failed by itself (ValueError: no room); process 12 "
        "does not answer: it died, or has stopped calling the model"
    )
