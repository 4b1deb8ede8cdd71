"""What a file of ``toca_compile.export`` costs and spares, on the shipped DiT.

    python benchmarks/export.py                     # about 15 minutes on 2 cores
    python benchmarks/export.py --policy toca
    python benchmarks/export.py --folder FOLDER     # keeps the files there, and takes those that it finds
    python benchmarks/export.py --shared            # says that the machine had other work meanwhile

Both forms of a file beside the live model, and beside the model exported without a cache by torch alone (``plain``).
Each file's size, the time to export it, to load it and its first step; then 50 steps of each in turns in one process,
and what each allocates at its peak beyond weights and inputs (``memory.py``). In processes of their own the time from
the start to the end of the first picture, with Inductor's caches empty and full. The host's microseconds a step: of a
model so small that little else is left, in a step that computes no branch. Results go to
``benchmarks/results/export.{json,md}``.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial as bind
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import arguments, dit, interleaved, save
from diffusers import DDIMScheduler
from memory import peak

import toca_compile
from toca_compile import BlockCache, Fora
from toca_compile.demo import fashion_dit
from toca_compile.exported.write import FORMS

STEPS, COUNT = 50, 2
SHARED = ", beside other work on the same cores"
POLICIES: dict[str, Any] = {
    "blocks": BlockCache(STEPS, first=0, interval=3, order=2, basis="newton"),
    "fora": Fora(STEPS, 3),
    "toca": toca_compile.preset("dit-xl-2/ddim-50"),
}
FILES = (*FORMS, "plain")
PROCESSES = (*FILES, "live", "torch.compile")
Rows = list[dict[str, Any]]


def trained() -> Any:
    """The shipped DiT."""
    return fashion_dit.load(fashion_dit.default_model())[0]


def inputs(size: int) -> tuple[tuple[torch.Tensor], dict[str, torch.Tensor]]:
    """Of one call: both halves of the guidance."""
    return (torch.zeros(2 * COUNT, 1, size, size),), {
        "timestep": torch.full((2 * COUNT,), 999),
        "class_labels": torch.zeros(2 * COUNT, dtype=torch.int64),
    }


def export(policy: str, form: str, path: Path) -> None:
    """Write one file."""
    model = trained()
    args, kwargs = inputs(model.config.sample_size)
    if form == "plain":
        torch._inductor.aoti_compile_and_package(torch.export.export(model, args, kwargs), package_path=str(path))
    else:
        toca_compile.export(model, POLICIES[policy], (args, kwargs), path, form=form)


def load(form: str, path: Path) -> Any:
    """What a file holds, to be called as the model is."""
    if form != "plain":
        return toca_compile.load(path)
    importlib.import_module("diffusers.models.modeling_outputs")  # torch's package asks for the class of the output
    package: Any = torch._inductor.aoti_load_package(str(path))
    config = json.loads((fashion_dit.default_model() / "config.json").read_text())

    def plain(*args: Any, **kwargs: Any) -> Any:
        return package(*args, **kwargs)

    plain.config = SimpleNamespace(**config)  # type: ignore[attr-defined]  # as fashion_dit.sample asks a model
    return plain


def pictures(model: Any) -> torch.Tensor:
    """One sampling."""
    scheduler = DDIMScheduler.from_pretrained(fashion_dit.default_model() / "scheduler")
    return fashion_dit.sample(model, scheduler, fashion_dit.labels(COUNT), STEPS)


def made(way: str, policy: str, path: Path) -> Any:
    """The model in one way of running it."""
    if way in FILES:
        return load(way, path)
    if way == "live":
        return toca_compile.optimize(trained(), POLICIES[policy])
    return torch.compile(trained(), dynamic=False)


def process(way: str, policy: str, path: Path, cache: Path) -> float:
    """Seconds from the start of a process to its end, after one sampling."""
    command = [sys.executable, __file__, "--way", way, "--policy", policy, "--folder", str(path)]
    start = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)})
    return time.perf_counter() - start


def processes(policy: str, paths: dict[str, Path], folder: Path) -> Rows:
    """Seconds to the first picture in each way: a file needs no cache of Inductor's."""
    rows: Rows = []
    for way in PROCESSES:
        run = bind(process, way, policy, paths.get(way, folder), folder / way)
        rows.append({"what": way, "caches empty s": run(), "caches full s": run()})
    return rows


