"""``evaluate`` and ``tune`` on a tiny model: what they measure, and that they go on where they stopped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import (
    BlockCache,
    EvaluationSettings,
    Fora,
    FullCompute,
    PolicyError,
    TaylorSeer,
    TocaError,
    TuningSettings,
    load_policy,
    save_policy,
)
from toca_compile.cli import main
from toca_compile.policies import Listed
from toca_compile.quality.evaluation import evaluate
from toca_compile.quality.metrics import feature_distance, kid, psnr
from toca_compile.quality.tuning import Target, tune

SIZE = (6, 10)


class Counting:
    """A sampler that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: Any, steps: int, seed: int, count: int) -> Tensor:
        self.calls += 1
        return sample(model, steps, noise(count, SIZE, seed=seed)) / 10


def run(out: Path, sampler: Counting, policies: dict[str, Any], **settings: Any) -> Any:
    settings = {"steps": 12, "fewer": (6, 3), "seeds": (0, 1), "samples": 4, "batch": 2, "lowering": "eager"} | settings
    return evaluate(randomize(PlainDiT(SIZE, depth=2)), sampler, policies, out=out, **settings)


def test_rows_are_what_a_user_would_measure(tmp_path: Path) -> None:
    sampler = Counting()
    policies = {"fora": Fora(12, 3), "newton": TaylorSeer(12, 3, 2, basis="newton")}
    rows = {r.name: r for r in run(tmp_path, sampler, policies, features=lambda x: x.flatten(1))}
    assert list(rows) == ["uncached", "6 steps", "3 steps", "fora", "newton"]
    assert sampler.calls == 5 * 2 * 2
    assert rows["6 steps"].flop_speedup == 2.0
    model = randomize(PlainDiT(SIZE, depth=2))
    torch._dynamo.reset()
    opt = toca_compile.optimize(model, Fora(12, 3), lowering="eager")
    again = Counting()
    pairs = [(again(opt, 12, s * 1000 + b, 2), again(model, 12, s * 1000 + b, 2)) for s in (0, 1) for b in (0, 1)]
    for seed in (0, 1):
        ours, plain = (torch.cat([p[i] for p in pairs[2 * seed : 2 * seed + 2]]) for i in (0, 1))
        assert rows["fora"].psnr[seed] == pytest.approx(psnr(ours, plain), abs=1e-3)
        assert rows["fora"].feature_distance[seed] == pytest.approx(
            feature_distance(ours.flatten(1), plain.flatten(1)), rel=1e-3
        )
    assert rows["fora"].flop_speedup == pytest.approx(toca_compile.explain(opt).flop_speedup())
    assert rows["fora"].latency_speedup > 0
    assert {p.name for p in tmp_path.iterdir()} >= {"table.csv", "table.md", "front.png", "settings.json"}
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("policy,FLOPs ×")


