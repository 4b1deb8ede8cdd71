"""ClusCa: equal to its literal form, to its dense meaning, and counted; what cannot be meant is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import JointDiT, PlainDiT, randomize
from tests.oracles.clusca import Branches, JointOracle, PlainOracle
from tests.programs import program_of
from tests.recording import counting_products
from tests.runs import both_ways
from tests.sampling import gaussian, noise, sample
from tests.shared import Traced
from toca_compile import ClusCa, Composition, PolicyError
from toca_compile.compiler.check_plan import check_plan
from toca_compile.ir.plan import Plan, StepPlan, step_kind
from toca_compile.lowerings import inductor
from toca_compile.policies import Clusters, Compute, Every, Partial, Queries, Reuse, Rule, Selector, Share

STEPS = 9
Call = Callable[[Any], torch.Tensor]


def plain(model: Any) -> torch.Tensor:
    return sample(model, STEPS, noise())


def joint(model: Any) -> torch.Tensor:
    """Words change from step to step, too."""
    x, text = gaussian(2, 12, 4, seed=1), gaussian(2, 6, 6, seed=2)
    with torch.no_grad():
        for i in range(STEPS):
            x = x - model(x, torch.full((2,), 900 - 100 * i), text * (1 + 0.05 * i)) / STEPS
    return x


MODELS: dict[str, tuple[Callable[[Traced], tuple[Any, Any]], type[Any], Call]] = {
    "plain": (lambda traced: traced(PlainDiT, depth=2), PlainOracle, plain),
    "joint": (lambda traced: traced(JointDiT), JointOracle, joint),
}


def chosen(opt: Any) -> dict[int, list[list[int]]]:
    """The tokens that the last step computed of each site that it computed in part."""
    sites = {site.name: site.index for site in toca_compile.explain(opt).program.sites}
    fresh = {sites[name]: mask for name, mask in opt.fresh_tokens().items() if mask.any() and not mask.all()}
    return {site: [row.nonzero().flatten().tolist() for row in mask] for site, mask in fresh.items()}


SETTINGS: list[dict[str, Any]] = [
    {"order": 1}, {"order": 2, "warmup": 1, "gamma": 0.5}, {"order": 0, "gamma": 0.3}, {"order": 1, "update": False},
    {"order": 0, "update": False, "gamma": 1.0, "seed": 5}, {"gamma": 0.0, "rounds": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_its_literal_form(traced: Traced, name: str) -> None:
    """The same tokens in every step, and the same picture."""
    make, oracle, call = MODELS[name]
    model, opt = make(traced)
    for settings in SETTINGS:
        opt.policy = ClusCa(STEPS, 4, 4, **{"gamma": 0.2, **settings})
        equal_to_its_literal_form(opt, oracle, model, call)


def equal_to_its_literal_form(opt: Any, oracle: type[Any], model: Any, call: Call) -> None:
    policy = opt.policy
    branches = Branches(
        4, 4, policy.gamma, order=policy.order, update=policy.update, warmup=policy.warmup, rounds=policy.rounds,
        seed=policy.seed,
    )  # fmt: skip
    literal, partial = oracle(model, branches), 0

    def both(*inputs: Any) -> torch.Tensor:
        nonlocal partial
        expected, ours = literal(*inputs), opt(*inputs)
        bound = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=bound, msg=lambda text: f"{policy}: {text}")
        if branches.chosen and branches.call < STEPS:  # the last step frees what is kept
            assert chosen(opt) == {site: index.tolist() for site, index in branches.chosen.items()}
            partial += 1
        return expected

    call(both)
    assert partial >= 4


def test_gamma_and_clusters_matter(traced: Traced) -> None:
    runs, (_, opt) = [], traced(PlainDiT, depth=2)
    for policy in (ClusCa(STEPS, 4, 4), ClusCa(STEPS, 4, 4, 0.5), ClusCa(STEPS, 4, 8)):
        opt.policy = policy
        runs.append(plain(opt))
    assert all(not torch.allclose(runs[0], other, rtol=1e-3, atol=1e-3) for other in runs[1:])


BY_ROWS: dict[str, Any] = {
    "partial": ClusCa(STEPS, 4, 4, 0.3),
    "no forecast": ClusCa(STEPS, 4, 4, 0.3, order=0),
    "queries": Composition(STEPS, Every(3), (Rule(Queries("update", order=1)),), which=Clusters(4, 0.3)),
    "queries alone": Composition(
        STEPS, Every(3), (Rule(Queries("fresh", order=1, update=False)),), which=Clusters(4, 0.3)
    ),
    "bfloat16": ClusCa(STEPS, 4, 4, 0.3, cache_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_their_dense_meaning(traced: Traced, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a run, and each variant on random values."""
    monkeypatch.setenv("TOCA_VERIFY", "all")
    make, _, call = MODELS[name]
    _, opt = make(traced)
    for what, policy in BY_ROWS.items():
        opt.policy = policy
        runs = both_ways(opt, call)
        assert "P" in toca_compile.explain(opt).schedule
        assert not runs[0].isnan().any()
        torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-3, msg=lambda text, what=what: f"{what}: {text}")


