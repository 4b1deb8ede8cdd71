"""What is told while the compiler works, and to whom."""

import io
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import BlockCache, ToCa, progress
from toca_compile.progress import shown, stages, working

POLICY = ToCa(8, 4, 0.3, "constant")


class Screen(io.StringIO):
    """stderr; ``terminal``: whether it says that it is one."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Screen:
    made = Screen(getattr(request, "param", False))
    # Not in sys itself, whose stderr is pytest's by the time that the test runs.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=made))
    monkeypatch.delenv("TOCA_PROGRESS", raising=False)
    return made


def compiled(policy: Any = POLICY, calls: int = 2) -> None:
    torch._dynamo.reset()
    sample(toca_compile.optimize(randomize(PlainDiT(depth=2)), policy, lowering="eager"), calls, noise())


def test_a_library_is_quiet_where_nobody_looks(screen: Screen, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "toca_compile"):
        compiled()
    assert screen.getvalue() == ""
    told = [r.getMessage() for r in caplog.records if r.name == "toca_compile.progress"]
    assert told[:2] == ["tracing PlainDiT", "proving what may be cached"]
    assert told[3] == "compiling variant 2 of 4: blocks.0 compute, blocks.0.mlp compute"
    assert told[-1] == "compiling variant 4 of 4: blocks.0 reuse, blocks.0.mlp partial"
    assert all(r.levelno == logging.INFO for r in caplog.records if r.name == "toca_compile.progress")


@pytest.mark.parametrize("screen", [True], indirect=True)
def test_on_a_terminal_a_line_comes_and_goes(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    compiled()
    shots = screen.getvalue().split("\r\x1b[K")
    assert shots[0] == ""
    assert shots[1] == "tracing PlainDiT"
    assert any(shot.startswith("proving what may be cached: capture") for shot in shots)
    assert shots[-1] == ""  # nothing stays
    assert "\n" not in screen.getvalue()
    assert max(map(len, shots)) <= 39
    monkeypatch.setenv("TOCA_PROGRESS", "0")
    before = screen.getvalue()
    compiled()
    assert screen.getvalue() == before


def test_where_it_is_asked_for_each_stage_is_a_line(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOCA_PROGRESS", "1")
    compiled(BlockCache(4, 0, interval=2))
    lines = screen.getvalue().splitlines()
    assert lines[:2] == ["toca_compile: tracing PlainDiT", "toca_compile: proving what may be cached"]
    assert "toca_compile: compiling what stands in for skipped blocks: skip" in lines
    assert not any("\x1b" in line for line in lines)


def test_a_command_shows_it_its_own_way(screen: Screen) -> None:
    told: list[str] = []
    with shown(told.append):
        compiled()
    assert told[0] == "tracing PlainDiT"
    assert told[-1] == ""
    with shown():
        compiled()
    assert "toca_compile: tracing PlainDiT\n" in screen.getvalue()


def test_a_stage_that_fails_leaves_nothing_behind(screen: Screen) -> None:
    told: list[str] = []
    before = stages()
    with shown(told.append), pytest.raises(ValueError, match="no"), working("something"):
        raise ValueError("no")
    assert told == ["something", ""]
    assert stages() == before + 1


def test_a_closed_stderr_stops_nothing(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOCA_PROGRESS", "1")
    screen.close()
    compiled()
