"""Batch: many samples of one pipeline, in this process or by workers of Ray, each a function of its request alone.

Every sample is a call of the pipeline of its own, with random numbers of its own and caches that know nothing of the
call before: which worker makes it, and when, makes no difference. What is done stands in the folder, so that a batch
that was cut off goes on.
"""

import hashlib
import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toca_compile.api import optimize
from toca_compile.diffusers import is_pipeline, optimized_components
from toca_compile.errors import PolicyError, TocaError
from toca_compile.ir.plan import Policy
from toca_compile.policies.given import checked_policy
from toca_compile.policies.storage import as_data
from toca_compile.progress import working
from toca_compile.serving.workers import gpus_each

log = logging.getLogger(__name__)

Given = Mapping[str, Any]  # the arguments of one call of the pipeline, "seed" and "name" among them


@dataclass
class BatchResult:
    """What became of a batch's requests, by name.

    Attributes:
        done: made now.
        found: were there before.
        failed: why not, as text; they are tried again when the batch is.
    """

    done: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        told = f"{len(self.done)} made, {len(self.found)} there before, {len(self.failed)} failed"
        return "\n".join([told, *(f"  {name}: {why}" for name, why in self.failed.items())])


def batch(
    pipeline: Any,
    requests: Iterable[Given | str],
    policy: Policy | str = "balanced",
    *,
    out: str | os.PathLike[str],
    workers: int = 0,
    **options: Any,
) -> BatchResult:
    """Sample a pipeline once for each request, and write what it gives to a folder: pictures as ``NAME.png`` (several:
    ``NAME-0.png`` …), anything else as ``NAME.pt``, and last ``NAME.json``, with the request.

    A request that was done before, with the same arguments and policy, is not done again. One that fails is reported,
    and the rest go on.

    Args:
        pipeline: a diffusers pipeline, which is optimised in place, or a function without arguments that returns one.
            Each worker calls it, or has a copy.
        requests: prompts, or the arguments of a call of the pipeline as JSON has them; ``"seed"`` among them is that of
            the random numbers (the request's number, if there is none), ``"name"`` that of its files.
        policy: as of ``optimize``.
        out: the folder; of workers on several machines one that all see.
        workers: processes on the machines of Ray (the extra ``scale``), which is started if it does not run. A request
            whose worker dies is done by another. 0, or without Ray: in this process.
        options: as of ``optimize``.

    Raises:
        TocaError: requests are none, or two have one name.
    """
    given = _named(requests)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    meant = checked_policy(policy)
    left = [request for request in given if not _Files(folder, request, meant).are_there()]
    names = {request["name"] for request in left}
    result = BatchResult(found=[request["name"] for request in given if request["name"] not in names])
    if workers and find_spec("ray") is None:
        log.warning("Ray is not installed (pip install 'toca-compile[scale]'): the batch runs in this process")
        workers = 0
    job = Job(pipeline, meant, dict(options), str(folder), torch.get_num_threads())
    made = _on_ray(job, left, workers) if workers else map(Worker(job), left)
    began = time.perf_counter()
    for number, told in enumerate(made, 1):
        if told["error"]:
            result.failed[told["name"]] = told["error"]
            log.warning("%s failed: %s", told["name"], told["error"])
        else:
            result.done.append(told["name"])
        rate = number / (time.perf_counter() - began)
        with working(f"sampled {number} of {len(left)}, {rate:.2g} a second", brief=True):
            pass
    return result


@dataclass(frozen=True)
class Job:
    """What all workers of a batch do. ``threads``: of each, so that sums are added up alike everywhere."""

    pipeline: Any
    policy: Policy
    options: dict[str, Any]
    folder: str
    threads: int


class Worker:
    """Samples requests, one after the other."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pipe: Any = None

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sample one request and write it; its name, and why it failed."""
        if "request" in request:  # a row of Ray's
            request = json.loads(request["request"])
        files = _Files(Path(self._job.folder), request, self._job.policy)
        error = ""
        try:
            # One that a worker had done before it died is there.
            if not files.are_there():
                files.write(self._sampled(request))
        except Exception as why:
            error = f"{type(why).__name__}: {why}"
        return {"name": request["name"], "error": error}

    def _sampled(self, request: Given) -> Any:
        pipe = self._pipe = self._pipe or self._made()
        given = {k: v for k, v in request.items() if k not in ("name", "seed")}
        parameters = inspect.signature(type(pipe).__call__).parameters
        if "generator" in parameters:
            given["generator"] = torch.Generator("cpu").manual_seed(request["seed"])
        for handle in optimized_components(pipe).values():
            handle.reset()  # what is kept by time too: it is made by whoever comes first, for all of its times at once
        with torch.random.fork_rng():
            torch.manual_seed(request["seed"])
            return pipe(**given)

    def _made(self) -> Any:
        job = self._job
        torch.set_num_threads(job.threads)
        pipe: Any = job.pipeline
        if not is_pipeline(pipe) and callable(pipe):
            pipe = pipe()
        if not is_pipeline(pipe):
            raise TocaError(
                f"batch takes a diffusers pipeline or a function that returns one, not {type(job.pipeline).__name__}"
            )
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        if not optimized_components(pipe):
            return optimize(pipe, job.policy, **job.options)
        for handle in optimized_components(pipe).values():
            handle.policy = job.policy
        return pipe


