"""Trials: policies sampled with on calibration seeds, each once. What ``tune`` and ``plan`` search with.

One optimised model serves all of them, so that nothing is traced or compiled again. Every trial is on disk, so a search
that was cut off goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toca_compile.api import Controls, controls, explain, is_optimized, optimize, restore
from toca_compile.diffusers import is_pipeline, transformers_of
from toca_compile.errors import TocaError
from toca_compile.ir.plan import Policy
from toca_compile.ir.signature import fingerprint
from toca_compile.policies.composition import Composition
from toca_compile.policies.storage import as_data, from_data
from toca_compile.quality.evaluation import Sampler
from toca_compile.quality.metrics import psnr
from toca_compile.quality.settings import SearchSettings, TuningSettings
from toca_compile.serving.workers import Workers


@dataclass(frozen=True)
class Trial:
    """One measured policy; ``latency_speedup`` is NaN where the search does not ask for it."""

    policy: Policy
    psnr: float
    flop_speedup: float
    latency_speedup: float = float("nan")


class Trials:
    """What was tried, and what may still be.

    Args:
        model: the uncached model, or a pipeline; ``close`` gives a pipeline back as it was, and ends workers.
        sampler: samples with it.
        settings: what is sampled, and when to stop.
        out: folder for ``trials.jsonl``; None: nothing is kept.
        start: a policy that the model can follow, to trace it with.
        timed: measure latencies too, with one more sampling each.

    Attributes:
        known: the trials by policy.
        reference: the uncached samples, one batch a seed.

    Raises:
        TocaError: ``out`` holds trials of something else, a pipeline is optimised already, or there are to be workers
            and Ray is not installed.
    """

    def __init__(
        self, model: Any, sampler: Sampler, settings: SearchSettings, out: Path | None, start: Policy, *, timed: bool
    ) -> None:
        if is_optimized(model):
            raise TocaError("a search begins with the uncached model: restore it first")
        self._count = settings.workers if isinstance(settings, TuningSettings) else 0
        if self._count and timed:
            raise TocaError("trials of a latency are timed with nothing beside them: leave workers out")
        self._workers: Workers | None = None
        self._ahead: dict[str, list[Tensor]] = {}  # what they have sampled, of trials whose turn has not come
        self.sampler, self.settings, self.timed = sampler, settings, timed
        self.end, self.left = time.monotonic() + settings.seconds, settings.trials
        self.known: dict[str, Trial] = {}
        self.log = out / "trials.jsonl" if out is not None else None
        if out is not None:
            _claim(out, settings, model)
        piped = is_pipeline(model)
        compiled = settings.lowering == "inductor" and not piped
        plain = torch.compile(model, dynamic=False) if compiled else model
        self.seconds, self.reference = self.sampled(plain)
        if timed:
            self.seconds, _ = self.sampled(plain)  # compiled by now
        self._model = model
        try:
            if self._count:
                make = _Sampling(model, sampler, start, replace(settings, console=None))
                self._workers = Workers(make, self._count)
            self.net: Any = optimize(model, start, lowering=settings.lowering)
            self.opt: Controls = controls(model) if piped else self.net
            self.sampled(self.net)  # traced, so that plans can be priced
            for line in self.log.read_text().splitlines() if self.log is not None and self.log.exists() else ():
                row = json.loads(line)
                trial = Trial(from_data(row.pop("policy")), **row)
                self.known[_key(trial.policy)] = trial
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give a pipeline back as it was, and end the workers."""
        if self._workers is not None:
            self._workers.close()
        if is_pipeline(self._model) and is_optimized(self._model):
            restore(self._model)

    def price(self, policy: Policy) -> float:
        """FLOP speed-up, without running anything."""
        self.opt.policy = policy
        return explain(self.net).flop_speedup()

    def measured(self, policies: Iterable[Policy]) -> Iterator[Trial | None]:
        """The trial of each, in order, as of ``measure``; workers sample as many at once as there are of them. What
        they have sampled too early counts when its turn comes, so that there being workers changes no search."""
        waiting = iter(policies)
        while chunk := list(islice(waiting, max(self._count, 1))):
            if self._workers is not None and not self.over():
                new = {key: p for p in chunk if (key := _key(p)) not in self.known and key not in self._ahead}
                self._ahead.update(zip(new, self._workers.map(new.values()), strict=True))
            yield from map(self.measure, chunk)

    def measure(self, policy: Policy) -> Trial | None:
        """The trial of a policy; None where the search is over and it is not known."""
        key = _key(policy)
        if key in self.known or self.over():
            return self.known.get(key)
        if self.left is not None:
            self.left -= 1
        flops = self.price(policy)
        seconds, found = (0.0, self._ahead.pop(key)) if key in self._ahead else self.sampled(self.net)
        latency = float("nan")
        if self.timed:
            seconds, found = self.sampled(self.net)
            latency = self.seconds / seconds
        quality = sum(psnr(a, b, self.settings.peak) for a, b in zip(found, self.reference, strict=True)) / len(found)
        trial = self.known[key] = Trial(policy, quality, flops, latency)
        if self.log is not None:
            with self.log.open("a") as file:
                row: Mapping[str, Any] = {**trial.__dict__, "policy": as_data(policy)}
                file.write(json.dumps(row) + "\n")
        self.say(f"{len(self.known)}: PSNR {quality:.2f} dB at {flops:.2f}× FLOPs: {told_of(policy)}")
        return trial

    def sampled(self, net: Any) -> tuple[float, list[Tensor]]:
        """Seconds, and the samples of each seed."""
        start = time.perf_counter()
        found = _sampled(net, self.sampler, self.settings)
        return time.perf_counter() - start, found

    def over(self) -> bool:
        """Whether nothing more may be sampled."""
        return time.monotonic() > self.end or self.left == 0

    def say(self, text: str) -> None:
        """On the console, if there is one."""
        if self.settings.console is not None:
            self.settings.console.print(f"[{max(self.end - time.monotonic(), 0):5.0f} s left] {text}", markup=False)


