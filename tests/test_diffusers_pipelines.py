"""``optimize(pipe, policy)``: pipelines of diffusers as they are, each call of them one run."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import diffusers_dit
from tests.pipelines import NAMES, build, pixart, run
from toca_compile import BlockCache, DuCa, Fora, FullCompute, PolicyError, TaylorToCa, ToCa, TocaError, preset
from toca_compile.ir.plan import Policy
from toca_compile.policies import ready_made
from toca_compile.policies.base import CachingPolicy

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

POLICY = ToCa(num_steps=50, interval=3, fresh_ratio=0.4, schedule="constant")


def kinds(pipe: Any, context: str | None = None) -> str:
    return "".join(r.kind.value[0] for r in pipe.transformer.steps if context in (None, r.context))


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_as_it_is(name: str) -> None:
    """FullCompute changes no bit; a policy runs over as many steps as the call asks for, the same in every call."""
    pipe, call = build(name)
    plain, signature = run(pipe, call, 5), inspect.signature(pipe.__call__)
    model = pipe.transformer
    assert toca_compile.optimize(pipe, FullCompute(), lowering="eager") is pipe
    assert torch.equal(run(pipe, call, 5), plain)
    assert type(pipe).__name__ == name
    assert inspect.signature(pipe.__call__) == signature
    assert isinstance(pipe, getattr(diffusers, name))
    steps = len(pipe.transformer.steps)
    assert steps == (3 if "Img2Img" in name else 5)
    pipe.transformer.policy = POLICY
    first = run(pipe, call, 5)
    assert kinds(pipe) == "fppfp"[:steps]
    assert pipe.transformer.cache_bytes == 0  # freed at the end
    longer = run(pipe, call, 8)
    assert kinds(pipe) == "fppfppfp"[: 5 if "Img2Img" in name else 8]
    assert torch.equal(run(pipe, call, 5), first)
    assert torch.equal(run(pipe, call, 8), longer)
    assert not torch.equal(first, plain)
    # The same as the optimised model put in by hand, told the number of steps.
    pipe, call = build(name)
    torch._dynamo.reset()
    policy = ToCa(num_steps=steps, interval=3, fresh_ratio=0.4, schedule="constant")
    pipe.transformer = toca_compile.optimize(model, policy, lowering="eager")
    assert torch.equal(run(pipe, call, 5), first)


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxImg2ImgPipeline"])
def test_guidance_by_two_calls_a_step(name: str) -> None:
    """True classifier-free guidance: with ``cache_context`` in one pipeline and without in the other."""
    pipe, call = build(name)
    negative = {"negative_prompt_embeds": torch.randn(1, 5, 12), "negative_pooled_prompt_embeds": torch.randn(1, 12)}
    call |= negative | {"true_cfg_scale": 3.0}
    plain = run(pipe, call, 5)
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    assert torch.equal(run(pipe, call, 5), plain)
    pipe.transformer.policy = Fora(5, 2)
    run(pipe, call, 5)
    contexts = list(dict.fromkeys(r.context for r in pipe.transformer.steps))
    assert len(contexts) == 2
    steps = 3 if "Img2Img" in name else 5
    assert [kinds(pipe, c) for c in contexts] == ["frfrf"[:steps]] * 2


def test_a_second_order_scheduler_calls_twice_a_step() -> None:
    pipe, call = build("PixArtAlphaPipeline")
    pipe.scheduler = diffusers.HeunDiscreteScheduler()
    toca_compile.optimize(pipe, Fora(50, 3), lowering="eager")
    run(pipe, call, 4)
    assert kinds(pipe) == "frrfrrf"  # 2·4 − 1 calls
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler()  # another one, put in later
    run(pipe, call, 4)
    assert kinds(pipe) == "frrf"
    pipe, call = build("StableDiffusion3Pipeline")
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    toca_compile.optimize(pipe, Fora(50, 3), lowering="eager")
    run(pipe, call, 3)
    assert kinds(pipe) == "frrfr"


def test_after_an_exception_the_next_call_is_a_new_run() -> None:
    pipe, call = build("PixArtAlphaPipeline")
    toca_compile.optimize(pipe, POLICY, lowering="eager")
    good = run(pipe, call, 6)

    def stop(step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, call, 6, callback=stop)
    assert pipe.transformer.cache_bytes == 0
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))
    assert torch.equal(run(pipe, call, 6), good)


def test_without_guidance_a_batch_is_no_pair() -> None:
    """Two pictures without guidance select their own tokens, although the policy shares selection in a pair."""
    pipe, call = build("PixArtAlphaPipeline")
    toca_compile.optimize(pipe, preset("pixart-alpha/dpm-20"), lowering="eager")
    seen: list[bool] = []
    step = pipe.scheduler.step

    def look(*args: Any, **kwargs: Any) -> Any:
        masks = [m for n, m in pipe.transformer.fresh_tokens().items() if "ff" in n]
        seen.extend(bool((m[:1] == m).all()) for m in masks if not m.all() and m.any())
        return step(*args, **kwargs)

    pipe.scheduler.step = look
    run(pipe, call, 8)
    assert seen
    assert all(seen)
    seen.clear()
    run(pipe, call, 8, guidance_scale=1.0, num_images_per_prompt=2)
    assert seen
    assert not all(seen)


def pairs(pipe: Any, call: dict[str, Any], **more: Any) -> set[bool]:
    """Whether the two halves of the batch selected the same tokens: what was seen of it in a run of 8 steps."""
    seen: set[bool] = set()
    step = pipe.scheduler.step

    def look(*args: Any, **kwargs: Any) -> Any:
        masks = [m for n, m in pipe.transformer.fresh_tokens().items() if "ff" in n]
        seen.update(torch.equal(*m.chunk(2)) for m in masks if not m.all() and m.any())
        return step(*args, **kwargs)

    pipe.scheduler.step = look
    run(pipe, call, 8, **more)
    pipe.scheduler.step = step
    assert seen
    return seen


OWN = ToCa(interval=3, fresh_ratio=0.4, schedule="constant", score="entropy", shared_pair=True)


@dataclass(frozen=True)
class Mine:
    """A user's own policy of the least there is; it may lay out more steps than a run has."""

    inner: Policy

    def plan(self, sites: Any) -> Any:
        return self.inner.plan(sites)


