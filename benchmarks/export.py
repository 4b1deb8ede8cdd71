"""What a file of ``toca_compile.export`` costs and spares, on the shipped DiT.

    python benchmarks/export.py                     # about 15 minutes on 2 cores
    python benchmarks/export.py --policy toca
    python benchmarks/export.py --form program      # whole steps as one graph in the file
    python benchmarks/export.py --forms FOLDER      # both forms in turns; files that are in the folder are taken
    python benchmarks/export.py --shared            # says that the machine had other work meanwhile

Size, time to export, and in processes of their own the time from the start to the first picture: a file that is loaded,
the live model, and the model compiled whole, the last two with Inductor's caches empty and full. Then 50 steps of the
loaded and the live model in turns in one process, what each allocates at its peak beyond weights and inputs
(``memory.py``), and the host's microseconds a step: of a model so small that little else is left, in a step that
computes no branch. Results go to ``benchmarks/results/export.{json,md}``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial as bind
from pathlib import Path
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


def pictures(model: Any) -> torch.Tensor:
    """One sampling."""
    scheduler = DDIMScheduler.from_pretrained(fashion_dit.default_model() / "scheduler")
    return fashion_dit.sample(model, scheduler, fashion_dit.labels(COUNT), STEPS)


def export(policy: Any, path: Path, form: str) -> float:
    """Seconds that it takes."""
    model = fashion_dit.load(fashion_dit.default_model())[0]
    size = model.config.sample_size
    inputs = {
        "timestep": torch.full((2 * COUNT,), 999),
        "class_labels": torch.zeros(2 * COUNT, dtype=torch.int64),
    }
    start = time.perf_counter()
    toca_compile.export(model, policy, ((torch.zeros(2 * COUNT, 1, size, size),), inputs), path, form=form)
    return time.perf_counter() - start


def first_picture(way: str, policy: str, path: str) -> None:
    """What a process of its own does."""
    if way == "loaded":
        model: Any = toca_compile.load(path)
    elif way == "live":
        model = toca_compile.optimize(fashion_dit.load(fashion_dit.default_model())[0], POLICIES[policy])
    else:
        model = torch.compile(fashion_dit.load(fashion_dit.default_model())[0], dynamic=False)
    pictures(model)


def process(way: str, policy: str, path: Path, cache: str) -> float:
    """Seconds from the start of a process to its end, after one sampling."""
    command = [sys.executable, __file__, "--way", way, "--policy", policy, "--path", str(path)]
    start = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache})
    return time.perf_counter() - start


def first_step(path: Path) -> tuple[float, float]:
    """Seconds to load, and of the first step after it."""
    start = time.perf_counter()
    model = toca_compile.load(path)
    loaded = time.perf_counter()
    size = model.config.sample_size
    with torch.no_grad():
        model(
            torch.zeros(2 * COUNT, 1, size, size),
            timestep=torch.full((2 * COUNT,), 980),
            class_labels=torch.zeros(2 * COUNT, dtype=torch.int64),
        )
    return loaded - start, time.perf_counter() - loaded


def host(folder: Path, repeats: int, form: str) -> dict[str, float]:
    """Microseconds of a step."""
    model, inputs, policy = dit(64, 12, 4), arguments(1, 4), Fora(100, 100)
    toca_compile.export(model, policy, inputs, folder / "small.pt2", form=form)
    models = {"loaded": toca_compile.load(folder / "small.pt2"), "live": toca_compile.optimize(model, policy)}
    calls = {name: bind(one, **inputs) for name, one in models.items()}
    with torch.no_grad():
        for call in calls.values():
            for _ in range(20):
                call()
        median = interleaved(calls, 50 * repeats)
    return {f"host of a step, {name} µs": 1e6 * seconds for name, seconds in median.items()}


def forms(policy: str, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """What each form of a file costs, beside the live model."""
    rows, calls = [], dict[str, Callable[[], Any]]()
    for form in FORMS:
        path = folder / f"{policy}.{form}.pt2"
        row: dict[str, Any] = {"what": form}
        if not path.exists():
            export(POLICIES[policy], path, form)
        row["file MB"] = path.stat().st_size / 1e6
        row["load s"], row["first step s"] = first_step(path)
        rows.append(row)
        calls[form] = bind(pictures, toca_compile.load(path))
    live = toca_compile.optimize(fashion_dit.load(fashion_dit.default_model())[0], POLICIES[policy])
    wanted = pictures(live)
    for row in rows:
        row["difference"] = (calls[row["what"]]() - wanted).abs().max().item()
    median = interleaved({**calls, "live": bind(pictures, live)}, repeats)
    rows.append(dict.fromkeys(rows[0], "") | {"what": "live"})
    for row in rows:
        row["run s"], row["run / live"] = median[row["what"]], median[row["what"]] / median["live"]
    return rows


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=POLICIES, default="blocks")
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="what the file holds, as of export")
    parser.add_argument("--forms", type=Path, metavar="FOLDER", help="compare the forms, nothing else")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared", action="store_true", help="the machine is not ours alone: say so in the results")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        first_picture(given.way, given.policy, given.path)
        return
    if given.forms:
        rows = forms(given.policy, given.forms, given.repeats)
        save("export", "cpu", {f"{given.policy}, by form" + SHARED * given.shared: rows})
        return
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "dit.pt2", str(Path(folder) / "cache")
        row: dict[str, Any] = {"export s": export(POLICIES[given.policy], path, given.form)}
        row["file MB"] = path.stat().st_size / 1e6
        row["load s"], row["first step s"] = first_step(path)
        row["process, loaded s"] = process("loaded", given.policy, path, cache)
        for way in ("live", "compiled"):
            row[f"process, {way}, cold s"] = process(way, given.policy, path, f"{cache}-{way}")
            row[f"process, {way}, warm s"] = process(way, given.policy, path, f"{cache}-{way}")
        loaded = toca_compile.load(path)
        live = toca_compile.optimize(fashion_dit.load(fashion_dit.default_model())[0], POLICIES[given.policy])
        calls: dict[str, Callable[[], Any]] = {"loaded": bind(pictures, loaded), "live": bind(pictures, live)}
        pictures(live)
        row["difference"] = (pictures(loaded) - pictures(live)).abs().max().item()
        median = interleaved(calls, given.repeats)
        row["run, loaded s"], row["run, live s"] = median["loaded"], median["live"]
        row["loaded / live"] = median["loaded"] / median["live"]
        row |= {f"peak, {name} MB": peak(call, "cpu") / 1e6 for name, call in calls.items()}
        row |= host(Path(folder), given.repeats, given.form)
    print(row)
    name = given.policy + ", as a program" * (given.form == "program")
    save("export", "cpu", {name + SHARED * given.shared: [row]})


if __name__ == "__main__":
    main()