def test_what_was_kept_is_told_when_the_run_is_over(tmp_path: Path) -> None:
    """A sampler that says which steps will come: behind the last of them nothing is kept."""

    class Telling(Counting):
        def __call__(self, model: Any, steps: int, seed: int, count: int) -> Tensor:
            if toca_compile.is_optimized(model):
                model.begin([(steps - 1 - i) * 1000 // steps for i in range(steps)])
            made = super().__call__(model, steps, seed, count)
            assert getattr(model, "cache_bytes", 0) == 0
            return made

    rows = {r.name: r for r in run(tmp_path, Telling(), {"fora": Fora(12, 3), "all": FullCompute()})}
    assert rows["fora"].cache_mb > 0
    assert rows["all"].cache_mb == rows["uncached"].cache_mb == 0


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    class Stops(Counting):
        def __call__(self, *args: Any) -> Tensor:
            if self.calls == 7:
                raise KeyboardInterrupt
            return super().__call__(*args)

    first, second, third = Stops(), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first, {"fora": Fora(12, 3)})
    torch._dynamo.reset()
    resumed = run(tmp_path, second, {"fora": Fora(12, 3)})
    assert second.calls == 16 - 7
    again = run(tmp_path, third, {"fora": Fora(12, 3)})
    assert third.calls == 0
    assert [r.psnr for r in resumed] == [r.psnr for r in again]
    torch._dynamo.reset()
    run(tmp_path, third, {"fora": Fora(12, 4)})  # another policy of that name is another row
    assert third.calls == 4
    with pytest.raises(TocaError, match="other settings"):
        run(tmp_path, third, {}, steps=10)
    with pytest.raises(TocaError, match="multiple"):
        run(tmp_path / "new", third, {}, samples=3)


def test_settings_and_keywords_say_the_same(tmp_path: Path) -> None:
    """A settings object, its keywords, or both, keywords first; what is kept under one is found under the other."""
    settings = EvaluationSettings(6, (0,), 2, "eager", batch=1, fewer=(3,), features=lambda x: x.flatten(1))
    model, first, again = randomize(PlainDiT(SIZE, depth=1)), Counting(), Counting()
    rows = evaluate(model, first, {"fora": Fora(6, 3)}, out=tmp_path, settings=settings)
    assert first.calls == 3 * 2
    assert [len(r.feature_distance) for r in rows] == [0, 1, 1]
    keywords: dict[str, Any] = {"steps": 6, "seeds": [0], "samples": 2, "batch": 1, "fewer": [3], "lowering": "eager"}
    found = evaluate(model, again, {"fora": Fora(6, 3)}, out=tmp_path, **keywords)
    assert [r.psnr for r in found] == [r.psnr for r in rows]
    evaluate(model, again, {}, out=tmp_path, settings=replace(settings, samples=8), samples=2)
    assert again.calls == 0
    target, little = Target(flops=1.5), TuningSettings(6, (100,), 1, seconds=60, trials=2)
    by_settings = tune(model, Counting(), target=target, settings=little)
    assert by_settings == tune(model, Counting(), target=target, steps=6, samples=1, seconds=60, trials=2)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"sampels": 3}, "no setting 'sampels'; EvaluationSettings has steps, seeds, samples"),
        ({"seconds": 3.0}, "no setting 'seconds'"),
        ({"samples": 0}, "samples must be a whole number from 1 .* not 0"),
        ({"samples": 10, "batch": 4}, "samples must be a multiple of batch, not 10 and 4"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": 3}, "seeds must be a tuple or list, .* not 3"),
        ({"fewer": [0]}, r"fewer\[0\] must be .* not 0"),
        ({"steps": True}, "steps must be .* not True"),
        ({"peak": float("nan")}, "peak must be .* not nan"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(TocaError, match=why):
        evaluate(PlainDiT(SIZE, depth=1), Counting(), {}, out=tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
    if {*wrong} <= {"samples", "seeds", "steps", "peak"}:
        with pytest.raises(TocaError, match=why):
            tune(PlainDiT(SIZE, depth=1), Counting(), target=Target(flops=2.0), **wrong)


def test_kid_is_shown_only_where_it_ranks() -> None:
    from toca_compile.quality.evaluation import Result, _drop_kid

    def rows(full: list[float], few: list[float]) -> list[Result]:
        return [Result("uncached", 1, 1, [], kid=full), Result("3 steps", 4, 4, [30.0], kid=few)]

    kept, dropped = rows([0.1, 0.11, 0.1], [0.3, 0.31, 0.3]), rows([0.3, 0.1, 0.2], [0.2, 0.3, 0.1])
    _drop_kid(kept, (3,))
    _drop_kid(dropped, (3,))
    assert kept[0].kid == [0.1, 0.11, 0.1]
    assert dropped[0].kid == dropped[1].kid == []


def test_kid_against_its_definition() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(7, 5), torch.randn(6, 5) + 0.3

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 5 + 1) ** 3)

    own = sum(k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j) / (7 * 6)
    other = sum(k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j) / (6 * 5)
    cross = sum(k(x, y) for x in a for y in b) / 42
    assert kid(a, b) == pytest.approx(own + other - 2 * cross, rel=1e-5)


def test_tuned_for_flops(tmp_path: Path) -> None:
    model = randomize(PlainDiT(SIZE, depth=2))
    sampler = Counting()
    settings: dict[str, Any] = {"steps": 12, "samples": 2, "trials": 24, "out": tmp_path}
    policy = tune(model, sampler, target=Target(flops=2.9), **settings)
    torch._dynamo.reset()
    opt = toca_compile.optimize(model, policy, lowering="eager")
    found = psnr(sampler(opt, 12, 100, 2), sampler(model, 12, 100, 2))
    assert toca_compile.explain(opt).flop_speedup() >= 2.895
    torch._dynamo.reset()
    plain = toca_compile.optimize(model, TaylorSeer(12, 3, 2), lowering="eager")
    untuned = psnr(sampler(plain, 12, 100, 2), sampler(model, 12, 100, 2))
    assert found >= untuned
    tried = [path.read_text() for path in tmp_path.rglob("*.json*")]
    assert all(f'"correct": {share}' in "".join(tried) for share in (0.25, 0.5))
    save_policy(policy, tmp_path / "policy.json")
    assert load_policy(tmp_path / "policy.json") == policy
    # A second search knows all trials of the first.
    torch._dynamo.reset()
    again = Counting()
    settings["trials"] = 3
    later = tune(model, again, target=Target(flops=2.9), **settings)
    assert again.calls < sampler.calls
    torch._dynamo.reset()
    opt = toca_compile.optimize(model, later, lowering="eager")
    assert psnr(again(opt, 12, 100, 2), again(model, 12, 100, 2)) >= found - 1e-4


def test_tuned_for_psnr() -> None:
    model = randomize(PlainDiT(SIZE, depth=2))
    policy = tune(model, Counting(), target=Target(psnr=20.0), steps=8, samples=2, trials=30)
    torch._dynamo.reset()
    opt = toca_compile.optimize(model, policy, lowering="eager")
    sampler = Counting()
    assert psnr(sampler(opt, 8, 100, 2), sampler(model, 8, 100, 2)) >= 20.0 - 1e-4
    assert toca_compile.explain(opt).flop_speedup() > 1


@pytest.mark.parametrize("wrong", [{}, {"flops": 2.0, "psnr": 30.0}, {"flops": -1.0}, {"latency": 0.0}])
def test_a_target_is_one_number(wrong: dict[str, float]) -> None:
    with pytest.raises(TocaError, match="target"):
        Target(**wrong)


def test_a_target_out_of_reach() -> None:
    model = randomize(PlainDiT(SIZE, depth=2))
    with pytest.raises(TocaError, match="reach"):
        tune(model, Counting(), target=Target(flops=40.0), steps=8, samples=1, trials=2)


def test_the_command_evaluates_presets_files_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    from toca_compile.demo.fashion_dit import default_model, load

    model, scheduler = load(default_model())
    scheduler.save_pretrained(tmp_path / "small" / "scheduler")
    small = type(model).from_config({**model.config, "num_layers": 2, "attention_head_dim": 8})
    small.save_pretrained(tmp_path / "small")
    save_policy(BlockCache(4, 1, interval=2), tmp_path / "mine.json")
    save_policy(Fora(4, 2).composition(), tmp_path / "parts.json")
    names = [str(tmp_path / "mine.json"), str(tmp_path / "parts.json"), "dit-xl-2/ddim-50", "FORA N=3"]
    out = str(tmp_path / "out")
    args = ["--steps", "4", "--samples", "2", "--batch", "2", "--seeds", "0", "--fewer", "2", "--lowering", "eager"]
    code = main(
        ["evaluate", "--model", str(tmp_path / "small"), "--policy", *names, "--out", out, "--no-features", *args]
    )
    assert code == 0
    table = (tmp_path / "out" / "table.md").read_text()
    for row in ("uncached", "2 steps", "mine", "parts", "dit-xl-2/ddim-50", "FORA N=3"):
        assert f"| {row} |" in table
    assert main(["evaluate", "--policy", "nonsense", "--no-features", "--out", out]) == 2
    assert "no policy" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text('{"policy": "ToCa", "fresh_ratio": 7}')
    with pytest.raises(PolicyError, match="fresh_ratio"):
        load_policy(tmp_path / "bad.json")


def test_listed_full_steps_must_lie_in_the_run() -> None:
    with pytest.raises(PolicyError, match="num_steps"):
        Listed((0, 60)).phases(50, "mlp")
