"""``opt.compile``: all variants of a plan before its first step."""

import logging
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import PlainDiT, randomize
from tests.sampling import noise, sample
from tests.shared import Traced
from toca_compile import BlockCache, Fora, TaylorSeer, ToCa, TocaError
from toca_compile.compiler import numeric_check
from toca_compile.compiler.variants import ProgramVariants
from toca_compile.ir.plan import Plan
from toca_compile.ir.program import Form, Segment, StandIn, Variant
from toca_compile.lowerings import inductor


def inputs() -> tuple[Any, ...]:
    return noise(2, (6, 10)), torch.full((2,), 500), torch.arange(2)


def optimized(policy: Any, lowering: str = "eager") -> Any:
    return toca_compile.optimize(randomize(PlainDiT((6, 10), depth=2)), policy, lowering=lowering)


POLICIES = [ToCa(8, 4, 0.3, "constant"), TaylorSeer(8, 4, 2), BlockCache(8, interval=4), BlockCache(8, threshold=0.05)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_no_step_compiles_after_it(traced: Traced, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample(traced(PlainDiT, policy, size=(6, 10), depth=2)[1], 8, inputs()[0])
    opt = optimized(policy)
    assert opt.compile(*inputs()) > 0
    assert (opt.steps, opt.cache_bytes) == ([], 0)  # no run began by it
    lowered = []
    monkeypatch.setattr(ProgramVariants, "compiled", lambda *args: lowered.append(args))
    assert torch.equal(sample(opt, 8, inputs()[0]), expected)
    assert not lowered
    assert opt.compile(*inputs()) == 0


def test_another_selector_builds_what_selects_and_no_more(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
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
    _, other = traced(PlainDiT, opt.policy, size=(6, 10), depth=2)
    assert torch.equal(sample(other, 8, inputs()[0]), expected)


def test_another_lowering_builds_what_means_something_else_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = optimized(ToCa(8, 4, 0.3, "constant"))
    expected = sample(opt, 8, inputs()[0])
    built: list[tuple[str, ...]] = []
    rewritten = ProgramVariants._rewritten

    def counted(self: ProgramVariants, segment: Segment, forms: tuple[Form, ...], plan: Plan) -> Variant:
        built.append(tuple(str(form.action) for form in forms))
        return rewritten(self, segment, forms, plan)

    monkeypatch.setattr(ProgramVariants, "_rewritten", counted)
    opt.lowering = "dense"
    opt.compile(*inputs())
    assert built
    assert all("partial" in forms for forms in built)
    built.clear()
    opt.lowering = "eager"
    assert torch.equal(sample(opt, 8, inputs()[0]), expected)
    assert not built


def test_variants_that_rank_otherwise_are_verified_each(monkeypatch: pytest.MonkeyPatch) -> None:
    check, checked = numeric_check.check_partial, []

    def counted(*args: Any, **kwargs: Any) -> None:
        checked.append(args)
        check(*args, **kwargs)

    monkeypatch.setattr(numeric_check, "check_partial", counted)
    opt = optimized(ToCa(8, 4, 0.3, "constant"))
    counts = []
    for score in ("attention", "random", "attention"):
        opt.policy = ToCa(8, 4, 0.3, "constant", score=score)
        opt.compile(*inputs())
        counts.append(len(checked))
    assert 0 < counts[0] < counts[1] == counts[2]


def test_a_run_that_is_under_way_goes_on(traced: Traced) -> None:
    expected = sample(traced(PlainDiT, Fora(8, 4), size=(6, 10), depth=2)[1], 8, inputs()[0])
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


def test_skipped_blocks_are_compiled_once_for_all_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = optimized(BlockCache(6, first=1, threshold=0.05))
    sample(opt, 6, inputs()[0])
    sample(opt, 6, inputs()[0])
    opt.compile(*inputs())
    names = {name for name in toca_compile.explain(opt).graphs() if name.startswith("blocks")}
    assert names == {"blocks[keep change]", "blocks[keep]", "blocks[skip]", "blocks[probe]"}
    compiled: list[Segment] = []
    build = ProgramVariants.build

    def recorded(self: ProgramVariants, segment: Segment, forms: tuple[Form, ...], plan: Plan) -> Variant:
        compiled.append(segment)
        return build(self, segment, forms, plan)

    monkeypatch.setattr(ProgramVariants, "build", recorded)
    opt.policy = BlockCache(6, first=1, threshold=0.5, limit=2)
    sample(opt, 6, inputs()[0])
    assert not compiled
    opt.policy = BlockCache(6, first=0, interval=2)
    sample(opt, 6, inputs()[0])
    assert {segment.does for segment in compiled if isinstance(segment, StandIn)} == {"keep", "skip"}
    texts = toca_compile.explain(opt).graphs()  # of the plan that is followed
    assert {name for name in texts if name.startswith("blocks")} == {"blocks[keep]", "blocks[skip]"}
