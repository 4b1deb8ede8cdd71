"""The known defects of the published ToCa code, each with the test that it is not here.

Numbers in the names are those of the list that the project keeps of them: 1 per-layer decisions, 2 literal depths,
3 square grids, 4 whole attention maps, 5 text packed over the batch, 6 maps that nobody reads, 7 dead caches, 8 weights
made anew, 9 FORA without attention, 10 syncs and graph breaks, 11 work for no token, 12 gathers of all tokens, 13 and 14
updates lost, 15 conditions in video, 16 samplers, 17 no uncached path, 18 options that crash, 19 the clock, 20 guidance
passes, 21 uncounted work.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import toca_compile
from examples.opensora.sampler import sample as sample_video
from examples.opensora.stdit3 import STDiT3
from tests.models import FusedFlux, PlainDiT, diffusers_dit, randomize
from tests.oracles.flux import FluxOracle
from tests.pipelines import flux, pixart
from tests.sampling import gaussian, noise, sample, sample_flux, sample_pixart
from tests.shared import Traced
from toca_compile import Fora, FullCompute, ToCa, preset
from toca_compile.ir.plan import Plan
from toca_compile.ir.scores import SCORES
from toca_compile.ir.state import State
from toca_compile.ir.types import Site, StepKind
from toca_compile.ops import scores
from toca_compile.runtime.executor import Executor

pytest.importorskip("diffusers")


def after_pixart(traced: Traced, policy: Any, steps: int = 8, depth: int = 2) -> Any:
    """A PixArt after some steps under a policy."""
    _, opt = traced(pixart, depth=depth)
    opt.policy = policy
    sample_pixart(opt, steps, 1, (8, 8), False)
    return opt


def after_flux(traced: Traced, policy: Any, steps: int = 8, double: int = 2, single: int = 2, make: Any = flux) -> Any:
    """A FLUX after some steps under a policy."""
    _, opt = traced(make, double=double, single=single)
    opt.policy = policy
    sample_flux(opt, steps, 1, (6, 6))
    return opt


def fused_flux(double: int, single: int) -> FusedFlux:
    return FusedFlux(flux(double, single)).eval()


def video(depth: int = 1) -> STDiT3:
    model = randomize(STDiT3(width=24, heads=2, depth=depth, caption_channels=8, in_channels=2))
    assert isinstance(model, STDiT3)
    return model


@pytest.mark.parametrize("name", ["dit-xl-2/ddim-50", "dit-xl-2/ddpm-250", "pixart-alpha/dpm-20", "flux-dev/50-n5"])
def test_1_every_layer_is_of_one_mind(traced: Traced, name: str) -> None:
    """At the steps where the published interval changes under way (DDIM 45 and 32) no layer is full alone."""
    _, opt = traced(PlainDiT, depth=4)
    opt.policy = preset(name)
    sample(opt, 1, noise())
    plan = toca_compile.explain(opt).plan
    for step in plan.steps:
        attention = [a.kind for a in step.sites[::2]]
        assert len(set(attention)) == 1


def test_2_depth_is_the_models_own(traced: Traced) -> None:
    """At the last of 50 layers FLUX's factor is ½ of the middle's, not negative."""
    policy = preset("flux-dev/50-n4", num_steps=5, fresh_ratio=0.5)
    report = toca_compile.explain(after_flux(traced, policy, 1))

    def tokens(plan: Plan, sites: Sequence[Site]) -> list[int]:
        return [a.computed(s) for a, s in zip(plan.steps[3].sites, sites, strict=True) if s.kind == "parallel"]

    singles = [site for site in report.program.sites if site.kind == "parallel"]
    assert [(site.depth, site.depths) for site in singles] == [(0, 2), (1, 2)]
    assert tokens(report.plan, report.program.sites) == [42, 16]
    deep = tuple(replace(singles[0], index=i, block=i, depth=i, depths=50) for i in range(50))
    ks = tokens(policy.plan(deep), deep)
    assert (ks[0], ks[-1]) == (42, 16)  # 0.5·1.6·(1.5, 0.5) of 42 tokens: more than all, and 0.4
    assert min(ks) > 0


def test_3_any_grid() -> None:
    opt = toca_compile.optimize(randomize(PlainDiT((6, 14))), preset("dit-xl-2/ddim-50", cell=4), lowering="eager")
    sample(opt, 50, noise(size=(6, 14)))
    assert toca_compile.explain(opt).program.sites[1].axis.grid == (3, 7)


def test_4_no_map_is_made_or_kept(traced: Traced) -> None:
    """While the rows' entropies are measured no value of n × text elements a head is alive, and none is cached."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    q, k = torch.randn(1, 1, 4096, 4), torch.randn(1, 1, 300, 4)
    with Largest() as seen:
        scores.attention_entropy(q, k, None, None, False, 1e-7)
    assert seen.size <= 4096 * 300 // 16
    wide = toca_compile.optimize(pixart(), preset("pixart-alpha/dpm-20"), lowering="eager")
    sample_pixart(wide, 8, 1, (8, 12), False)
    for opt, n in ((wide, 24), (after_flux(traced, preset("flux-dev/50-n4")), 42)):
        buffers = toca_compile.explain(opt).buffers
        assert buffers
        for name, buffer in buffers.items():
            assert buffer.dim() == 2 if name[-3] in (State.SCORE, State.STAMP) else buffer.shape[-2:] != (n, n)