@dataclass(frozen=True)
class Asked(Mine):
    """One that says what it is in a run."""

    def for_run(self, num_steps: int, guided: bool) -> Mine:
        return Mine(replace(OWN, num_steps=num_steps, interval=2 if guided else 4, shared_pair=guided))


def test_a_policy_is_asked_for_each_run() -> None:
    """With guidance the halves of a batch select as a pair; without they are two pictures, however the policy is
    spelled. Steps are those of the call."""
    pipe, call = build("PixArtAlphaPipeline")
    pipe.transformer = pixart(depth=1)
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    for policy, guided, alone, shared in (
        (OWN, "fppfppfp", "fppfppfp", False),
        (OWN.composition(), "fppfppfp", "fppfppfp", False),
        (DuCa(fresh_ratio=0.4, schedule="constant", score="entropy", shared_pair=True), "fpsfpsfp", "fpsfpsfp", False),
        (Mine(replace(OWN, num_steps=30)), "fppfppfp", "fppfppfp", True),
        (Asked(OWN), "fpfpfpfp", "fpppfppp", False),
    ):
        pipe.transformer.policy = policy
        assert pairs(pipe, call) == {True}
        assert kinds(pipe) == guided
        assert (pairs(pipe, call, guidance_scale=1.0, num_images_per_prompt=2) == {True}) is shared, policy
        assert kinds(pipe) == alone
        assert pipe.transformer.policy is policy


def test_steps_are_replaced_in_every_policy() -> None:
    for policy in (*ready_made(50).values(), OWN, OWN.composition(), FullCompute()):
        assert isinstance(policy, CachingPolicy)
        made: Any = policy.for_run(7, True)
        assert type(made) is type(policy)
        assert getattr(made, "num_steps", 7) == 7
        assert made.for_run(50, True) == policy.for_run(50, True)
        assert made.for_run(7, False).for_run(7, True) == made.for_run(7, False)


def test_what_for_run_returns_must_be_a_policy() -> None:
    class Forgetful(Mine):
        def for_run(self, num_steps: int, guided: bool) -> None:
            pass

    pipe, call = build("PixArtAlphaPipeline")
    toca_compile.optimize(pipe, Forgetful(OWN), lowering="eager")
    with pytest.raises(PolicyError, match=r"Forgetful\.for_run must return a policy, not None"):
        run(pipe, call, 2)


