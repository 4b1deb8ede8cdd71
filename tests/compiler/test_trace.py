"""Trace: the texts of passes and variants in the log, in ``TORCH_LOGS`` and in torch's structured trace."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import printed_stages
from toca_compile.compiler.pipeline import PIPELINE

NAMES = [p.name for p in PIPELINE]


def test_the_log_has_a_line_at_info_and_the_text_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    for level in (logging.INFO, logging.DEBUG):
        caplog.clear()
        with caplog.at_level(level, logger="toca_compile"):
            graphs = printed_stages()
        said = [r.getMessage() for r in caplog.records if r.name == "toca_compile.compiler.trace"]
        assert any(
            re.fullmatch(r"03\.find-sites: \d+ ms, 4 residual branches: 2 mlp, 2 self_attention", s) for s in said
        )
        for name in ("find-sites", "template1[reuse; partial]"):
            assert any(s.endswith(graphs[name]) for s in said) is (level == logging.DEBUG)


def test_torch_logs_and_tlparse_show_the_texts(tmp_path: Path) -> None:
    """By the environment variables, in a process of its own."""
    code = "from tests.programs import printed_stages; print(printed_stages()['find-sites'])"
    asked = {"TORCH_LOGS": "+toca_compile", "TORCH_TRACE": str(tmp_path), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert "03.find-sites: " in done.stderr
    assert "may compute, forecast, partial, reuse, skip" in done.stderr
    (path,) = tmp_path.iterdir()
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(re.sub(r"^\S+ \S+ \S+ \S+ ", "", line)) for line in lines if not line.startswith("\t")]
    artifacts = [r["artifact"]["name"] for r in records if "artifact" in r]
    ours = [a for a in artifacts if a.startswith("toca_compile.")]
    assert ours[: len(NAMES)] == [f"toca_compile.{i:02}.{name}" for i, name in enumerate(NAMES)]
    assert "toca_compile.template1[reuse; partial]" in ours
    assert f"\t{done.stdout.splitlines()[0]}" in lines