def test_5_text_is_not_packed_over_the_batch() -> None:
    """Cost and scores of cross-attention are those of each sample: linear in the batch."""
    flops = []
    for pictures in (1, 2, 4):
        opt = toca_compile.optimize(pixart(depth=1), FullCompute(), lowering="eager")
        sample_pixart(opt, 1, pictures, (8, 8), False)
        flops.append(toca_compile.explain(opt).flops("full"))
    assert flops[1] == 2 * flops[0]
    assert flops[2] == 4 * flops[0]


def test_6_only_what_is_read_is_scored(traced: Traced) -> None:
    opt = after_pixart(traced, preset("pixart-alpha/dpm-20"))
    scored = {name[-2] for name in toca_compile.explain(opt).buffers if name[-3] is State.SCORE}
    kinds = {toca_compile.explain(opt).program.sites[i].kind for i in scored}
    assert kinds == {"cross_attention"}


def test_7_no_dead_cache(traced: Traced) -> None:
    """One output a site, and of single blocks the attention, only where a partial step reads it."""
    opt = after_flux(traced, FullCompute(), 1)
    for policy, held in ((preset("flux-dev/50-n4"), 2), (Fora(50, 3), 0)):
        opt.policy = policy
        sample_flux(opt, 8, 1, (6, 6))
        buffers = toca_compile.explain(opt).buffers
        assert {name[0] for name in buffers} == {0}  # one run
        kinds = [name[-3] for name in buffers]
        assert (kinds.count(State.OUTPUT), kinds.count(State.STALE_INPUT)) == (2 * 4 + 2, held)


def test_8_weights_are_the_models_own(traced: Traced) -> None:
    """Single blocks of the fused layout slice the weight they have: no parameter is made, nothing is traced again."""
    model, _ = traced(fused_flux, double=2, single=2)
    before = {id(p) for p in model.parameters()}
    opt = after_flux(traced, preset("flux-dev/50-n4"), make=fused_flux)
    assert {id(p) for p in model.parameters()} == before
    assert len(toca_compile.explain(opt).plans) == 1
    text = "\n".join(toca_compile.explain(opt).graphs().values())
    assert "slice.Tensor(in" in text


def test_9_fora_keeps_the_attention_of_flux(traced: Traced) -> None:
    model, opt = traced(flux, double=2, single=2)
    opt.policy = preset("flux-dev/50-n4", fresh_ratio=0.0)
    actual = sample_flux(opt, 9, 1, (6, 6))

    class ForaOracle(FluxOracle):
        """As the published FORA: one first full step."""

        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.call = self.call or 0
            if self.call == 1:
                self.call = 3
            return super().__call__(*args, **kwargs)

    expected = sample_flux(ForaOracle(model, 4, 0.0), 9, 1, (6, 6))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert [r.index for r in opt.steps if r.kind == "full"] == [0, 4, 8]


