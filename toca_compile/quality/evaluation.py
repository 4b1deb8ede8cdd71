"""Evaluate: a set of policies on one model and sampler, from the same seeds, as a table and a front.

Uncached samples are the reference; samplings with fewer steps are always among the rows, since that is what a policy
has to beat. Every finished batch is on disk, so a run that was cut off goes on where it stopped. Needs the ``demo``
extra.
"""

import csv
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from toca_compile.api import explain, is_optimized, optimize
from toca_compile.errors import TocaError
from toca_compile.ir.plan import Policy
from toca_compile.ir.signature import fingerprint
from toca_compile.policies.storage import as_data
from toca_compile.progress import plain_line, shortened, shown
from toca_compile.quality.labels import label as label_points
from toca_compile.quality.metrics import feature_distance, kid, psnr
from toca_compile.quality.settings import EvaluationSettings, overridden
from toca_compile.serving.workers import Workers

DEFAULTS = EvaluationSettings()
_Batch = tuple[int, int, int]  # seed, number, and which method


class Sampler(Protocol):
    """Samples ``count`` pictures with ``model`` in ``steps`` steps: ``[count, …]``, a function of its arguments."""

    def __call__(self, model: Any, steps: int, seed: int, count: int) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """One row to measure: what to sample with, in how many steps. ``flops``: FLOP speed-up after a sampling."""

    name: str
    model: Callable[[], Any]
    steps: int
    flops: Callable[[Any], float]
    policy: Policy | None = None


@dataclass
class Result:
    """One measured row. Lists have one number a seed; ``latency`` is in seconds a batch, its median.

    ``latency_speedup`` is against the uncached model in the same process.
    """

    name: str
    flop_speedup: float
    latency_speedup: float
    psnr: list[float]
    feature_distance: list[float] = field(default_factory=list)
    kid: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    cache_mb: float = 0.0

    @property
    def mean_psnr(self) -> float:
        """Mean over the seeds; infinite for the reference itself."""
        return statistics.mean(self.psnr) if self.psnr else float("inf")


def evaluate(
    model: nn.Module,
    sampler: Sampler,
    policies: Mapping[str, Policy],
    *,
    out: Path,
    settings: EvaluationSettings = DEFAULTS,
    **overrides: Any,
) -> list[Result]:
    """Sample with every policy from the same seeds; writes ``table.csv``, ``table.md`` and ``front.png`` to ``out``.

    All models are compiled by the same compiler (with ``lowering="inductor"``), and their batches take turns. A batch
    during which something was compiled is not timed.

    Args:
        model: the uncached model, in eval mode.
        sampler: samples with it.
        policies: by the name of their row.
        out: folder of results; what it holds from an earlier run with the same settings is not done again.
        settings: steps, seeds, how many samples, how they are judged.
        **overrides: single settings by name, instead of those in ``settings``: ``samples=16, lowering="eager"``.

    Returns:
        The rows; the first is the uncached model.

    Raises:
        TocaError: ``out`` holds results of other settings, a setting is unknown or holds what it may not, or there are
            to be workers and Ray is not installed.
    """
    settings = overridden(settings, overrides)
    store = _Store(out, {
        "steps": settings.steps, "samples": settings.samples, "batch": settings.batch, "seeds": list(settings.seeds),
        "lowering": settings.lowering, "model": fingerprint(model),
    })  # fmt: skip
    methods = _methods(model, policies, settings)
    _sample_all(methods, _Sampling(model, sampler, policies, settings), store)
    results = _results(methods, store, settings)
    _drop_kid(results, settings.fewer)
    write(results, out)
    if settings.console is not None:
        _print(results, settings.console)
    return results


def _methods(model: nn.Module, policies: Mapping[str, Policy], settings: EvaluationSettings) -> list[Method]:
    """The rows; the first is the uncached model."""
    steps, lowering = settings.steps, settings.lowering
    plain = torch.compile(model, dynamic=False) if lowering == "inductor" else model
    methods = [Method("uncached", lambda: plain, steps, lambda _: 1.0)]
    methods += [
        Method(f"{n} steps", lambda: plain, n, lambda _, n=n: steps / n)  # type: ignore[misc]
        for n in settings.fewer
    ]
    methods += [
        Method(name, lambda p=policy: optimize(model, p, lowering=lowering), steps, _flops, policy)  # type: ignore[misc]
        for name, policy in policies.items()
    ]
    return methods + [Method(name, make, steps, _flops) for name, make in (settings.others or {}).items()]