@dataclass(frozen=True)
class _Sampling:
    """What a worker makes: an optimised model of its own, and what samples with it by a policy."""

    model: Any
    sampler: Sampler
    start: Policy
    settings: SearchSettings

    def __call__(self) -> Callable[[Policy], list[Tensor]]:
        net = optimize(self.model, self.start, lowering=self.settings.lowering)

        def sampled(policy: Policy) -> list[Tensor]:
            controls(net).policy = policy
            return _sampled(net, self.sampler, self.settings)

        return sampled


def _sampled(net: Any, sampler: Sampler, settings: SearchSettings) -> list[Tensor]:
    found = []
    for seed in settings.seeds:
        if is_optimized(net):
            controls(net).reset()
        found.append(sampler(net, settings.steps, seed, settings.samples))
    return found


def _claim(out: Path, settings: SearchSettings, model: Any) -> None:
    """Make the folder this search's.

    Raises:
        TocaError: it is another's.
    """
    told = {
        "steps": settings.steps, "seeds": list(settings.seeds), "samples": settings.samples, "peak": settings.peak,
        "model": fingerprint(*(transformers_of(model).values() if is_pipeline(model) else [model])),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    path = out / "search.json"
    if path.exists() and json.loads(path.read_text()) != told:
        raise TocaError(f"{out} holds trials of another model or of other settings ({path}): give another folder")
    path.write_text(json.dumps(told, indent=1) + "\n")


def _key(policy: Policy) -> str:
    return json.dumps(as_data(policy), sort_keys=True)


def told_of(policy: Policy) -> str:
    """A policy in a line."""
    if not isinstance(policy, Composition):
        return repr(policy)
    rules = ", ".join(f"{r.do}{' ' + str(r.kinds) + str(r.depths) if r.kinds else ''}" for r in policy.rules)
    return f"{policy.when}; {rules}; {policy.basis}"
