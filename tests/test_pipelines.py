"""``optimize(pipe, policy)``: pipelines of diffusers as they are, each call of them one run."""

import inspect
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import diffusers_dit
from tests.pipelines import NAMES, build, run
from toca_compile import Fora, FullCompute, ToCa, TocaError, preset

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
