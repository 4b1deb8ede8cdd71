"""Plans that lie: a policy may be the user's own code, and what it plans is followed only where every site can do it."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import toca_compile
from tests.models import PlainBlock, PlainDiT, randomize
from tests.sampling import noise, sample
from toca_compile import BlockCache, Fora, FullCompute, PolicyError, TaylorSeer, TaylorToCa
from toca_compile.ir.actions import Action, Compute, Forecast, Partial, Queries, Reuse, SkipBlocks
from toca_compile.ir.history import CacheSpec
from toca_compile.ir.plan import Plan, Skip, StepPlan, step_kind
from toca_compile.ir.selectors import Selector
from toca_compile.ir.types import StepKind

N = 16  # tokens of the model, whose sites are an attention and an MLP
FULL, REUSED = Compute(), Reuse()
PARTIAL, QUERIES = Partial(tokens=4), Queries(tokens=4)
SKIPPED, NONE = SkipBlocks(), Selector("none")


def altered(action: Any, **fields: Any) -> Any:
    """An action with fields that its class refuses: a plan may have been unpickled, or written to."""
    other = copy.copy(action)
    for name, value in fields.items():
        object.__setattr__(other, name, value)
    return other


def step(*sites: Any) -> StepPlan:
    return StepPlan(step_kind(sites), sites)


def plan(*steps: Any, **fields: Any) -> Plan:
    return Plan(steps, fields.pop("selector", NONE), **fields)


def full(order: int = 0) -> StepPlan:
    return step(altered(FULL, order=order), altered(FULL, order=order))


def second(attention: Any, mlp: Any = REUSED, kind: Any = StepKind.PARTIAL) -> Plan:
    """A full step, and one that does this."""
    return plan(full(), StepPlan(kind, (attention, mlp)))


def mlp(**fields: Any) -> Plan:
    return second(REUSED, altered(PARTIAL, **fields))


def forecast(order: int) -> Action:
    made: Action = altered(Forecast(), order=order)
    return made


def queries(**fields: Any) -> Plan:
    return second(altered(QUERIES, **fields))


class Lying:
    """A policy whose plan is what it is told."""

    def __init__(self, made: Callable[[], Any]) -> None:
        self.made = made

    def plan(self, sites: Any) -> Any:
        assert [s.axis.size for s in sites] == [N, N]
        return self.made()


class Broken:
    def plan(self, sites: Any) -> Any:
        return sites[7]


class OtherSignature:
    def plan(self) -> Any:
        return plan(full())


class Slice:
    """What has fields as an action has is none."""

    kind, dense, tokens, order, keys, update = StepKind.FULL, True, N, 0, "fresh", True


# What is planned, and what the error has to say of it: step, site and value, where there are such.
MLP, ATTENTION = r"step 1: blocks\.0\.mlp", r"step 1: blocks\.0(\.\w+)?"
LIES: list[tuple[Any, str]] = [
    # No plan at all.
    (lambda: None, "must return a toca_compile.ir.plan.Plan .*not None"), (lambda: [full()], "must return .*not \\["), (lambda: Plan(3), "one with steps 3"),
    (lambda: plan(), "plans no step"), (lambda: plan(*[full()] * 3, None), "step 3 of the plan must be a StepPlan .*not None"), (lambda: Plan("FR"), "steps 'FR'"),
    (lambda: Plan((full(),) * 10**7), "at most 10000 steps, not 10000000: with endless=True"), (lambda: plan((FULL, FULL)), "step 0 of the plan must be a StepPlan"),
    (lambda: plan(full(), step(REUSED)), "step 1 of the plan names 1 sites; the model has 2"), (lambda: plan(StepPlan(StepKind.FULL, None)), "step 0 .*StepPlan"),
    (lambda: second(REUSED, None), f"{MLP} must be an Action, not None"), (lambda: second(REUSED, Slice()), f"{MLP} must be an Action"),
    # Kinds of steps.
    (lambda: second(REUSED, REUSED), "step 1 says partial, and what its sites do makes it reuse"), (lambda: second(REUSED, REUSED, "reuse"), "step 1: kind must be a StepKind, not 'reuse'"),
    (lambda: second(FULL, FULL, StepKind.REUSE), "step 1 says reuse, .*full"),
    # Actions.
    (lambda: second(REUSED, "compute"), rf"{MLP} must be an Action, not 'compute'"), (lambda: second(PARTIAL), f"{ATTENTION} cannot be partial: .*scaled_dot_product"),
    (lambda: second(REUSED, QUERIES), f"{MLP} cannot be queries"), (lambda: plan(step(FULL, REUSED), full()), r"step 0: blocks\.0\.mlp would read a cache that no earlier step"),
    (lambda: plan(step(FULL, PARTIAL), full()), "step 0: .*would read a cache"), (lambda: plan(step(SKIPPED, SKIPPED), full()), "step 0: .*would read a cache"),
    # Tokens.
    *((lambda k=k: mlp(tokens=k), rf"{MLP} has 16 tokens, not {k} to compute") for k in (0, 17)), *((lambda k=k: queries(tokens=k), f"{ATTENTION} has 16 tokens, not {k} to compute") for k in (0, 17)),
    *((lambda k=k: mlp(tokens=k), rf"{MLP}\.tokens must be a whole number .*not {shown}") for k, shown in ((-1, "-1"), (2.5, r"2\.5"), (4.0, r"4\.0"), (True, "True"), ("4", "'4'"),
       (None, "None"), ([4], r"\[4\]"), (torch.tensor(4), r"tensor\(4\)"))),
    (lambda: queries(tokens=torch.tensor(4)), rf"{ATTENTION}\.tokens .*not tensor"),
    # The same value once well and once ill: what is equal is not yet the same.
    (lambda: plan(full(), step(REUSED, altered(PARTIAL, tokens=1)), step(REUSED, altered(PARTIAL, tokens=True))), r"step 2: .*tokens .*not True"),
    # Orders.
    (lambda: second(forecast(-1)), rf"{ATTENTION}\.order must be a whole number from 0 to 4, not -1"), (lambda: second(forecast(5)), r"order .*not 5"), (lambda: second(forecast(1.0)), r"order .*not 1\.0"),
    (lambda: second(forecast(1), REUSED, StepKind.FORECAST), f"{ATTENTION} has 0 differences there, not order 1"), (lambda: mlp(order=2), f"{MLP} has 0 differences there, not order 2"),
    (lambda: queries(order=1), f"{ATTENTION} has 0 differences"), (lambda: plan(full(1)), r"step 0: .*can make 0 differences .*not order 1"), (lambda: plan(full(), full(2)), r"step 1: .*can make 1 differences .*not order 2"),
    (lambda: plan(full(), full(1), full(0), step(forecast(1), REUSED)), "step 3: .*has 0 differences"), (lambda: plan(full(), full(1), step(forecast(2), REUSED)), "step 2: .*has 1 differences there, not order 2"),
    # Keys, and whether values are kept.
    (lambda: queries(keys="stale"), rf"{ATTENTION}\.keys must be one of fresh, update, keep, not 'stale'"), (lambda: queries(keys=None), r"keys .*not None"), (lambda: queries(update="no"), r"update must be True or False, not 'no'"),
    *((lambda k=k: plan(step(altered(QUERIES, keys=k), FULL)), "step 0: .*would read a cache") for k in ("keep", "update")),
    # Selectors, memories, skips.
    (lambda: plan(full(), selector=Selector("loud")), "score must be one of .*not 'loud'"), (lambda: plan(full(), selector=Selector(stride=-2)), "stride .*not -2"),
    (lambda: plan(full(), selector=Selector(cell=0)), "cell .*not 0"), (lambda: plan(full(), selector="error"), r"plan\.selector must be one of Selector, Clusters, not 'error'"),
    (lambda: plan(full(), memory=CacheSpec(dtype=torch.int8)), r"plan\.memory\.dtype .*not torch\.int8"), (lambda: plan(full(), memory=CacheSpec(dtype="bfloat16")), r"plan\.memory\.dtype .*not 'bfloat16'"),
    (lambda: plan(full(), memory=CacheSpec(dtype=torch.float8_e8m0fnu)), r"plan\.memory\.dtype .*both signs"), (lambda: plan(full(), memory=CacheSpec(basis="fourier")), r"plan\.memory\.basis .*not 'fourier'"),
    (lambda: plan(full(), memory=None), r"plan\.memory must be a CacheSpec, not None"), (lambda: plan(full(), skip=Skip(threshold=float("nan"))), r"plan\.skip\.threshold .*not nan"),
    (lambda: plan(full(), skip=Skip(limit=0)), r"plan\.skip\.limit .*not 0"), (lambda: plan(full(), skip=Skip(limit=2)), r"plan\.skip\.limit goes with a threshold"),
    (lambda: plan(full(), skip=Skip(memory=CacheSpec(order=9))), r"plan\.skip\.memory\.order .*not 9"), (lambda: plan(full(), endless=1), r"plan\.endless must be True or False, not 1"),
    # What relates several steps.
    (lambda: plan(full(), full(1), step(REUSED, altered(PARTIAL, order=1)), memory=CacheSpec(basis="newton")), r"blocks\.0\.mlp keeps tokens one by one, .*taylor"),
    *((lambda s=s: plan(full(), full(1), step(REUSED, s), endless=True), rf"blocks\.0\.mlp is {s.word} in the last step of an endless plan") for s in (PARTIAL, forecast(1))),
]  # fmt: skip


def model() -> Any:
    return randomize(PlainDiT((8, 8), width=8, depth=1))


def call(net: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = net(noise(1), torch.full((1,), 500), torch.arange(1))
    return out


@pytest.fixture(scope="module")
def called() -> Any:
    """The model after a step in which nothing is cached: a plan is checked against its graph, and none is traced."""
    opt = toca_compile.optimize(model(), FullCompute(), lowering="eager")
    call(opt)
    return opt


@pytest.mark.parametrize(("made", "why"), LIES, ids=range(len(LIES)))
def test_a_plan_that_lies_is_refused(called: Any, made: Callable[[], Any], why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        called.policy = Lying(made)
    assert called.policy == FullCompute()


@pytest.mark.parametrize(("made", "why"), LIES[::8], ids=range(0, len(LIES), 8))
def test_a_plan_that_lies_is_refused_before_its_first_step(made: Callable[[], Any], why: str) -> None:
    net = model()
    opt = toca_compile.optimize(net, Lying(made), lowering="eager")
    with pytest.raises(PolicyError, match=why):
        call(opt)
    assert call(net).shape == (1, 2, 8, 8)


@pytest.mark.parametrize(
    ("policy", "why"),
    [(Broken(), "Broken.plan failed: IndexError"), (OtherSignature(), "OtherSignature.plan failed: TypeError")],
)
def test_a_policy_that_fails_is_named(policy: Any, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        call(toca_compile.optimize(model(), policy, lowering="eager"))


@pytest.mark.parametrize(
    "made", [lambda: mlp(tokens=17), lambda: None, lambda: plan(full(1))], ids=["tokens", "none", "order"]
)
def test_not_strict_warns_once_and_runs_uncached(made: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    opt = toca_compile.optimize(net, Lying(made), lowering="eager", strict=False)
    for _ in range(3):
        assert torch.equal(call(opt), call(net))
    said = [r.message for r in caplog.records if r.name.startswith("toca_compile")]
    assert len(said) == 1
    assert "runs uncached" in said[0]


def test_another_policy_that_lies_leaves_the_one_in_force() -> None:
    opt = toca_compile.optimize(model(), Fora(4, 2), lowering="eager")
    expected = sample(opt, 4, noise(1))
    with pytest.raises(PolicyError, match="17"):
        opt.policy = Lying(lambda: mlp(tokens=17))
    assert opt.policy == Fora(4, 2)
    assert torch.equal(sample(opt, 4, noise(1)), expected)


HONEST: list[tuple[Any, str]] = [
    (lambda: plan(full(), step(QUERIES, PARTIAL)), "FP"), (lambda: plan(full(), full(1), step(forecast(1), altered(PARTIAL, order=1, update=False))), "FFP"),
    (lambda: Plan([full(), step(REUSED, REUSED)], endless=True), "FR"), (lambda: plan(full(), step(SKIPPED, SKIPPED)), "FS"),
    (lambda: plan(full(), step(altered(QUERIES, keys="keep"), FULL), step(altered(QUERIES, keys="update"), REUSED)), "FPP"),
    (lambda: plan(step(FULL, FULL), step(forecast(0), FULL)), "FP"),
]  # fmt: skip


@pytest.mark.parametrize(("made", "schedule"), HONEST, ids=range(len(HONEST)))
def test_an_honest_plan_of_the_users_own_is_followed(made: Callable[[], Any], schedule: str) -> None:
    opt = toca_compile.optimize(model(), Lying(made), lowering="eager")
    assert sample(opt, len(schedule), noise(1)).isfinite().all()
    assert toca_compile.explain(opt).schedule == schedule
    opt.policy = Lying(lambda: second(REUSED, altered(PARTIAL, tokens=numpy.int64(4))))
    sample(opt, 2, noise(1))
    assert {type(k) for record in opt.steps for k in record.k.values()} == {int}


class MixedKeys(PlainBlock):
    """Keys and values are made of all tokens up to theirs."""

    def attention(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        shape = (b, n, self.heads, c // self.heads)
        q = self.qkv(x)[..., :c].reshape(shape).transpose(1, 2)
        k, v = (self.qkv(x.cumsum(1))[..., i * c : (i + 1) * c].reshape(shape).transpose(1, 2) for i in (1, 2))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.proj(out)


def test_keys_that_a_mixer_makes_cannot_be_updated_for_some_tokens() -> None:
    net = PlainDiT((8, 8), width=8, depth=1)
    net.blocks[0] = MixedKeys(8, 2)
    opt = toca_compile.optimize(randomize(net), Lying(lambda: queries(keys="keep")), lowering="eager")
    sample(opt, 2, noise(1))
    with pytest.raises(PolicyError, match=f"{ATTENTION} cannot update its keys: .*keep"):
        opt.policy = Lying(lambda: queries(keys="update"))


def test_a_long_plan_is_laid_out_in_a_time_that_its_steps_are_in_proportion_to() -> None:
    """Not in proportion to their square: each step once asked all others what a site keeps."""
    opt = toca_compile.optimize(model(), Fora(4, 2), lowering="eager")
    sample(opt, 1, noise(1))

    def seconds(steps: int) -> float:
        taken = []
        for more in range(3):  # the least: a collection of garbage belongs to neither
            start = time.process_time()
            opt.policy = Fora(steps + more, 2)
            taken.append(time.process_time() - start)
        return min(taken)

    seconds(100)
    assert seconds(4000) < 40 * seconds(400)


# -- what a cache's dtype loses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "loss"),
    [("float8_e4m3fn", "2.7%"), ("float8_e5m2", "5.4%"), ("bfloat16", None), ("float16", None), (None, None)],
)
@pytest.mark.parametrize("policy", [TaylorSeer(4, 2, 1), BlockCache(4, 0, interval=2)], ids=["sites", "blocks"])
def test_a_coarse_cache_says_once_what_it_loses(
    policy: Any, dtype: str | None, loss: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """And it does lose that: of a constant input, the reused output is off by as much."""
    opt = toca_compile.optimize(model(), replace(policy, cache_dtype=dtype), lowering="eager")
    for _ in range(2):
        assert sample(opt, 4, noise(1)).isfinite().all()
    opt.policy = replace(policy, cache_dtype=dtype, num_steps=6)
    said = [r.message for r in caplog.records if "lose" in r.message]
    assert len(said) == (loss is not None)
    assert all(f"torch.{dtype} lose {loss}" in message and "bfloat16" in message for message in said)


def test_a_dtype_that_torch_cannot_use_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toca_compile.compiler.check_plan.unusable", lambda dtype, device: "it has no such numbers")
    net = model()
    opt = toca_compile.optimize(net, TaylorToCa(4, 2, 0, 0.3, cache_dtype="float8_e5m2"), lowering="eager")
    with pytest.raises(PolicyError, match=r"cache_dtype: torch cannot keep torch\.float8_e5m2 on cpu .*bfloat16"):
        call(opt)
    assert call(net).isfinite().all()


def test_a_cache_that_nothing_reads_may_be_as_coarse_as_it_likes(caplog: pytest.LogCaptureFixture) -> None:
    opt = toca_compile.optimize(model(), TaylorSeer(3, 1, cache_dtype="float8_e5m2"), lowering="eager")
    sample(opt, 3, noise(1))
    assert not [r for r in caplog.records if "lose" in r.message]
