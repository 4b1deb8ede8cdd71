"""Processes that share work: each calls a module's ``main(place, count)``, and writes what it found there as JSON. One
process imports what they need, which takes longer than most of what they do, and forks them."""

import importlib
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

SECONDS = 300  # that a process waits for another
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def spawned(module: str, count: int, folder: Path, *, dies: int | None = None) -> list[Any]:
    """What the processes found. ``dies``: the one that does not end well."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.spawn", module, str(count), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for place, status in enumerate(json.loads((folder / "ended.json").read_text())):
        assert (status == 0) == (place != dies), (folder / f"{place}.txt").read_text()[-3000:]
    return [json.loads((folder / f"{place}.json").read_text()) for place in range(count) if place != dies]


def _forked(module: Any, place: int, count: int, folder: Path) -> None:
    """One of the processes."""
    with open(folder / f"{place}.txt", "w", encoding="utf-8") as errors:
        os.dup2(errors.fileno(), 2)
    try:
        torch.set_num_threads(1)
        store = torch._C._distributed_c10d.FileStore(str(folder / "store"), count)
        wait = timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", store=store, rank=place, world_size=count, timeout=wait)
        (folder / f"{place}.json").write_text(json.dumps(module.main(place, count)))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _main(name: str, count: int, folder: Path) -> None:
    from diffusers import DiTTransformer2DModel, FluxTransformer2DModel  # noqa: F401

    from toca_compile import explain, optimize  # noqa: F401  (what stands behind them is imported when they are named)

    module, processes = importlib.import_module(name), []
    for place in range(count):
        process = os.fork()
        if not process:
            _forked(module, place, count, folder)
        processes.append(process)
    ended = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
