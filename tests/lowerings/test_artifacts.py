"""Artifacts on disk: found by what they are made of, read only where nobody else could have written them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.standalone_compile import CompiledArtifact
from torch._inductor.utils import fresh_cache

from toca_compile.ir.program import Variant
from toca_compile.lowerings import artifacts, inductor

CPU = torch.device("cpu")


class Written:
    """An artifact that is its bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def save(self, *, path: str) -> None:
        Path(path).write_bytes(self.content)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, and a loader that gives back the bytes."""
    monkeypatch.setattr(artifacts, "folder", lambda: tmp_path / "toca")
    monkeypatch.setattr(CompiledArtifact, "load", lambda *, path: Path(path).read_bytes())
    return tmp_path / "toca"


def load(key: str) -> Any:
    """What ``artifacts.load`` gives; here the bytes."""
    return artifacts.load(key)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_what_is_saved_is_found_by_its_key(folder: Path) -> None:
    assert load("a") is None
    artifacts.save("a", Written(b"one"))
    artifacts.save("b", Written(b"two"))
    artifacts.save("a", Written(b"three"))  # by another process, a moment later
    assert (load("a"), load("b"), load("c")) == (b"one", b"two", None)
    assert len(kept(folder)) == 2  # and nothing half-written
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"", b"on", b"one more"])
def test_a_damaged_file_is_removed(folder: Path, damage: bytes) -> None:
    artifacts.save("a", Written(b"one"))
    (path,) = kept(folder)
    path.write_bytes(damage)
    assert load("a") is None
    assert kept(folder) == []


def test_a_file_that_cannot_be_loaded_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*, path: str) -> Any:
        raise AssertionError("another torch's")

    artifacts.save("a", Written(b"one"))
    monkeypatch.setattr(CompiledArtifact, "load", refused)
    assert load("a") is None
    assert kept(folder) == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner here")
def test_what_others_can_write_is_not_read(folder: Path) -> None:
    artifacts.save("a", Written(b"one"))
    (path,) = kept(folder)
    path.chmod(0o666)
    assert load("a") is None
    path.chmod(0o600)
    folder.chmod(0o777)
    assert load("a") is None
    folder.chmod(0o700)
    assert load("a") == b"one"


def test_the_oldest_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "LIMIT", 25)
    for age, name in enumerate("abc"):
        artifacts.save(name, Written(bytes(10)))
        for path in folder.glob(f"{name}.*"):
            os.utime(path, (age, age))
    assert [load(name) is not None for name in "abc"] == [False, True, True]


def test_a_disk_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(artifacts, "folder", lambda: tmp_path / "file" / "toca")
    artifacts.save("a", Written(b"one"))
    assert load("a") is None


def test_all_that_an_artifact_is_made_of_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = artifacts.key_of("graph", "inputs", device=CPU)
    assert artifacts.key_of("graph", "inputs", device=CPU) == key
    others = {artifacts.key_of("graph", "others", device=CPU), artifacts.key_of("graphinputs", "", device=CPU)}
    for part in ("sources", "_machine"):
        with monkeypatch.context() as patch:
            patch.setattr(artifacts, part, lambda *_: "other")
            others.add(artifacts.key_of("graph", "inputs", device=CPU))
    assert len(others | {key}) == 5


def a_graph() -> Variant:
    """One that takes a number."""
    graph = fx.Graph()
    x, k = graph.placeholder("x"), graph.placeholder("k")
    y = graph.call_function(torch.ops.aten.slice.Tensor, (x, 0, 0, k))
    graph.output((graph.call_function(torch.ops.aten.relu.default, (y,)),))
    return Variant(fx.GraphModule({}, graph), (0,), ())


@pytest.mark.inductor
def test_torchs_own_caches_know_the_version_of_our_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found by the names of ops, whatever these make."""

    def hits() -> int:
        return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]

    found: list[bool] = []
    with fresh_cache(), monkeypatch.context() as patch:
        for version in ("one", "one", "other"):
            patch.setattr(artifacts, "sources", lambda told=version: told)
            patch.setattr(artifacts, "load", lambda _: None)
            inductor.clear()
            before = hits()
            inductor.lower(a_graph(), [torch.empty(8, 3), 5])
            found.append(hits() > before)
    inductor.clear()
    assert found == [False, True, False]


def test_the_next_process_loads_what_this_one_compiled() -> None:
    variant = a_graph()
    with fresh_cache():
        loads, results = inductor.loads, []
        for _ in range(2):
            inductor.clear()  # as in a new process
            compiled = inductor.lower(variant, [torch.empty(8, 3), 5])
            value = torch.arange(24.0).reshape(8, 3) - 12
            results.append([compiled(value, rows)[0] for rows in (1, 5, 8)])
        assert inductor.loads == loads + 1
        for a, b, rows in zip(*results, (1, 5, 8), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, (torch.arange(24.0).reshape(8, 3) - 12)[:rows].relu())