def test_without_a_share_nothing_changes_where_nothing_changes(traced: Traced) -> None:
    """At inputs that stay, what is kept is what would be computed."""
    model, opt = traced(PlainDiT, depth=2)
    opt.policy = ClusCa(4, 4, 4, 0.0, warmup=1)
    x, t, y = noise(), torch.full((2,), 500), torch.arange(2)
    with torch.no_grad():
        expected = model(x, t, y)
        for _ in range(4):
            torch.testing.assert_close(opt(x, t, y), expected, rtol=1e-4, atol=1e-4)
    assert [r.kind for r in opt.steps] == ["full", "partial", "partial", "partial"]


def test_its_products_are_counted_as_torch_counts_them(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the clusters too, on the graphs of a whole run as they run. (Fused attention is not, on a CPU.)"""
    counted = counting_products(monkeypatch)
    (_, opt), x, t, y = traced(PlainDiT, depth=2), noise(), torch.full((2,), 500), torch.arange(2)
    opt.lowering, counts = "counting", []
    for policy in (ClusCa(4, 2, 4, warmup=1), Composition(4, Every(2))):
        counted.clear()
        opt.policy = policy
        with torch.no_grad():
            for i in range(4):
                opt(x, t - 100 * i, y)
        counts.append((toca_compile.explain(opt).run_flops("torch"), sum(counted)))
    (ours, torchs), (reused, of_reuse) = counts
    assert ours - reused == torchs - of_reuse > 0
    # Four sites that are token-wise or not: the two MLPs in the two full steps, five rounds of 4 clusters of 2·16 tokens.
    assert Clusters(4).products(toca_compile.explain(opt).program.sites[1]) == 2 * (2 * 16 * 16) * 4 * 9


def test_short_axes_are_computed_and_others_in_part(traced: Traced) -> None:
    """Six words are no more than six clusters: between full steps they are all computed."""
    _, opt = traced(JointDiT)
    opt.policy = ClusCa(STEPS, 4, 6)
    joint(opt)
    assert opt.steps[3].kind == "partial"
    assert opt.steps[3].k["blocks.0.mlps.0"] == 6
    assert opt.steps[3].k["blocks.0.mlps.1"] == 6


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: ClusCa(50, 0), "interval"), (lambda: ClusCa(clusters=1), "clusters .* from 2"), (lambda: ClusCa(gamma=1.5), "gamma"),
        (lambda: Clusters(4, -0.1), "gamma"), (lambda: ClusCa(rounds=0), "rounds"), (lambda: Clusters(2.5), "clusters"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(make: Any, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        make()


class Given:
    """A plan by hand: all, then some tokens of the MLPs."""

    def __init__(self, selector: Any, tokens: int) -> None:
        self.selector, self.tokens = selector, tokens

    def plan(self, sites: Any) -> Plan:
        full: Any = tuple(Compute() for _ in sites)
        some: Any = tuple(Partial(tokens=self.tokens) if s.row_proof else Reuse() for s in sites)
        return Plan(tuple(StepPlan(step_kind(row), row) for row in (full, some)), self.selector)


def test_what_the_sites_cannot_follow_is_refused() -> None:
    program = program_of(randomize(PlainDiT(depth=1)), noise(), torch.full((2,), 500), torch.arange(2))
    told: list[str] = []
    for policy, why in (
        (ClusCa(8, 4, 16), "clusters=16 would be all tokens: .* have 16 at most"),
        (replace(ClusCa(8, 4, 4).composition(), how_many=Share(0.5)), "Clusters says itself how many"),
        (Given(Clusters(16), 4), r"blocks\.0\.mlp has 16 tokens, which 16 clusters"),
    ):
        with pytest.raises(PolicyError, match=why):
            check_plan(policy, program, told.append)
    for good in (ClusCa(8, 4, 15), Given(Clusters(15), 4), Given(Selector("none"), 16)):
        check_plan(good, program, told.append)
    assert not told


@pytest.mark.inductor
def test_through_inductor() -> None:
    """One variant for all steps, whatever is drawn in them."""
    model = randomize(PlainDiT(depth=2))
    policy = ClusCa(STEPS, 4, 4, 0.2)
    eager = plain(toca_compile.optimize(model, policy, lowering="eager"))
    opt = toca_compile.optimize(model, policy)
    torch.testing.assert_close(plain(opt), eager, rtol=1e-3, atol=1e-3)
    before = inductor.compiles
    plain(opt)
    assert inductor.compiles == before
