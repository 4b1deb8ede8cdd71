"""Result files of the benchmarks, held against each other."""

import json
from pathlib import Path
from typing import Any

import pytest
from compare import main, moved

OLD = {
    "hardware": "a machine",
    "noise": 0.01,
    "runs": [{"preset": "a", "latency speed-up": 2.0, "target": 0.9}, {"preset": "b", "latency speed-up": 3.0}],
    "partial": [{"tokens": 256, "K/n": 0.25, "time ratio": 0.2, "met": True}],
}


def changed(**columns: Any) -> dict[str, Any]:
    """``OLD`` with other numbers in the first row of its runs."""
    return {**OLD, "runs": [{**OLD["runs"][0], **columns}, OLD["runs"][1]]}  # type: ignore[dict-item]


def test_only_what_is_beyond_noise_is_named() -> None:
    assert list(moved(OLD, OLD, 0.05)) == []
    assert list(moved(OLD, changed(**{"latency speed-up": 2.05}), 0.05)) == []
    (line,) = moved(OLD, changed(**{"latency speed-up": 1.8}), 0.05)
    assert line == "runs preset=a target=0.9: latency speed-up 2 → 1.8 (-10.0%)"


def test_rows_are_told_apart_by_what_is_no_measurement() -> None:
    new = changed(preset="c")
    assert list(moved(OLD, new, 0.05)) == [
        "runs preset=a target=0.9: only in the old file",
        "runs preset=c target=0.9: only in the new file",
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(OLD))
    new.write_text(json.dumps(changed(**{"latency speed-up": 1.9})))
    assert main([str(old), str(new)]) == 0  # 5 % are within twice the least noise
    assert "nothing moved by more than 6.0%" in capsys.readouterr().out
    assert main([str(old), str(new), "--noise", "0.02"]) == 1
    new.write_text(json.dumps({**OLD, "hardware": "another", "noise": 0.2}))
    assert main([str(old), str(new)]) == 0
    assert "other hardware" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(old), str(tmp_path / "none.json")])