@dataclass(frozen=True)
class _Sampling:
    """What samples batches, here or in a worker: called, it makes what samples one, with models of its own."""

    model: nn.Module
    sampler: Sampler
    policies: Mapping[str, Policy]
    settings: EvaluationSettings

    def __call__(self) -> Callable[[_Batch], dict[str, Any]]:
        methods = _methods(self.model, self.policies, self.settings)
        models: dict[int, Any] = {}

        def sampled(asked: _Batch) -> dict[str, Any]:
            seed, b, which = asked
            method, fresh = methods[which], which not in models
            net = models.setdefault(which, method.model() if fresh else None)
            reset = getattr(net, "reset", None)
            if callable(reset):
                reset()  # a batch is a run of its own
            compiled = _compilations()
            start = time.perf_counter()
            samples = self.sampler(net, method.steps, seed * 1000 + b, self.settings.batch)
            seconds = time.perf_counter() - start
            timed = None if fresh or compiled != _compilations() else seconds
            # As planned: behind the last step that was told beforehand nothing is kept any more.
            kept = explain(net).cache_bytes if is_optimized(net) else 0
            facts = {"flops": method.flops(net), "cache_mb": kept / 2**20, "seconds": timed}
            return {"samples": samples.float().cpu(), **facts}

        return sampled


