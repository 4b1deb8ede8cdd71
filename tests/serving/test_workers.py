"""Workers: what is done by Ray is what this process does. Ray itself is a stand-in here, but in the last test."""

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import Fora, TocaError
from toca_compile.policies.storage import as_data
from toca_compile.quality.evaluation import evaluate
from toca_compile.quality.tuning import Target, tune
from toca_compile.serving.workers import Workers

EVALUATED: dict[str, Any] = {"steps": 6, "fewer": (3,), "seeds": (0,), "samples": 4, "batch": 2, "lowering": "eager"}
TUNED: dict[str, Any] = {"target": Target(flops=2.0), "steps": 6, "samples": 1, "trials": 14}


class Failing(TocaError):
    """What a sampler raises."""


def sampler(model: Any, steps: int, seed: int, count: int) -> Tensor:
    if count == 3:
        raise Failing("three are too many")
    return sample(model, steps, noise(count, seed=seed)) / 10


def model() -> torch.nn.Module:
    torch._dynamo.reset()
    return randomize(PlainDiT(depth=1))


class Fake(ModuleType):
    """Of Ray what is used of it. Actors live here, each with a copy of what is sent to it; pieces are done late."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.actors: list[Any] = []
        self.ended = self.done = 0
        self.util = ModuleType("ray.util")
        self.util.ActorPool = self.pool  # type: ignore[attr-defined]

    is_initialized = staticmethod(lambda: True)

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {}

    put = staticmethod(pickle.dumps)

    def remote(self, **options: Any) -> Callable[[type], Any]:
        assert options["max_restarts"] == -1
        fake = self

        class Handle:
            def __init__(self, kind: type) -> None:
                self.kind = kind

            def remote(self, sent: bytes, *args: Any) -> Any:
                fake.actors.append(self.kind(pickle.loads(sent), *args))
                return fake.actors[-1]

        return Handle

    def pool(self, actors: list[Any]) -> Any:
        fake = self

        class Pool:
            def map(self, _: Any, items: Any) -> Iterator[Any]:
                for i, item in enumerate(list(items)):  # all at once, as Ray's
                    fake.done += 1
                    yield actors[i % len(actors)].do(pickle.loads(pickle.dumps(item)))

        return Pool()

    def kill(self, _: Any) -> None:
        self.ended += 1


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.util", fake.util)
    monkeypatch.setattr("toca_compile.serving.workers.find_spec", lambda name: name)
    return fake


def evaluated(out: Path, **more: Any) -> list[Any]:
    return evaluate(model(), sampler, {"fora": Fora(6, 3)}, out=out, **(EVALUATED | more))


def told(out: Path) -> list[Any]:
    return [sorted(p.name for p in (out / "batches").iterdir()), *pictures(out)]


def pictures(out: Path) -> list[Any]:
    return [torch.load(p)["samples"].tolist() for p in sorted((out / "batches").iterdir())]


def test_evaluate_has_the_same_rows_and_goes_on(ray: Fake, tmp_path: Path) -> None:
    here = evaluated(tmp_path / "here")
    there = evaluated(tmp_path / "there", workers=2, features=lambda x: x.flatten(1))  # no lambda is sent
    assert told(tmp_path / "there") == told(tmp_path / "here")
    assert [(r.name, r.flop_speedup, r.psnr) for r in there] == [(r.name, r.flop_speedup, r.psnr) for r in here]
    assert (len(ray.actors), ray.ended, ray.done) == (2, 2, 3 * 2)
    evaluated(tmp_path / "there", workers=2)  # all is there: no worker is asked for
    assert (len(ray.actors), ray.done) == (2, 6)


def test_tune_finds_the_same_after_the_same_trials(ray: Fake, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    policies = [tune(model(), sampler, out=here, **TUNED), tune(model(), sampler, out=there, workers=2, **TUNED)]
    assert as_data(policies[0]) == as_data(policies[1])
    trials = [(out / "trials.jsonl").read_text() for out in (here, there)]
    assert trials[0] == trials[1]
    assert len(trials[0].splitlines()) == 14
    assert 14 <= ray.done <= 14 + 1  # those of the last round whose turn did not come
    assert ray.ended == 2


def test_what_workers_cannot_do_is_said(ray: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Failing, match="three are too many"):
        evaluated(tmp_path, workers=1, samples=3, batch=3)
    assert ray.ended == 1  # they end with what asked for them
    with pytest.raises(TocaError, match=r"cannot be sent to them \(.*lambda.*\): leave workers out"):
        evaluate(model(), lambda *a: sampler(*a), {}, out=tmp_path / "lambda", workers=1, **EVALUATED)
    with pytest.raises(TocaError, match="a latency are timed with nothing beside them: leave workers out"):
        tune(model(), sampler, **(TUNED | {"target": Target(latency=2.0)}), workers=1)
    monkeypatch.setattr("toca_compile.serving.workers.find_spec", lambda name: None)
    for ask in (lambda: evaluated(tmp_path / "no", workers=2), lambda: tune(model(), sampler, workers=2, **TUNED)):
        with pytest.raises(
            TocaError, match=r"workers=2 needs Ray, .* pip install 'toca-compile\[scale\]', or workers=0"
        ):
            ask()


def dies_once(flag: Path) -> Callable[[], Callable[[int], int]]:
    """Squares numbers, and dies once, at 2."""

    def make() -> Callable[[int], int]:
        def square(number: int) -> int:
            if number == 2 and not flag.exists():
                import os
                import signal

                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return number * number

        return square

    return make


def test_on_ray_itself(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    root = str(Path(__file__).resolve().parents[2])
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    try:
        with Workers(dies_once(tmp_path / "died"), 2) as workers:
            assert list(workers.map(range(5))) == [0, 1, 4, 9, 16]
        assert (tmp_path / "died").exists()
        evaluated(tmp_path / "here")
        evaluated(tmp_path / "there", workers=2)
        assert told(tmp_path / "there") == told(tmp_path / "here")
        found = [tune(model(), sampler, workers=workers, **TUNED) for workers in (0, 2)]
        assert as_data(found[0]) == as_data(found[1])
    finally:
        ray.shutdown()