@pytest.mark.parametrize(
    ("preset_name", "scheduler", "steps"), [("ddim-50", "DDIMScheduler", 50), ("ddpm-250", "DDPMScheduler", 250)]
)
def test_dit_with_learned_sigma(preset_name: str, scheduler: str, steps: int) -> None:
    """The published DiT recipes through the pipeline: a model that also predicts the variance, both halves of the
    guidance pair in one batch, each with its own selection."""
    pipe, call = build("DiTPipeline")
    pipe.transformer = diffusers_dit(depth=2, out_channels=4, num_embeds_ada_norm=1000)
    pipe.scheduler = getattr(diffusers, scheduler)()
    toca_compile.optimize(pipe, preset(f"dit-xl-2/{preset_name}"), lowering="eager")
    apart: list[bool] = []
    step = pipe.scheduler.step

    def look(*args: Any, **kwargs: Any) -> Any:
        masks = [m for n, m in pipe.transformer.fresh_tokens().items() if "ff" in n and not m.all() and m.any()]
        apart.extend(not torch.equal(*m.chunk(2)) for m in masks)
        return step(*args, **kwargs)

    pipe.scheduler.step = look
    assert run(pipe, call, steps, guidance_scale=1.5).isfinite().all()
    full = [steps - 1 - r.index for r in pipe.transformer.steps if r.kind == "full"]
    assert len(full) == (18 if steps == 50 else 72)
    assert full[:4] == ([49, 44, 40, 36] if steps == 50 else [249, 240, 234, 228])
    assert any(apart)


def test_a_pipeline_is_saved_as_it_was(tmp_path: Any) -> None:
    pipe, call = build("DiTPipeline")
    plain = run(pipe, call, 3)
    toca_compile.optimize(pipe, POLICY, lowering="eager")
    run(pipe, call, 3)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, call, 3), plain)


def test_the_cache_is_as_large_as_reported() -> None:
    """The report's bytes against the tensors alive near the end of a run, the text's keys and values among them."""
    for name in ("PixArtAlphaPipeline", "FluxPipeline", "DiTPipeline"):
        torch._dynamo.reset()
        pipe, call = build(name)
        toca_compile.optimize(pipe, POLICY, lowering="eager")
        step = pipe.scheduler.step
        alive: list[int] = []

        def look(*args: Any, step: Any = step, pipe: Any = pipe, alive: Any = alive, **kwargs: Any) -> Any:
            alive.append(pipe.transformer.cache_bytes)
            return step(*args, **kwargs)

        pipe.scheduler.step = look
        run(pipe, call, 5)
        assert toca_compile.explain(pipe).cache_bytes == max(alive) > 0


def test_pipelines_without_a_transformer_are_refused() -> None:
    pipe, _ = build("DiTPipeline")

    class Other:
        components = {"scheduler": pipe.scheduler, "unet": pipe.vae}  # noqa: RUF012

        def __call__(self) -> None: ...

    with pytest.raises(TocaError, match="no transformer"):
        toca_compile.optimize(Other(), POLICY)


def test_a_loop_written_by_hand() -> None:
    """The optimised transformer and a scheduler, no pipeline: the run ends with the plan's last step."""
    model = diffusers_dit(sample_size=8)
    opt = toca_compile.optimize(
        model, ToCa(num_steps=6, interval=3, fresh_ratio=0.4, schedule="constant"), lowering="eager"
    )
    scheduler = diffusers.DDIMScheduler()

    def sampled() -> torch.Tensor:
        scheduler.set_timesteps(6)
        x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for t in scheduler.timesteps:
                noise = opt(x, timestep=t.expand(2), class_labels=torch.tensor([1, 2])).sample
                x = scheduler.step(noise, t, x).prev_sample
        return x

    first = sampled()
    assert [r.kind.value for r in opt.steps] == ["full", "partial", "partial"] * 2
    assert torch.equal(sampled(), first)


def test_the_report_of_a_pipeline() -> None:
    pipe, call = build("PixArtAlphaPipeline")
    toca_compile.optimize(pipe, POLICY, lowering="eager")
    run(pipe, call, 3)
    assert {s.kind for s in toca_compile.explain(pipe).sites} == {"self_attention", "cross_attention", "mlp"}


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_policy(name: str) -> None:
    """Blocks skipped by a test at run time, in turn with partial steps, and partial attention: each call its own run."""
    pipe, call = build(name)
    plain = run(pipe, call, 8)
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    policies: list[Policy] = [
        BlockCache(50, 1, threshold=0.5, order=1),
        DuCa(schedule="counter"),
        TaylorToCa(keys="keep"),
    ]
    for policy in policies:
        pipe.transformer.policy = policy
        first = run(pipe, call, 8)
        seen = kinds(pipe)
        assert seen[0] == "f"
        assert set(seen[1:]) - {"f"} or not torch.equal(first, plain) or isinstance(policy, BlockCache), policy
        assert torch.equal(run(pipe, call, 8), first), policy
        assert kinds(pipe) == seen, policy
        assert pipe.transformer.cache_bytes == 0