def _sample_all(methods: Sequence[Method], make: _Sampling, store: "_Store") -> None:
    """Every missing batch, methods in turn, so that a slow minute of the machine falls on all of them."""
    settings = make.settings
    batches = range(settings.samples // settings.batch)
    todo = [
        (seed, b, which)
        for seed in settings.seeds
        for b in batches
        for which, method in enumerate(methods)
        if not store.has(method, seed, b)
    ]
    judged: dict[str, Any] = {"console": None, "features": None, "real": None, "accuracy": None}  # done here
    sampling = replace(make, settings=replace(settings, **judged))
    with (
        Workers(sampling, settings.workers if todo else 0) as workers,
        _progress(len(todo), settings.console) as advance,
    ):
        for (seed, b, which), batch in zip(todo, workers.map(todo), strict=True):
            store.put(methods[which], seed, b, batch)
            advance(methods[which].name)


def _flops(model: Any) -> float:
    """FLOP speed-up as the model itself states it, or of the last sampling."""
    stated = getattr(model, "flop_speedup", None)
    return float(stated) if isinstance(stated, float) else explain(model).flop_speedup()


def _compilations() -> int:
    from torch._dynamo.utils import counters

    from toca_compile import lowerings

    return lowerings.inductor.compiles + sum(counters["stats"].values())


class _Store:
    """Finished batches on disk: samples and facts by method, seed and batch."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.folder = out / "batches"
        self.folder.mkdir(parents=True, exist_ok=True)
        path = out / "settings.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            raise TocaError(f"{out} holds results of other settings ({path}): give another folder")
        path.write_text(json.dumps(settings, indent=1) + "\n")

    def _path(self, method: Method, seed: int, b: int) -> Path:
        told = json.dumps([method.name, method.steps, as_data(method.policy) if method.policy is not None else None])
        return self.folder / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}-{seed}-{b}.pt"

    def has(self, method: Method, seed: int, b: int) -> bool:
        """Whether that batch is done."""
        return self._path(method, seed, b).exists()

    def put(self, method: Method, seed: int, b: int, batch: Mapping[str, Any]) -> None:
        """Keep a batch; a run cut off while writing leaves none."""
        path = self._path(method, seed, b)
        torch.save(dict(batch), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def all(self, method: Method, seed: int) -> list[dict[str, Any]]:
        """The batches of one seed."""
        found: list[dict[str, Any]] = []
        for b in range(10**6):
            if not self.has(method, seed, b):
                return found
            found.append(torch.load(self._path(method, seed, b), weights_only=True))
        return found


@dataclass(frozen=True)
class _Reference:
    """What the uncached model made, by seed: its finished batches, and features of them where they are asked for."""

    batches: Mapping[int, list[dict[str, Any]]]
    features: Mapping[int, Tensor]


def _results(methods: Sequence[Method], store: _Store, settings: EvaluationSettings) -> list[Result]:
    """What was sampled, judged; the first method is the reference."""
    batches = {seed: store.all(methods[0], seed) for seed in settings.seeds}
    look = settings.features
    reference = _Reference(
        batches, {s: look(_samples(kept)) for s, kept in batches.items()} if look is not None else {}
    )
    return [_result(m, store, reference, settings, uncached=m is methods[0]) for m in methods]


def _result(
    method: Method, store: _Store, reference: _Reference, settings: EvaluationSettings, *, uncached: bool
) -> Result:
    own = {seed: store.all(method, seed) for seed in settings.seeds}
    seconds = [_median(kept) for kept in (own, reference.batches)]
    result = Result(
        method.name,
        statistics.mean(b["flops"] for batches in own.values() for b in batches),
        seconds[1] / seconds[0] if seconds[0] and seconds[1] else float("nan"),
        [],
        cache_mb=max(b["cache_mb"] for batches in own.values() for b in batches),
    )
    for seed in settings.seeds:
        mine, theirs = _samples(own[seed]), _samples(reference.batches[seed])
        if not uncached:
            result.psnr.append(psnr(mine, theirs, settings.peak))
        if settings.features is not None:
            found = reference.features[seed] if uncached else settings.features(mine)
            if not uncached:
                result.feature_distance.append(feature_distance(found, reference.features[seed]))
            if settings.real is not None:
                result.kid.append(kid(found, settings.real))
        if settings.accuracy is not None:
            result.accuracy.append(settings.accuracy(mine))
    return result


def _samples(batches: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.cat([batch["samples"] for batch in batches])


def _median(kept: Mapping[int, Sequence[Mapping[str, Any]]]) -> float:
    times = [b["seconds"] for batches in kept.values() for b in batches if b["seconds"] is not None]
    return statistics.median(times) if times else 0.0


def _drop_kid(results: Sequence[Result], fewer: Sequence[int]) -> None:
    """Leave KID out unless it ranks all steps before the fewest by more than the spread: it misranks an under-trained
    model."""
    rows = {r.name: r.kid for r in results}
    few = rows.get(f"{min(fewer)} steps", []) if fewer else []
    full = results[0].kid
    spread = max((statistics.stdev(k) if len(k) > 1 else float("inf")) for k in (full, few)) if few and full else 0.0
    if not few or not full or statistics.mean(few) - statistics.mean(full) <= spread:
        for result in results:
            result.kid = []


def write(results: Sequence[Result], out: Path) -> None:
    """The table as CSV and markdown, and the front as a picture."""
    with (out / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(_HEAD)
        table.writerows(_cells(r, plain=True) for r in results)
    (out / "table.md").write_text(_markdown(results) + "\n")
    _plot(results, out / "front.png")


_HEAD = (
    "policy", "FLOPs ×", "latency ×", "PSNR dB", "±", "feature distance", "KID ×10³", "±", "accuracy", "cache MB",
)  # fmt: skip


def _cells(r: Result, *, plain: bool = False) -> list[str]:
    def mean(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
        return f"{scale * statistics.mean(values):.{digits}f}" if values else "" if plain else "–"

    def spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
        return f"{scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "" if plain else "–"

    return [
        r.name, f"{r.flop_speedup:.2f}", f"{r.latency_speedup:.2f}", mean(r.psnr, 2), spread(r.psnr, 2),
        mean(r.feature_distance, 3), mean(r.kid, 2, 1e3), spread(r.kid, 2, 1e3), mean(r.accuracy, 3),
        f"{r.cache_mb:.1f}",
    ]  # fmt: skip


def _markdown(results: Sequence[Result]) -> str:
    rows = [_cells(r) for r in sorted(results, key=lambda r: (r.flop_speedup, r.mean_psnr))]
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + " --- |" * len(_HEAD)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _print(results: Sequence[Result], console: Any) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in _HEAD:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=name == "policy")
    for result in sorted(results, key=lambda r: (r.flop_speedup, r.mean_psnr)):
        table.add_row(*_cells(result))
    console.print(table)


def _plot(results: Sequence[Result], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in results if r.psnr]
    figure, axes = plt.subplots(1, 2, figsize=(16, 8), dpi=130, sharey=True)
    drawn = []
    for axis, name, label in zip(axes, ("flop_speedup", "latency_speedup"), ("FLOPs ×", "latency ×"), strict=True):
        points = [(getattr(r, name), r.mean_psnr, r.name) for r in shown]
        points = sorted(p for p in points if p[0] == p[0])
        front = [p for p in points if not any(q[0] >= p[0] and q[1] > p[1] for q in points)]
        axis.scatter([p[0] for p in points], [p[1] for p in points], s=14, color="0.6")
        axis.plot([p[0] for p in front], [p[1] for p in front], "o-", color="C0", markersize=4)
        axis.set_xlabel(label)
        axis.margins(0.08)  # room for labels
        drawn.append((points, front))
    axes[0].set_ylabel("PSNR to the uncached samples, dB")
    figure.tight_layout()  # before the labels: their places are those of pixels
    for axis, (points, front) in zip(axes, drawn, strict=True):
        label_points(axis, points, [(x, y) for x, y, _ in front])
    figure.savefig(path)
    plt.close(figure)


class _progress:
    """A bar where there is a console to show it on."""

    def __init__(self, total: int, console: Any) -> None:
        self.total, self.console = total, console
        self.bar: Any = None
        self.done = 0

    def __enter__(self) -> Callable[[str], None]:
        if self.console is None:
            return lambda _: None
        if not self.console.is_terminal:
            return self._line
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<32}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} batches"),
        )
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        task = self.bar.add_task("sampling", total=self.total)
        self.bar.start()
        self.stages = shown(lambda text: self.bar.update(task, description=shortened(text, 32) or "sampling"))
        self.stages.__enter__()
        return lambda name: self.bar.update(task, advance=1, description=name)

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.stages.__exit__(None, None, None)
            self.bar.stop()

    def _line(self, name: str) -> None:
        """Where no bar can be drawn: a line a batch."""
        self.done += 1
        plain_line(f"batch {self.done} of {self.total}: {name}")
