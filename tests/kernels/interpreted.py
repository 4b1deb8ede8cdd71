"""Kernels in Triton's interpreter, which runs them on a CPU."""

import os
import subprocess
import sys


def told_by(source: str) -> str:
    """What a program prints that runs kernels so. Triton reads the variable when a kernel is defined, so it is a process
    of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout
