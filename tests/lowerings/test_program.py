"""Whole steps as one graph: whole runs are those of the segments, compiled as one graph that no step compiles anew."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import toca_compile
from tests.in_memory import POLICIES, STEPS
from tests.models import Halved, JointDiT, PlainDiT, Texted, diffusers_dit, randomize
from tests.pipelines import flux, pixart
from tests.runs import kinds, optimized
from tests.sampling import gaussian, noise, sample, sample_flux, sample_pixart
from tests.test_golden import sd3
from toca_compile import BlockCache, Fora, FullCompute, LoweringError, PolicyError, ToCa
from toca_compile.compiler.emit_step import COND, SWITCH
from toca_compile.ir.program import Variant
from toca_compile.lowerings import LOWERINGS
from toca_compile.policies import Anchors, Composition, Every, Polynomial, Rule

# Steps that skip in no regular order, so that a forecast grows from full steps that nobody planned.
BY_TESTS = [
    BlockCache(STEPS, threshold=0.35, order=2, basis="newton"),
    BlockCache(STEPS, threshold=0.35, order=2),
    BlockCache(STEPS, threshold=0.35, limit=1),
]

FEWER = [POLICIES[i] for i in (1, 3, 5, 8, 9)] + BY_TESTS[:1]


def sample_sd3(model: Any, steps: int) -> Tensor:
    x, text, pooled = gaussian(2, 4, 8, 8), gaussian(2, 5, 12, seed=1), gaussian(2, 12, seed=2)
    with torch.no_grad():
        for i in range(steps):
            t = torch.full((2,), 1000 - 1000 * i // steps)
            x = x - model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample / steps
    return x


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "dit": (lambda: diffusers_dit(2), lambda m: sample(lambda x, t, y: m(x, t, y).sample, STEPS, noise())),
    "pixart": (lambda: pixart(False, 2, sample=8, seed=2), lambda m: sample_pixart(m, STEPS, 1, (8, 8), False)),
    "flux": (lambda: flux(1, 1), lambda m: sample_flux(m, STEPS, 1, (4, 4))),
    "sd3": (sd3, lambda m: sample_sd3(m, STEPS)),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_runs_are_those_of_the_segments(name: str) -> None:
    """Bit by bit, in the first run and in the next; no write to a cache is lost, no number stands where another should.
    What is hoisted may be made for several timesteps at once, in another order of additions."""
    make, run = MODELS[name]
    opt = optimized(make(), FullCompute(), hoist=False)
    for policy in (*POLICIES, *BY_TESTS) if name == "dit" else FEWER:
        try:
            opt.policy = policy
        except PolicyError:
            assert not isinstance(policy, Fora | ToCa | BlockCache), policy  # this model cannot follow it
            continue
        opt.lowering = "eager"
        wanted, did, held = [run(opt), run(opt)], [(r.kind, r.k) for r in opt.steps], opt.cache_bytes
        opt.lowering = "program"
        assert [torch.equal(run(opt), x) for x in wanted] == [True, True], policy
        assert [(r.kind, r.k) for r in opt.steps] == did
        assert opt.cache_bytes == held


def test_steps_that_decide_by_themselves_decide_as_the_live_model() -> None:
    opt = optimized(randomize(PlainDiT(depth=2)), FullCompute())
    decided = set()
    for threshold in (0.2, 0.35, 0.5):
        for policy in BY_TESTS:
            opt.policy = BlockCache(
                STEPS, threshold=threshold, order=policy.order, basis=policy.basis, limit=policy.limit
            )
            opt.lowering = "eager"
            wanted, did = sample(opt, STEPS, noise(seed=3)), kinds(opt)
            opt.lowering = "program"
            assert torch.equal(sample(opt, STEPS, noise(seed=3)), wanted)
            assert kinds(opt) == did
            decided.add(did)
    assert len(decided) > 3


def test_passes_threads_and_samplings_that_are_given_up_have_caches_of_their_own() -> None:
    opt = optimized(randomize(PlainDiT(depth=2)), ToCa(STEPS, interval=4, fresh_ratio=0.3))

    def guided() -> list[Tensor]:
        made = []
        sample(opt, 3, noise(seed=8))
        opt.reset()
        with torch.no_grad():
            for i in range(STEPS):
                t = torch.full((2,), 900 - i)
                for name, seed in (("cond", 1), ("uncond", 2)):
                    with opt.cache_context(name):
                        made.append(opt(noise(seed=seed) + i, t, torch.arange(2)))
        return made

    wanted = guided()
    opt.lowering = "program"
    assert all(torch.equal(a, b) for a, b in zip(guided(), wanted, strict=True))


def test_a_run_that_goes_on_in_another_graph() -> None:
    """With the caches that it has, in the middle of the plan."""
    opt = optimized(randomize(PlainDiT(depth=2)), Fora(STEPS, 3))
    turned = []
    for lowering in ("eager", "program"):
        opt.lowering = lowering
        made = []
        for i in range(STEPS):
            x = noise(seed=i)
            x = x.contiguous(memory_format=torch.channels_last) if i > 3 else x
            with torch.no_grad(), opt.cache_context("default", step_index=i):
                made.append(opt(x, torch.full((2,), 900 - 100 * i), torch.arange(2)))
        turned.append((made, kinds(opt)))
    assert turned[0][1] == turned[1][1] == "frrfrrfr"
    assert all(torch.equal(a, b) for a, b in zip(turned[0][0], turned[1][0], strict=True))


def test_a_text_that_changes_within_a_run_is_seen() -> None:
    opt = optimized(randomize(Texted()), Fora(4, 2))
    made = []
    for lowering in ("eager", "program"):
        opt.lowering = lowering
        text = gaussian(2, 5, 8)
        for i in range(4):
            with torch.no_grad():
                made.append(opt(noise(seed=i), torch.full((2,), 900 - 100 * i), text))
            text *= 1.5
    for a, b in zip(made[:4], made[4:], strict=True):
        torch.testing.assert_close(a, b)


# -- compiled as one ----------------------------------------------------------------------------------------------------


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> list[CompileCounterWithBackend]:
    """A lowering for each of three backends, which count how often they are called."""
    made: list[CompileCounterWithBackend] = []

    def register(backend: str) -> None:
        def lower(variant: Variant, examples: Sequence[Any]) -> Callable[..., Sequence[Any]]:
            made.append(CompileCounterWithBackend(backend))
            compiled: Any = torch.compile(variant.module, backend=made[-1], fullgraph=True, dynamic=False)
            return compiled  # type: ignore[no-any-return]

        lower.whole = True  # type: ignore[attr-defined]
        monkeypatch.setitem(LOWERINGS, f"whole {backend}", lower)

    for backend in ("eager", "aot_eager", "inductor"):
        register(backend)
    return made


FEW = ToCa(STEPS, interval=4, fresh_ratio=0.07)  # one token in some steps, several in others


@pytest.mark.parametrize("policy", [FEW, POLICIES[7], POLICIES[12]], ids=lambda p: str(p)[:60])
def test_one_graph_without_a_break_that_no_step_compiles_anew(
    policy: Any, counters: list[CompileCounterWithBackend]
) -> None:
    opt = optimized(randomize(PlainDiT(depth=1)), policy)
    wanted = sample(opt, STEPS, noise())
    opt.lowering = "whole eager"
    assert torch.equal(sample(opt, STEPS, noise()), wanted)
    assert torch.equal(sample(opt, STEPS, noise()), wanted)
    assert [counter.frame_count for counter in counters] == [1]


def test_no_write_is_lost_where_the_graph_is_made_functional(counters: list[CompileCounterWithBackend]) -> None:
    opt = optimized(randomize(JointDiT(depth=1)), Fora(STEPS, 3))
    runs = []
    for lowering in ("eager", "whole aot_eager"):
        opt.lowering = lowering
        with torch.no_grad():
            runs.append([
                opt(gaussian(2, 16, 4, seed=i), torch.full((2,), 900 - i), gaussian(2, 3, 6)) for i in range(STEPS)
            ])  # fmt: skip
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)
    assert [counter.frame_count for counter in counters] == [1]


@pytest.mark.inductor
def test_inductor_compiles_it(counters: list[CompileCounterWithBackend]) -> None:
    policy = Composition(STEPS, Every(3), (Rule(do=Anchors(Polynomial())),))
    opt = optimized(randomize(PlainDiT(depth=1)), policy)
    wanted = [sample(opt, STEPS, noise(seed=seed)) for seed in range(2)]
    opt.lowering = "whole inductor"
    for seed in range(2):
        torch.testing.assert_close(sample(opt, STEPS, noise(seed=seed)), wanted[seed], rtol=1e-5, atol=1e-5)
    assert [counter.frame_count for counter in counters] == [1]


# -- what it cannot hold -----------------------------------------------------------------------------------------------


class InParts(PlainDiT):
    """Breaks between the stack of blocks and what follows."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.prepare(x, t, y)
        for block in self.blocks:
            x = block(x, c)
        torch._dynamo.graph_break()
        return self.finish(x, c)