class Reads(TorchDispatchMode):
    """Counts the reads of a device value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


# What makes each system, by which settings, and a sampling of it.
SYSTEMS: dict[str, tuple[Callable[..., Any], dict[str, int], Callable[[Any], torch.Tensor]]] = {
    "pixart": (pixart, {"depth": 2}, lambda m: sample_pixart(m, 8, 1, (8, 8), False)),
    "flux": (flux, {"double": 2, "single": 2}, lambda m: sample_flux(m, 8, 1, (6, 6))),
    "fused flux": (fused_flux, {"double": 2, "single": 2}, lambda m: sample_flux(m, 8, 1, (6, 6))),
    "opensora": (
        video, {}, lambda m: sample_video(m, gaussian(1, 2, 3, 4, 4), gaussian(1, 5, 8), gaussian(1, 5, 8), steps=8)
    ),
}  # fmt: skip
POLICIES = {
    "pixart": "pixart-alpha/dpm-20", "flux": "flux-dev/50-n4", "fused flux": "flux-dev/50-n4",
    "opensora": "opensora-1.2/rflow-30",
}  # fmt: skip


@pytest.mark.parametrize("name", list(POLICIES))
def test_10_one_graph_and_no_read_in_the_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph, one trace for a run, and no value is read to decide anything."""
    make, given, run = SYSTEMS[name]
    model = make(**given)
    options = {"policy": preset(POLICIES[name], num_steps=8), "lowering": "eager"}
    compiled = torch.compile(model, backend="toca", options=options, fullgraph=True)
    run(compiled)
    torch._dynamo.config.error_on_recompile = True
    try:
        reads, steps, execute = Reads(), [], Executor._execute

        def watched(*args: Any) -> Any:
            steps.append(1)
            with reads:
                return execute(*args)

        monkeypatch.setattr(Executor, "_execute", watched)
        run(compiled)
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert (reads.count, len(steps)) == (0, 8)
    assert len(toca_compile.explain(compiled).plans) == 1


def test_11_nothing_is_done_for_no_token() -> None:
    """OpenSora's cross-attention selects nothing: between its full steps it is the cache, and nothing else."""
    opt = toca_compile.optimize(video(2), preset("opensora-1.2/rflow-30"), lowering="eager")
    sample_video(opt, gaussian(1, 2, 3, 4, 4), gaussian(1, 5, 8), gaussian(1, 5, 8), steps=29)
    program, plan = toca_compile.explain(opt).program, toca_compile.explain(opt).plan
    cross = [s.index for s in program.sites if s.kind == "cross_attention"]
    assert {step.sites[i].word for step in plan.steps for i in cross} == {"compute", "reuse"}
    stamps = {name[-2] for name in toca_compile.explain(opt).buffers if name[-3] is State.STAMP}
    assert stamps
    assert not stamps & set(cross)
    text = "\n".join(t for n, t in toca_compile.explain(opt).graphs().items() if "reuse; reuse; partial" in n)
    assert text.count("toca.select_tokens(") == text.count("toca.scatter_tokens_(") == 2  # the two MLPs of a block


def test_11_selection_is_a_function_of_its_inputs() -> None:
    opts = [toca_compile.optimize(flux(1, 1), preset("flux-dev/50-n4"), lowering="eager") for _ in range(2)]
    for opt in opts:
        sample_flux(opt, 8, 1, (6, 6))
    first, second = (opt.fresh_tokens() for opt in opts)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_12_all_tokens_are_computed_densely(traced: Traced) -> None:
    """PixArt's early layers clamp to every token: no gather, no scatter."""
    opt = after_pixart(traced, preset("pixart-alpha/dpm-20"), 20, depth=3)
    program, plan = toca_compile.explain(opt).program, toca_compile.explain(opt).plan
    mlp = next(s.index for s in program.sites if s.kind == "mlp")
    assert plan.steps[1].sites[mlp].dense
    assert plan.steps[1].kind == "partial"
    for step in plan.steps:
        assert all(
            s.computed(site) < site.axis.size
            for s, site in zip(step.sites, program.sites, strict=True)
            if s.kind is StepKind.PARTIAL
        )


