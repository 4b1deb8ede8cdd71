"""Processes that share work: each runs a module as ``python -m MODULE PLACE COUNT FOLDER``, and writes what it found there
as JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def spawned(module: str, count: int, folder: Path, *, dies: int | None = None) -> list[Any]:
    """What the processes found. ``dies``: the one that does not end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, str(place), str(count), str(folder)],
            cwd=Path(__file__).parents[2], env=environment, stderr=subprocess.PIPE, text=True,
        )
        for place in range(count)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for place, (process, (_, errors)) in enumerate(zip(processes, told, strict=True)):
        assert (process.returncode == 0) == (place != dies), errors[-3000:]
    return [json.loads((folder / f"{place}.json").read_text()) for place in range(count) if place != dies]


def in_group(work: Callable[[int, int], Any], seconds: float = 300) -> None:
    """One of the processes: ``work`` is told its place and how many there are. ``seconds``: the group's timeout."""
    torch.set_num_threads(1)
    place, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = torch._C._distributed_c10d.FileStore(str(folder / "store"), count)
    wait = timedelta(seconds=seconds)
    dist.init_process_group("gloo", store=store, rank=place, world_size=count, timeout=wait)
    (folder / f"{place}.json").write_text(json.dumps(work(place, count)))