def first_step(form: str, path: Path) -> tuple[float, float]:
    """Seconds to load, and of the first step after it."""
    start = time.perf_counter()
    model = load(form, path)
    loaded = time.perf_counter()
    (x,), kwargs = inputs(model.config.sample_size)
    with torch.no_grad():
        model(x, **kwargs)
    return loaded - start, time.perf_counter() - loaded


def written(policy: str, paths: dict[str, Path]) -> Rows:
    """Seconds to write each file that is not there yet."""
    rows: Rows = []
    for form, path in paths.items():
        if not path.exists():
            start = time.perf_counter()
            export(policy, form, path)
            rows.append({"what": form, "s": time.perf_counter() - start})
    return rows


def files(policy: str, paths: dict[str, Path], repeats: int) -> Rows:
    """What each file costs, beside the live model."""
    rows: Rows = []
    for form, path in paths.items():
        row: dict[str, Any] = {"what": form, "file MB": path.stat().st_size / 1e6}
        row["load s"], row["first step s"] = first_step(form, path)
        rows.append(row)
    calls = {form: bind(pictures, load(form, path)) for form, path in paths.items()}
    calls["live"] = bind(pictures, made("live", policy, Path()))
    wanted = calls["live"]()
    median = interleaved(calls, repeats)
    rows.append(dict.fromkeys(rows[0], "") | {"what": "live"})
    for row in rows:
        call = calls[row["what"]]
        row["difference"] = "" if row["what"] == "live" else (call() - wanted).abs().max().item()
        row["run s"], row["run / live"] = median[row["what"]], median[row["what"]] / median["live"]
        row["peak MB"] = peak(call, "cpu") / 1e6
    return rows


def host(folder: Path, repeats: int) -> Rows:
    """Microseconds of a step in each way."""
    model, kwargs, policy = dit(64, 12, 4), arguments(1, 4), Fora(100, 100)
    models: dict[str, Any] = {"live": toca_compile.optimize(model, policy)}
    for form in FORMS:
        path = folder / f"small.{form}.pt2"
        toca_compile.export(model, policy, kwargs, path, form=form)
        models[form] = toca_compile.load(path)
    calls: dict[str, Callable[[], Any]] = {name: bind(one, **kwargs) for name, one in models.items()}
    with torch.no_grad():
        for call in calls.values():
            for _ in range(20):
                call()
        median = interleaved(calls, 50 * repeats)
    return [{"what": name, "µs": 1e6 * seconds} for name, seconds in median.items()]


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=POLICIES, default="blocks")
    parser.add_argument("--folder", type=Path, help="where the files are kept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared", action="store_true", help="the machine is not ours alone: say so in the results")
    parser.add_argument("--way", choices=PROCESSES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        pictures(made(given.way, given.policy, given.folder))
        return
    note = SHARED * given.shared
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {form: (given.folder or folder) / f"{given.policy}.{form}.pt2" for form in FILES}
        new = written(given.policy, paths)
        if new:
            save("export", "cpu", {f"{given.policy}: writing the files" + note: new})
        save("export", "cpu", {f"{given.policy}: files" + note: files(given.policy, paths, given.repeats)})
        first = processes(given.policy, paths, folder)
        save("export", "cpu", {f"{given.policy}: a process to its first picture" + note: first})
        save("export", "cpu", {"the host's work in a step" + note: host(folder, given.repeats)})


if __name__ == "__main__":
    main()