class _Files:
    """The files of one request. ``NAME.json`` is written last, and each is written whole or not at all."""

    def __init__(self, folder: Path, request: Given, policy: Policy) -> None:
        self._folder, self._name = folder, request["name"]
        told = {"request": dict(request), "policy": _told(policy)}
        self._about = told | {"id": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}

    def are_there(self) -> bool:
        """Whether the request was done, as it is now."""
        with suppress(OSError, ValueError):
            known = json.loads((self._folder / f"{self._name}.json").read_text(encoding="utf-8"))
            return bool(known["id"] == self._about["id"])
        return False

    def write(self, answer: Any) -> None:
        """Write what a pipeline gave."""
        first = next(iter(answer.values())) if isinstance(answer, Mapping) else answer
        first = first[0] if isinstance(first, tuple) else first
        pictures = first if isinstance(first, list) else [first]
        if all(hasattr(p, "save") and hasattr(p, "getpixel") for p in pictures):
            names = (
                [f"{self._name}.png"] if len(pictures) == 1 else [f"{self._name}-{i}.png" for i in range(len(pictures))]
            )
            for name, picture in zip(names, pictures, strict=True):
                self._put(name, partial(picture.save, format="PNG"))
        else:
            names = [f"{self._name}.pt"]
            value = first if isinstance(first, Tensor) else torch.as_tensor(first)
            self._put(names[0], lambda path: torch.save(value.cpu(), path))
        told = json.dumps(self._about | {"files": names}, indent=1)
        self._put(f"{self._name}.json", lambda path: path.write_text(told + "\n", encoding="utf-8"))

    def _put(self, name: str, write: Callable[[Path], Any]) -> None:
        part = self._folder / f".{name}.{os.getpid()}"
        try:
            write(part)
            part.replace(self._folder / name)
        finally:
            part.unlink(missing_ok=True)


def _named(requests: Iterable[Given | str]) -> list[dict[str, Any]]:
    """Requests with name and seed.

    Raises:
        TocaError: one is none, or two have one name.
    """
    given = list(requests)
    width, named = len(str(max(len(given) - 1, 0))), []
    for i, request in enumerate(given):
        own = (
            {"prompt": request} if isinstance(request, str) else dict(request) if isinstance(request, Mapping) else None
        )
        if own is None:
            raise TocaError(f"request {i} must be a prompt or the arguments of a call, not {request!r}")
        own = {"name": f"{i:0{width}}", "seed": i, **own}
        name, seed = own["name"], own["seed"]
        if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
            raise TocaError(f"request {i}: name must be that of a file, not {name!r}")
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise TocaError(f"request {i}: seed must be a whole number from 0 on, not {seed!r}")
        try:
            named.append(json.loads(json.dumps(own)))
        except (TypeError, ValueError) as error:
            raise TocaError(f"request {i} must hold what JSON holds: {error}") from error
    names = [request["name"] for request in named]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise TocaError(f"two requests are named {twice!r}")
    return named


def _told(policy: Policy) -> Any:
    try:
        return as_data(policy)
    except PolicyError:  # the user's own
        return repr(policy)


def _on_ray(job: Job, requests: Sequence[Given], workers: int) -> Iterator[dict[str, Any]]:
    """What workers say, in the order in which requests are done."""
    if not requests:
        return
    import ray

    gpus = gpus_each(workers)
    # A block for each request: what dies with a worker is one request, which another does.
    rows = ray.data.from_items([{"request": json.dumps(r)} for r in requests], override_num_blocks=len(requests))
    made = rows.map(
        Worker, fn_constructor_args=(job,), compute=ray.data.ActorPoolStrategy(size=workers), num_cpus=1, num_gpus=gpus
    )
    yield from made.iter_rows()
