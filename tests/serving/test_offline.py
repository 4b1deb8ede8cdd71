"""Batch: a sample for each request, the same whoever makes it, and what is done stays done."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pair import Pair
from toca_compile import Fora, TocaError, batch
from toca_compile.cli import main

POLICY = Fora(6, 3)
EAGER: Any = {"lowering": "eager"}


class Counting(Pair):
    """Counts its calls, and fails for a prompt."""

    calls: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __call__(self, num_inference_steps: int, prompt: Any = None, generator: Any = None) -> tuple[Tensor]:
        self.calls.append(prompt)
        if prompt == "bad":
            raise ValueError("no such prompt")
        return super().__call__(num_inference_steps, [prompt], generator)


def requests(*prompts: str, steps: int = 6) -> list[dict[str, Any]]:
    return [{"prompt": p, "num_inference_steps": steps} for p in prompts]


def written(folder: Path) -> dict[str, Tensor]:
    return {path.stem: torch.load(path) for path in sorted(folder.glob("*.pt"))}


def test_a_sample_is_a_function_of_its_request(tmp_path: Path) -> None:
    """Whatever was sampled before it: others, of other lengths."""
    pipe, given = Counting(), requests("a", "b", "c")
    given[1]["num_inference_steps"] = 4
    result = batch(pipe, given, POLICY, out=tmp_path / "all", **EAGER)
    assert (result.done, result.found, result.failed) == (["0", "1", "2"], [], {})
    made = written(tmp_path / "all")
    assert made["0"].shape == (1, 2, 8, 8)
    assert not torch.equal(made["0"], made["2"])  # seeds of their own
    again = [{"name": str(i), "seed": i, **given[i]} for i in (2, 1, 0)]
    batch(pipe, again, POLICY, out=tmp_path / "backwards", **EAGER)
    for name, picture in written(tmp_path / "backwards").items():
        assert torch.equal(picture, made[name])
    about = json.loads((tmp_path / "all" / "1.json").read_text())
    assert about["request"] == {"name": "1", "seed": 1, "prompt": "b", "num_inference_steps": 4}
    assert (about["files"], about["policy"]["policy"]) == (["1.pt"], "Fora")


def test_what_is_done_stays_done_and_what_failed_is_tried_again(tmp_path: Path, caplog: Any) -> None:
    pipe = Counting()
    result = batch(pipe, requests("a", "bad", "c"), POLICY, out=tmp_path, **EAGER)
    assert (result.done, result.failed) == (["0", "2"], {"1": "ValueError: no such prompt"})
    assert "1 failed: ValueError: no such prompt" in caplog.text
    assert str(result).splitlines() == ["2 made, 0 there before, 1 failed", "  1: ValueError: no such prompt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.json", "0.pt", "2.json", "2.pt"]
    before = written(tmp_path)
    (tmp_path / "2.json").unlink()  # as if it had been cut off before the last file
    pipe.calls.clear()
    result = batch(pipe, requests("a", "bad", "c"), POLICY, out=tmp_path, **EAGER)
    assert (result.found, result.done, pipe.calls) == (["0"], ["2"], ["bad", "c"])
    assert torch.equal(written(tmp_path)["2"], before["2"])
    # Another request of the same name, or another policy, is another sample.
    result = batch(pipe, requests("x", "b", "c"), Fora(6, 2), out=tmp_path, **EAGER)
    assert (result.found, result.done) == ([], ["0", "1", "2"])
    assert not torch.equal(written(tmp_path)["2"], before["2"])


def test_pictures_are_written_as_pictures(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    class Pictures(Counting):
        def __call__(self, num_inference_steps: int, prompt: Any = None, generator: Any = None) -> Any:
            super().__call__(num_inference_steps, prompt, generator)
            return {"images": [Image.new("L", (4, 4), i) for i in range(len(prompt))]}

    batch(Pictures(), [*requests("a", "bc", steps=3)], POLICY, out=tmp_path, **EAGER)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.json", "0.png", "1-0.png", "1-1.png", "1.json"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([3], "request 0 must be a prompt"),
        ([{"name": "a/b"}], "name must be that of a file"),
        ([{"name": ".a"}], "name must be that of a file"),
        ([{"seed": -1}], "seed must be"),
        ([{"latents": torch.zeros(1)}], "must hold what JSON holds"),
        ([{"name": "a"}, {"name": "a"}], "two requests are named 'a'"),
    ],
)
def test_what_is_no_request_is_said_before_anything_is_sampled(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TocaError, match=message):
        batch(Counting(), given, POLICY, out=tmp_path)


def test_what_is_no_pipeline_is_reported(tmp_path: Path) -> None:
    result = batch(lambda: 3, ["a"], POLICY, out=tmp_path)
    assert "batch takes a diffusers pipeline" in result.failed["0"]


def test_without_ray_the_batch_runs_here(tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toca_compile.serving.offline.find_spec", lambda name: None)
    result = batch(Counting(), requests("a"), POLICY, out=tmp_path, workers=2, **EAGER)
    assert result.done == ["0"]
    assert "Ray is not installed" in caplog.text


def counting() -> Counting:
    torch._dynamo.reset()
    return Counting()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in requests("a", "bad")) + "\n\n")
    command = ["batch", str(file), "--model", "tests.serving.test_offline:counting", "--out", str(tmp_path / "out")]
    assert main([*command, "--lowering", "eager"]) == 2
    told = capsys.readouterr()
    assert "1 made, 0 there before, 1 failed" in told.out
    assert "1 of 2 requests failed" in told.err
    file.write_text("{")
    assert main(command) == 2
    assert "one JSON object a line" in capsys.readouterr().err


def dies_once(flag: Path) -> Callable[[], Counting]:
    """Makes a pipeline whose process dies, once, in the middle of a sample."""

    class Dying(Counting):
        def __call__(self, num_inference_steps: int, prompt: Any = None, generator: Any = None) -> tuple[Tensor]:
            if prompt == "c" and not flag.exists():
                import os
                import signal

                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(num_inference_steps, prompt, generator)

    return Dying


def test_workers_of_ray_make_the_same_and_one_that_is_killed_is_replaced(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    given = requests(*"abcdef", "bad")
    batch(Counting(), given, POLICY, out=tmp_path / "here", **EAGER)
    root = str(Path(__file__).resolve().parents[2])
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    try:
        result = batch(dies_once(tmp_path / "died"), given, POLICY, out=tmp_path / "there", workers=2, **EAGER)
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists()
    assert sorted(result.done) == list("012345")
    assert list(result.failed) == ["6"]
    here, there = written(tmp_path / "here"), written(tmp_path / "there")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