def test_a_model_in_several_graphs_is_refused_and_goes_on_as_it_is() -> None:
    model = randomize(Halved(depth=2))
    opt = toca_compile.optimize(model, Fora(4, 2), lowering="program")
    with pytest.raises(LoweringError, match=r"'program' makes one graph of a step, and torch\.compile split it"):
        sample(opt, 4, noise())
    loose = toca_compile.optimize(model, Fora(4, 2), lowering="program", strict=False)
    assert torch.equal(sample(loose, 4, noise()), sample(model, 4, noise()))
    other = optimized(randomize(InParts(depth=2)), Fora(4, 2))
    made = sample(other, 4, noise())
    with pytest.raises(LoweringError):
        other.lowering = "program"
    assert other.lowering == "eager"
    assert torch.equal(sample(other, 4, noise()), made)


def test_it_prints_as_a_stage() -> None:
    opt = optimized(randomize(PlainDiT(depth=2)), ToCa(STEPS, interval=4, fresh_ratio=0.3))
    opt.lowering = "program"
    sample(opt, 2, noise())
    text = toca_compile.explain(opt).graphs()["program"]
    assert "// program: 8 steps of" in text
    assert "[reuse; partial" in text
    assert f" = {(SWITCH or COND).name()}(" in text
    assert text.count("copy_(cache") == text.count("// cache")
