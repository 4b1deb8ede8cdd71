"""``plan`` on a tiny model: an exact number of full steps, by the finished sample, and on from where it stopped."""

import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.quality.test_evaluation import SIZE, Counting
from toca_compile import TocaError, load_policy, plan, save_policy
from toca_compile.policies import Planned
from toca_compile.quality.metrics import psnr
from toca_compile.quality.planning import DEFAULTS, _Recorded
from toca_compile.quality.settings import overridden

STEPS = 10
LITTLE: dict[str, Any] = {"steps": STEPS, "samples": 2, "trials": 40}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Counting, Planned, Path]:
    out = tmp_path_factory.mktemp("plan")
    model, sampler = randomize(PlainDiT(SIZE, width=8, depth=2)), Counting()
    return model, sampler, plan(model, sampler, budget=4, out=out, **LITTLE), out


def test_it_is_what_it_says(searched: Any) -> None:
    """The number of full steps is exact, the PSNR that of its own samples, and nothing tried was better."""
    model, sampler, found, out = searched
    assert len(found.full) == 4
    opt = toca_compile.optimize(model, found, lowering="eager")
    quality = psnr(sampler(opt, STEPS, 100, 2), sampler(model, STEPS, 100, 2))
    assert [step.kind.value for step in opt.steps].count("full") == 4
    assert quality == pytest.approx(found.found["plan"], abs=1e-3)
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert len(trials) == LITTLE["trials"] == len({json.dumps(t["policy"]) for t in trials})
    assert max(t["psnr"] for t in trials) == found.found["plan"]
    assert {"even", "DPCache", "CEM", "corrected"} <= found.found.keys()
    assert found.found["plan"] > found.found["even"]


def test_it_goes_on_where_it_stopped(searched: Any, tmp_path: Path) -> None:
    """A search in two parts samples with each candidate once, and finds what one in one part finds."""
    model, _, found, out = searched
    torch._dynamo.reset()
    lines = (out / "trials.jsonl").read_text().splitlines(keepends=True)
    for name, text in (("search.json", (out / "search.json").read_text()), ("trials.jsonl", "".join(lines[:25]))):
        (tmp_path / name).write_text(text)
    again = Counting()
    assert plan(model, again, budget=4, out=tmp_path, **LITTLE) == found
    assert again.calls == 3 + len(lines) - 25  # recorded, the reference, traced
    with pytest.raises(TocaError, match="trials of another model or of other settings"):
        plan(model, again, budget=4, out=tmp_path, **{**LITTLE, "samples": 3})


def test_as_a_file(searched: Any, tmp_path: Path) -> None:
    found = searched[2]
    save_policy(found, tmp_path / "plan.json")
    assert load_policy(tmp_path / "plan.json") == found
    assert found.made_for.model is not None
    assert found.made_for.size == (2, *SIZE)
    assert found.made_for.dtype == "float32"
    assert found.made_for.times == tuple((STEPS - 1 - i) * 1000 // STEPS for i in range(STEPS))


def test_the_programmes_are_exact() -> None:
    """Against all schedules there are: DPCache's by its own cost, and CEM's."""
    sampler, settings = Counting(), overridden(DEFAULTS, LITTLE)
    recorded = _Recorded(randomize(PlainDiT(SIZE, width=8, depth=1)), sampler, settings)
    h = recorded.values

    def lines(full: tuple[int, ...]) -> float:
        total = 0.0
        for t in range(STEPS):
            if t not in full:
                i, j = [f for f in full if f < t][-2:]
                total += float((h[j] + (t - j) * (h[j] - h[i]) / (j - i) - h[t]).abs().mean())
        return total

    rest = [(0, 1, 2, *more) for more in combinations(range(3, STEPS), 2)]
    assert recorded.dpcache(5) == min(rest, key=lines)

    unit = h / h.norm(dim=1, keepdim=True)

    def jumps(full: tuple[int, ...]) -> float:
        total = 0.0
        for a, b in pairwise(full):
            c = b - a - 1
            total += c**2 * sum(float(1 - unit[t] @ unit[t - c]) for t in range(max(c, 1), b + 1))
        return total

    gaps = [(0, *more, STEPS - 1) for more in combinations(range(1, STEPS - 1), 3)]
    near = [f for f in gaps if all(1 <= b - a <= 3 for a, b in pairwise(f))]
    assert recorded.cem(5) == min(near, key=jumps)


def test_one_value_kept_corrects_nothing() -> None:
    found = plan(
        randomize(PlainDiT(SIZE, width=8, depth=1)), Counting(), budget=4, **{**LITTLE, "trials": 20, "kept": 1}
    )
    assert "corrected" not in found.found
    assert found.correct == 0


@pytest.mark.parametrize("budget", [0, 1, STEPS, -3])
def test_a_budget_that_leaves_nothing_is_refused(budget: int) -> None:
    sampler = Counting()
    with pytest.raises(TocaError, match="budget must lie between 1 and the number of steps"):
        plan(PlainDiT(SIZE, depth=1), sampler, budget=budget, **LITTLE)
    assert not sampler.calls


def test_a_sampler_that_calls_more_often_is_told() -> None:
    model = PlainDiT(SIZE, width=8, depth=1)
    with pytest.raises(TocaError, match="called the model 15 times"):
        plan(model, lambda net, steps, seed, n: Counting()(net, 15, seed, n), budget=4, **LITTLE)
    assert not model._forward_hooks
