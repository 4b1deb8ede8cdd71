"""``opt.compile``: all variants of a plan before its first step."""

import logging
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import BlockCache, Fora, TaylorSeer, ToCa, TocaError
from toca_compile.compiler.variants import ProgramVariants
from toca_compile.ir.program import Segment, Variant
from toca_compile.lowerings import inductor


def inputs() -> tuple[Any, ...]:
    return noise(2, (6, 10)), torch.full((2,), 500), torch.arange(2)


def optimized(policy: Any, lowering: str = "eager") -> Any:
    return toca_compile.optimize(randomize(PlainDiT((6, 10), depth=2)), policy, lowering=lowering)


POLICIES = [ToCa(8, 4, 0.3, "constant"), TaylorSeer(8, 4, 2), BlockCache(8, interval=4), BlockCache(8, threshold=0.05)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_no_step_compiles_after_it(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample(optimized(policy), 8, inputs()[0])
    torch._dynamo.reset()
    opt = optimized(policy)
    assert opt.compile(*inputs()) > 0
    assert (opt.steps, opt.cache_bytes) == ([], 0)  # no run began by it
    lowered = []
    monkeypatch.setattr(ProgramVariants, "compiled", lambda *args: lowered.append(args))
    assert torch.equal(sample(opt, 8, inputs()[0]), expected)
    assert not lowered
    assert opt.compile(*inputs()) == 0


def test_another_selector_builds_what_selects_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = optimized(ToCa(8, 4, 0.3, "constant"))
    opt.compile(*inputs())
    built: list[tuple[int, ...]] = []
    build = ProgramVariants.build

    def counted(self: ProgramVariants, segment: Segment, *args: Any) -> Variant:
        built.append(segment.sites)
        return build(self, segment, *args)

    monkeypatch.setattr(ProgramVariants, "build", counted)
    opt.policy = ToCa(8, 4, 0.3, "constant", score="random")
    opt.compile(*inputs())
    assert built
    assert all(built)  # nothing of what stands between the blocks
    expected = sample(opt, 8, inputs()[0])
    torch._dynamo.reset()
    assert torch.equal(sample(optimized(opt.policy), 8, inputs()[0]), expected)


def test_a_run_that_is_under_way_goes_on() -> None:
    expected = sample(optimized(Fora(8, 4)), 8, inputs()[0])
    torch._dynamo.reset()
    opt = optimized(Fora(8, 4))
    half = sample(opt, 3, inputs()[0])
    opt.compile(*inputs())
    assert [r.index for r in opt.steps] == [0, 1, 2]
    assert half.isfinite().all()
    assert torch.equal(sample(opt, 8, inputs()[0]), expected)


def test_it_says_what_it_compiles(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "toca_compile"):
        optimized(ToCa(8, 4, 0.3, "constant")).compile(*inputs())
    assert any("compiling variant 1 of" in r.message and "partial" in r.message for r in caplog.records)


def test_without_inputs_it_names_what_it_takes() -> None:
    with pytest.raises(TocaError, match="example_inputs"):
        optimized(Fora(4, 2)).compile()


@pytest.mark.inductor
def test_inductor_compiles_nothing_in_a_step() -> None:
    inductor.clear()
    opt = optimized(ToCa(6, 3, 0.3, "constant"), "inductor")
    opt.compile(*inputs())
    before = inductor.compiles
    sample(opt, 6, inputs()[0])
    assert inductor.compiles == before
