"""Plans with few different numbers of tokens, from plans with many."""

import time
from dataclasses import replace

import pytest

import toca_compile
from tests.models import PlainDiT, randomize
from tests.runs import TIMES, optimized, steps
from tests.sampling import noise
from toca_compile import DuCa, Fora, FullCompute, ToCa, preset
from toca_compile.compiler.buckets import BUCKETS, GRAPHS, bucketed
from toca_compile.ir.actions import Compute, Partial
from toca_compile.ir.plan import Plan, StepPlan, scored_sites
from toca_compile.ir.types import Site, StepKind


@pytest.fixture(scope="module")
def sites() -> tuple[Site, ...]:
    """Of a model of 256 tokens."""
    opt = optimized(randomize(PlainDiT((32, 32), depth=6)), FullCompute())
    steps(opt, noise(size=(32, 32)), TIMES[:1])
    return toca_compile.explain(opt).program.sites


def rows(plan: Plan, sites: tuple[Site, ...]) -> int:
    """How many steps are told apart by what they do, measure, and compute of each site."""
    measured = map(frozenset, scored_sites(plan, sites))
    forms = (tuple((a.form(), a.computed(s)) for a, s in zip(step.sites, sites, strict=True)) for step in plan.steps)
    return len(set(zip(forms, measured, strict=True)))


@pytest.mark.parametrize(
    "policy",
    [
        preset("dit-xl-2/ddim-50"), preset("dit-xl-2/ddpm-250"), preset("pixart-alpha/dpm-20"),
        ToCa(50, score="random"), DuCa(50, 3),
    ],
    ids=lambda p: f"{type(p).__name__}-{p.num_steps}",
)  # fmt: skip
def test_a_plan_needs_few_graphs(policy: ToCa, sites: tuple[Site, ...]) -> None:
    plan = policy.plan(sites)
    began = time.perf_counter()
    few = bucketed(plan, sites)
    assert time.perf_counter() - began < 2
    assert rows(few, sites) <= GRAPHS < rows(plan, sites)
    assert len({s.sites for s in few.steps if any(isinstance(a, Partial) for a in s.sites)}) <= BUCKETS
    asked, given = 0, 0
    for old, new in zip(plan.steps, few.steps, strict=True):
        assert new.kind is old.kind
        for a, b, site in zip(old.sites, new.sites, sites, strict=True):
            assert a.form() == b.form()
            assert a.used == b.used
            assert a.computed(site) <= b.computed(site) <= site.axis.size
            asked, given = asked + a.computed(site), given + b.computed(site)
    assert given < 1.05 * asked


def test_few_numbers_stay(sites: tuple[Site, ...]) -> None:
    for policy in (Fora(50, 3), ToCa(50, schedule="constant"), FullCompute()):
        plan = policy.plan(sites)
        assert bucketed(plan, sites) is plan


def test_those_are_joined_that_add_the_fewest_tokens(sites: tuple[Site, ...]) -> None:
    """Ten numbers, of which 20 and 21 (once each) and 90 and 92 are near; 21 steps of 200 are not made dearer by one."""
    site = sites[:1]
    numbers = [10, 20, 21, 40, 60, 90, 92, 120, 150, 200]
    full = StepPlan(StepKind.FULL, (Compute(),))
    partial = [StepPlan(StepKind.PARTIAL, (Partial(tokens=n),)) for n in numbers]
    few = bucketed(Plan((full, *partial, *[partial[-1]] * 20)), site)
    assert [step.sites[0].computed(site[0]) for step in few.steps[1:11]] == [10, 21, 21, 40, 60, 92, 92, 120, 150, 200]
    assert few.steps[0] is full
    assert few.steps[11] is partial[-1]


def test_rows_that_do_different_things_are_never_joined(sites: tuple[Site, ...]) -> None:
    """Then there are more graphs."""
    forms = [Partial(update=update, tokens=n) for n in range(1, 13) for update in (True, False)]
    plan = Plan(tuple(StepPlan(StepKind.PARTIAL, (form,)) for form in forms))
    few = bucketed(plan, sites[:1])
    assert len({step.sites for step in few.steps}) == BUCKETS
    assert all(a.sites[0].form() == b.sites[0].form() for a, b in zip(plan.steps, few.steps, strict=True))
    assert replace(few, steps=plan.steps) == plan