def test_13_samples_of_a_batch_do_not_touch(traced: Traced) -> None:
    """Two FLUX pictures in one batch are as each alone."""
    _, opt = traced(flux, double=1, single=1)
    opt.policy = preset("flux-dev/50-n4", num_steps=8)
    together = sample_flux(opt, 8, 2, (6, 6))

    def alone(**call: Any) -> Any:
        batched = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
        parts = []
        for i in range(2):
            with opt.cache_context(f"picture {i}"):
                own = {k: v[i : i + 1].contiguous() if k in batched else v for k, v in call.items()}
                parts.append(opt(**own).sample)
        return torch.cat(parts)

    torch.testing.assert_close(together, sample_flux(alone, 8, 2, (6, 6)), rtol=1e-4, atol=1e-5)


def test_16_any_sampler_and_no_guidance() -> None:
    """The step counter is ours, so timesteps may run either way; without guidance a batch of one is no pair."""
    model = pixart()
    opt = toca_compile.optimize(model, preset("pixart-alpha/dpm-20", num_steps=6), lowering="eager")
    more: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    for times in (range(0, 600, 100), range(600, 0, -100)):
        opt.reset()
        with torch.no_grad():
            for t in times:
                opt(
                    gaussian(1, 4, 8, 8), encoder_hidden_states=gaussian(1, 5, 12), timestep=torch.tensor([t]),
                    encoder_attention_mask=torch.ones(1, 5), added_cond_kwargs=more,
                )  # fmt: skip
        assert [r.kind.value[0] for r in opt.steps] == list("fppppp")


def test_17_there_is_an_uncached_path(traced: Traced) -> None:
    model, opt = traced(flux, double=2, single=2)
    assert torch.equal(sample_flux(opt, 3, 1, (6, 6)), sample_flux(model, 3, 1, (6, 6)))


@pytest.mark.parametrize("name", list(POLICIES))
def test_18_every_option_works(traced: Traced, name: str) -> None:
    """Every score on every system; the defaults are among what works."""
    make, given, run = SYSTEMS[name]
    _, opt = traced(make, **given)
    for score in SCORES:
        opt.policy = ToCa(num_steps=8, interval=3, fresh_ratio=0.3, schedule="constant", score=score)
        assert run(opt).isfinite().all(), score
        assert [r.kind.value[0] for r in opt.steps] == list("fppfppfp"), score
    assert ToCa().full_steps()[0] == 0


def test_19_another_shape_is_another_run() -> None:
    opt, other = (
        toca_compile.optimize(flux(1, 1), preset("flux-dev/50-n4", num_steps=8), lowering="eager") for _ in range(2)
    )
    sample_flux(opt, 5, 1, (6, 6))
    assert torch.equal(sample_flux(opt, 8, 1, (4, 8)), sample_flux(other, 8, 1, (4, 8)))


def test_20_guidance_passes_have_caches_of_their_own(traced: Traced) -> None:
    """Two passes a step, interleaved, are as each alone."""
    _, opt = traced(flux, double=1, single=1)
    opt.policy = preset("flux-dev/50-n4", num_steps=8)
    alone = sample_flux(opt, 8, 1, (6, 6))

    def interleaved(**call: Any) -> Any:
        with opt.cache_context("cond"):
            out = opt(**call).sample
        with opt.cache_context("uncond"):
            opt(**call | {"encoder_hidden_states": -call["encoder_hidden_states"]})
        return out

    assert torch.equal(sample_flux(interleaved, 8, 1, (6, 6)), alone)


def test_21_scoring_is_counted(traced: Traced) -> None:
    """The speed-up by torch's counting is of all products that run, those of the scores among them."""
    runs, (_, opt) = [], traced(diffusers_dit, depth=3)
    for score in ("attention", "none"):
        opt.policy = ToCa(num_steps=7, fresh_ratio=0.3, schedule="constant", score=score)
        with torch.no_grad():
            opt(noise(), timestep=torch.full((2,), 500), class_labels=torch.arange(2))
        runs.append(toca_compile.explain(opt).run_flops("torch"))
    # Full steps 0 and 3 are scored (6 is the last): queries times keys in 3 layers of 2 heads of 8.
    assert runs[0] - runs[1] == 2 * 3 * (2 * 2 * 2 * 16 * 16 * 8)
