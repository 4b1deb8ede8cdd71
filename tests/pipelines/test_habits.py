"""What people do with pipelines. Each act on an optimised one is the same act on the plain one (bit for bit with a
policy that computes everything), and under a caching policy its steps are those that make sense for it."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import toca_compile
from tests.models import randomize
from tests.pipelines import build, run
from tests.pipelines.builders import flux_pipe, kinds, made, words
from toca_compile import Fora, FullCompute, TaylorSeer

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

Act = Callable[[Any], Any]


@dataclass(frozen=True)
class Habit:
    """A pipeline of the table, what is done to it, how it is called, and what ``Fora(50, 3)`` is to make of six steps
    in each run of its transformer."""

    pipeline: str
    planned: tuple[str, ...] = ("frrfrr",)
    prepare: Act = lambda pipe: None
    call: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # arguments of the table's call that are left out


def negative() -> dict[str, torch.Tensor]:
    """Another prompt, for FLUX."""
    return {
        "negative_prompt_embeds": words(1, 5, 12, seed=1),
        "negative_pooled_prompt_embeds": words(1, 12, seed=1),
    }


def scheduler(name: str, **config: Any) -> Act:
    """Another scheduler, made from the one that is there, as the documentation does."""

    def assign(pipe: Any) -> None:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **config)

    return assign


def ip_adapter(pipe: Any) -> None:
    """Processors that attend to a picture's tokens too, as ``load_ip_adapter`` puts them in."""
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = pipe.transformer
    processors = {
        name: FluxIPAdapterAttnProcessor(16, 12, num_tokens=(4,), scale=0.7) if "single" not in name else processor
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, 12, 4)])
    randomize(model)


def without_guidance_from(step: int) -> Callable[..., Any]:
    """The callback of the documentation that saves the negative half of the batch at the end."""

    def callback(pipe: Any, index: int, _: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == step - 1:
            pipe._guidance_scale = 0.0
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                kwargs[name] = kwargs[name][-1:]
        return kwargs

    return callback


LATER = {
    "callback_on_step_end": without_guidance_from(4),
    "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
}
SKIPPED = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.6}
TWO = {"prompt_embeds": words(2, 5, 12), "pooled_prompt_embeds": words(2, 12)}
PICTURE = {"ip_adapter_image_embeds": [words(1, 1, 8)]}
OTHER_PICTURE = {"negative_ip_adapter_image_embeds": [words(1, 1, 8, seed=1)]}

