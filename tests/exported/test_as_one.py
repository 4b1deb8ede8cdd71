"""Whole steps as the one entry of a file, and what is found of a compiler that errs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_compile
from tests.in_memory import POLICIES, STEPS
from tests.models import PlainDiT, randomize
from tests.runs import optimized
from tests.sampling import noise, sample
from toca_compile import BlockCache, ExportError, ToCa
from toca_compile.exported.as_one import One, as_one, check
from toca_compile.exported.write import traces

INPUTS = (noise(), torch.zeros(2, dtype=torch.int64), torch.arange(2))
DECIDES = BlockCache(STEPS, threshold=0.35, order=1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(PlainDiT(depth=2))


@pytest.fixture(scope="module", params=[POLICIES[3], DECIDES], ids=["tokens by attention", "decides at run time"])
def one(model: nn.Module, request: pytest.FixtureRequest) -> One:
    return as_one(traces(model, request.param, INPUTS, in_memory=True)[""])


Run = Callable[[list[Tensor]], Sequence[Tensor]]


def a_lost_write(one: One) -> Run:
    which = max(i for i, name in enumerate(one.whole.state) if name.startswith("cache")) - len(one.whole.state)

    def run(given: list[Tensor]) -> Sequence[Tensor]:
        given[which] = given[which].clone()
        results: Sequence[Tensor] = one.module(*given)
        return results

    return run


def other_strides(one: One) -> Run:
    return lambda given: [x.mT.reshape(x.shape) for x in one.module(*given)]


def a_step_too_many(one: One) -> Run:
    def run(given: list[Tensor]) -> Sequence[Tensor]:
        results: Sequence[Tensor] = one.module(*given)
        given[one.whole.state.index("step") - len(one.whole.state)].add_(1)
        return results

    return run


def test_a_compiled_step_is_held_against_the_graph(one: One) -> None:
    check(one, lambda given: one.module(*given))
    for wrong in (a_lost_write, other_strides, a_step_too_many):
        with pytest.raises(ExportError, match="the compiler made something else"):
            check(one, wrong(one))


@pytest.mark.inductor
@pytest.mark.xdist_group("export")
@pytest.mark.parametrize(
    "policy", [ToCa(4, interval=4, fresh_ratio=0.3), DECIDES], ids=["tokens", "decides at run time"]
)
def test_a_file_that_holds_a_program(policy: Any, tmp_path: Path) -> None:
    """No write to a cache is lost, at any K and in a branch within a branch; the next run is another's."""
    model = randomize(PlainDiT(depth=2 if policy is DECIDES else 1))
    live, steps = optimized(model, policy), policy.num_steps
    toca_compile.export(model, policy, INPUTS, tmp_path / "m.pt2", form="program")
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    own = toca_compile.load(tmp_path / "m.pt2")
    for seed in range(2):
        wanted = sample(live, steps, noise(seed=seed))
        torch.testing.assert_close(sample(own, steps, noise(seed=seed)), wanted, rtol=1e-5, atol=1e-5)
        assert [(r.kind, r.k) for r in own.steps] == [(r.kind, r.k) for r in live.steps]
    other = randomize(PlainDiT(depth=2 if policy is DECIDES else 1), seed=1)
    own.update_weights(other.state_dict())
    torch.testing.assert_close(
        sample(own, steps, noise()), sample(optimized(other, policy), steps, noise()), rtol=1e-5, atol=1e-5
    )


def test_what_no_program_can_be(model: nn.Module, tmp_path: Path) -> None:
    batch = {name: {0: torch.export.Dim("batch", min=2, max=5)} for name in "xty"}
    for options, why in (({"form": "whole"}, "form must be one of"), ({"form": "program", "dynamic": batch}, "fixed")):
        with pytest.raises(ExportError, match=why):
            toca_compile.export(model, POLICIES[1], INPUTS, tmp_path / "m.pt2", **options)