HABITS = {
    "skip-layer guidance": Habit("SD3", ("frrfrr", "frr"), call=SKIPPED),
    "guidance that ends early": Habit("SD3", ("frrf" + "fr",), call=LATER),  # half the batch is another graph
    "true guidance": Habit("FLUX", ("frrfrr",) * 2, call={**negative(), "true_cfg_scale": 3.0}),
    "IP-adapter": Habit("FLUX", prepare=ip_adapter, call={**PICTURE, **OTHER_PICTURE}),
    "IP-adapter with true guidance": Habit(
        "FLUX", ("frrfrr",) * 2, ip_adapter, {**PICTURE, **OTHER_PICTURE, **negative(), "true_cfg_scale": 3.0}
    ),
    "ControlNet for half of the steps": Habit("FLUX ControlNet", call={"control_guidance_end": 0.5}),
    "ControlNet with true guidance": Habit(
        "FLUX ControlNet", ("frrfrr",) * 2, call={**negative(), "true_cfg_scale": 3.0}
    ),
    "a reference of another size": Habit("FLUX Kontext", call={"image": torch.rand(1, 3, 16, 16), "max_area": 256}),
    "no reference": Habit("FLUX Kontext", without=("image",)),
    "a batch of prompts": Habit("FLUX", call=TWO),
    "one prompt's embeddings for several pictures": Habit("FLUX", call={"num_images_per_prompt": 2}),
    "several pictures a prompt": Habit("PixArt-α", call={"num_images_per_prompt": 2}),
    "several videos a prompt": Habit("Wan", ("frrfrr",) * 2, call={"num_videos_per_prompt": 2}),
    "inpainting in a batch": Habit("FLUX inpaint", ("frrfr",), call=TWO),
    "own sigmas": Habit("FLUX", ("frrf",), call={"sigmas": [1.0, 0.8, 0.4, 0.2]}),
    "own timesteps": Habit(
        "PixArt-α", ("frrf",), scheduler("DDPMScheduler"), call={"timesteps": [900, 700, 300, 100]}
    ),
    "Heun": Habit("PixArt-α", ("frrfrrfrrfr",), scheduler("HeunDiscreteScheduler")),
    "Heun for flows": Habit("SD3", ("frrfrrfrrfr",), lambda p: setattr(p, "scheduler", diffusers.FlowMatchHeunDiscreteScheduler())),
    "UniPC": Habit("Wan", ("frrfrr",) * 2, scheduler("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction")),
    "Euler ancestral": Habit("PixArt-α", prepare=scheduler("EulerAncestralDiscreteScheduler")),
    "stochastic DPM": Habit("PixArt-α", prepare=scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")),
    "DDIM": Habit("HunyuanDiT", prepare=scheduler("DDIMScheduler")),
    "PNDM": Habit("HunyuanDiT", ("frr" * 5,), scheduler("PNDMScheduler")),
    "KDPM2": Habit("HunyuanDiT", ("frrfrrfrrfr",), scheduler("KDPM2DiscreteScheduler")),
}  # fmt: skip


def pair(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A plain pipeline and an optimised one, with the same weights, and the arguments of a call."""
    (plain, call), (pipe, _) = made(name), made(name)
    return plain, toca_compile.optimize(pipe, FullCompute(), lowering="eager"), call


shared = functools.cache(pair)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """What Dynamo made of a pipeline stays until the last habit."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _emptied() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    shared.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.xdist_group(f"habits of {h.pipeline}")) for n, h in HABITS.items()]
)
def test_a_habit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it changes no weight, one trace serves all habits of a pipeline."""
    habit = HABITS[name]
    plain, pipe, call = pair(habit.pipeline) if habit.prepare is ip_adapter else shared(habit.pipeline)
    call = {k: v for k, v in {**call, **habit.call}.items() if k not in habit.without}
    for prepared in (plain, pipe):
        monkeypatch.setattr(prepared, "scheduler", prepared.scheduler)
        habit.prepare(prepared)
    wanted = run(plain, call, 6)
    pipe.transformer.policy = FullCompute()
    assert torch.equal(run(pipe, call, 6), wanted)
    assert kinds(pipe)[0] == ["f" * len(planned) for planned in habit.planned]
    pipe.transformer.policy = Fora(50, 3)
    first = run(pipe, call, 6)
    assert tuple(kinds(pipe)[0]) == habit.planned
    assert not torch.equal(first, wanted)
    assert torch.equal(run(pipe, call, 6), first)
    assert pipe.transformer.cache_bytes == 0


def test_another_scheduler_after_optimize() -> None:
    """Schedulers take turns in one pipeline; each call is what it is with that scheduler alone."""
    pipe, call = build("PixArtAlphaPipeline")
    assigned = [
        scheduler("DDIMScheduler"),
        scheduler("HeunDiscreteScheduler"),
        scheduler("DPMSolverMultistepScheduler"),
    ]
    plain = []
    for assign in assigned:
        assign(pipe)
        plain.append(run(pipe, call, 4))
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    for _ in range(2):
        for assign, wanted in zip(assigned, plain, strict=True):
            assign(pipe)
            assert torch.equal(run(pipe, call, 4), wanted)
    pipe.transformer.policy = Fora(50, 3)
    for assign, planned in zip(assigned, ("frrf", "frrfrrf", "frrf"), strict=True):
        assign(pipe)
        run(pipe, call, 4)
        assert kinds(pipe) == [[planned]]


STRENGTHS = (0.1, 0.15, 0.3, 0.55, 0.8, 0.95, 1.0)


@pytest.mark.parametrize("heun", [False, True], ids=["Euler", "Heun"])
def test_image_to_image_at_any_strength(heun: bool) -> None:
    """A run is planned for the part of the steps that is denoised, and begins with a full one."""
    _, call = made("FLUX img2img")
    if heun:
        text, call = made("SD3")
        pipe = diffusers.StableDiffusion3Img2ImgPipeline(**text.components)
        pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        call |= {"image": torch.rand(1, 3, 16, 24)}
        del call["height"], call["width"]
    else:
        pipe, call = made("FLUX img2img")
    pipe.set_progress_bar_config(disable=True)
    plain = [run(pipe, call, 10, strength=s) for s in STRENGTHS]
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    for strength, wanted in zip(STRENGTHS, plain, strict=True):
        assert torch.equal(run(pipe, call, 10, strength=strength), wanted)
    pipe.transformer.policy = Fora(50, 3)
    for strength in STRENGTHS:
        run(pipe, call, 10, strength=strength)
        start = int(10 - min(10 * strength, 10))
        length = 2 * (10 - start) - 1 if heun else 10 - start
        assert kinds(pipe) == [[("frr" * 7)[:length]]], strength


def test_prompts_of_two_lengths_and_pictures_of_two_sizes_take_turns(caplog: pytest.LogCaptureFixture) -> None:
    """Each call is as the plain pipeline's, and nothing is said of numbers that change from picture to picture."""
    pipe, call = made("LTX")
    calls = [{**call, "height": h, "width": w} for h, w in ((64, 96), (96, 64), (64, 64), (32, 96))]
    plain = [run(pipe, c, 3) for c in calls]
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    for c, wanted in zip(calls, plain, strict=True):
        assert torch.equal(run(pipe, c, 3), wanted)
    pipe.transformer.policy = Fora(50, 3)
    for c in [*calls, *calls]:
        run(pipe, c, 3)
        assert kinds(pipe) == [["frr"]]
    assert not [r for r in caplog.records if r.name.startswith("toca_compile")]


def test_the_grid_of_packed_latents_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    """FLUX is told where each token lies by a table; with a reference picture a second one follows."""
    from toca_compile import ToCa

    for name, frames in (("FLUX", 1), ("FLUX Kontext", 2)):
        torch._dynamo.reset()
        pipe, call = made(name)
        toca_compile.optimize(pipe, ToCa(50, interval=3, fresh_ratio=0.4, schedule="constant"), lowering="eager")
        run(pipe, call, 2)
        sites = toca_compile.explain(pipe).graphs()["find-sites"].splitlines()
        picture = f", {'2 frames of ' if frames == 2 else ''}4×6"
        for block, laid_out in (("ff.net", True), ("ff_context", False), ("single_transformer_blocks.0", True)):
            (line,) = [x for x in sites if f"transformer_blocks.0.{block}" in x or f" {block}" in x][:1]
            assert line.endswith(picture) is laid_out, line
    assert not [r for r in caplog.records if "grid" in r.message]
    # What has no picture is told how to go on.
    pipe, call = made("StableAudio")
    toca_compile.optimize(pipe, ToCa(50, interval=3, fresh_ratio=0.4, schedule="constant"), lowering="eager")
    run(pipe, call, 2)
    assert [r for r in caplog.records if "grid=(height, width)" in r.message and "bonus=0" in r.message]


def test_a_user_is_told_what_skipped_blocks_do_to_a_joint_stream(caplog: pytest.LogCaptureFixture) -> None:
    from toca_compile import BlockCache

    pipe, call = made("AuraFlow")  # registers and text are joined before the blocks, those and the picture among them
    toca_compile.optimize(pipe, BlockCache(50, first=0, interval=3), lowering="eager")
    run(pipe, call, 4)
    assert not [r for r in caplog.records if r.name.startswith("toca_compile")]


def test_a_copy_of_the_scheduler_has_the_schedulers_own_methods() -> None:
    """As pipelines make one for the sound beside the picture: its steps are not the picture's."""
    import copy

    pipe, call = flux_pipe("FluxPipeline")
    pipe.set_progress_bar_config(disable=True)
    other: list[Any] = []

    def callback(pipe: Any, index: int, _: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not index:
            other.append(copy.deepcopy(pipe.scheduler))
            other[0].set_timesteps(3, mu=1.0)
        other[0].step(kwargs["latents"], other[0].timesteps[index], kwargs["latents"])
        return kwargs

    wanted = run(pipe, call, 3, callback_on_step_end=callback)
    assert other.pop().step_index == 3
    toca_compile.optimize(pipe, FullCompute(), lowering="eager")
    assert torch.equal(run(pipe, call, 3, callback_on_step_end=callback), wanted)
    assert other[0].step_index == 3
    assert pipe.scheduler.step_index == 3
    assert kinds(pipe) == [["fff"]]


@pytest.mark.parametrize("name", ["FLUX", "SD3", "Wan"])
def test_under_autocast(name: str) -> None:
    """The first latents are float32, and all later ones bfloat16 where the scheduler goes by what the model says: two
    graphs, and yet one run."""
    pipe, call = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(pipe, call, 6)
        toca_compile.optimize(pipe, FullCompute(), lowering="eager")
        assert torch.equal(run(pipe, call, 6), plain)
        for policy, planned in ((Fora(50, 3), "frrfrr"), (TaylorSeer(50, 3, 2), "frrftt")):
            pipe.transformer.policy = policy
            first = run(pipe, call, 6)
            assert set(kinds(pipe)[0]) == {planned}
            context = pipe.transformer.steps[0].context
            assert [r.index for r in pipe.transformer.steps if r.context == context] == list(range(6))
            assert torch.equal(run(pipe, call, 6), first)
            assert pipe.transformer.cache_bytes == 0
    assert not torch.equal(first, plain)
    # Also where the stream is cast for each addition.
    assert {"FLUX": "parallel", "SD3": "joint_attention", "Wan": "self_attention"}[name] in {
        site.kind for site in toca_compile.explain(pipe).sites
    }
