"""Small pipelines with random weights, one for each of the table, and the arguments of a call of each.

Transformers are diffusers' own classes, from short configurations. Where latents come out and embeddings go in, all
that a pipeline asks its autoencoder and text encoders for is a few numbers of their configuration: stubs have those.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import randomize
from tests.pipelines import HEADS, build, flux, vae
from toca_compile.diffusers import optimized_components
from toca_compile.ir.plan import Policy

Made = tuple[Any, dict[str, Any]]
TABLE: dict[str, Callable[[], Made]] = {}

LATENT = {"output_type": "latent", "return_dict": False}
IMAGE = {"height": 16, "width": 24}  # 8 × 12 latents under ``vae(4, 1)``, 4 × 6 tokens
VIDEO = {"height": 32, "width": 48, "num_frames": 9}  # 3 × 4 × 6 latents under a stub, 3 × 2 × 3 tokens


def entry(name: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Put a builder into the table."""

    def put(builder: Callable[[], Made]) -> Callable[[], Made]:
        TABLE[name] = builder
        return builder

    return put


def made(name: str) -> Made:
    """A pipeline of the table and the arguments of a call, apart from the number of steps and the generator."""
    pipe, call = TABLE[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


LETTERS = {"full": "f", "partial": "p", "reuse": "r", "forecast": "t", "skip": "s"}


def kinds(pipe: Any) -> list[list[str]]:
    """Of each transformer, of each of its runs, the kinds of its steps."""
    found = []
    for model in optimized_components(pipe).values():
        records = model.steps
        contexts = dict.fromkeys(r.context for r in records)
        found.append(["".join(LETTERS[r.kind.value] for r in records if r.context == c) for c in contexts])
    return found


def follow(pipe: Any, policy: Policy) -> None:
    """Let all transformers of a pipeline follow a policy."""
    for model in optimized_components(pipe).values():
        model.policy = policy


class Stub(nn.Module):
    """Has the attributes that it is given, and as ``config`` too."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**attributes)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.dtype, self.device = torch.float32, torch.device("cpu")


def words(*shape: int, seed: int = 7) -> Tensor:
    """Random embeddings."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(mask: bool = False, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Embeddings of a prompt and of a negative one, by argument; ``mask``: and which tokens of them count."""
    found = {}
    for seed, negative in enumerate(("", "negative_")):
        for name, shape in shapes.items():
            found[f"{negative}{name}"] = words(*shape, seed=7 + seed)
        if mask:
            length = next(iter(shapes.values()))[1]
            found[f"{negative}prompt_attention_mask"] = (torch.arange(length) < length - 1 - seed)[None]
    return found


def model(cls: str, **config: Any) -> nn.Module:
    """A transformer of diffusers by name, with random weights."""
    import diffusers

    return randomize(getattr(diffusers, cls)(**config))


def flow(**config: Any) -> Any:
    """The scheduler of most pipelines."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def video_vae() -> Stub:
    """What video pipelines ask of an autoencoder that shrinks by 8, and frames by 4."""
    return Stub(
        block_out_channels=[8] * 4, scaling_factor=0.5, latent_channels=4, spatial_compression_ratio=8,
        temporal_compression_ratio=4, scale_factor_spatial=8, scale_factor_temporal=4, z_dim=4,
    )  # fmt: skip


def _known(name: str) -> Callable[[], Made]:
    return lambda: build(name)


TABLE["DiT"] = _known("DiTPipeline")
TABLE["PixArt-α"] = _known("PixArtAlphaPipeline")
TABLE["PixArt-Σ"] = _known("PixArtSigmaPipeline")
TABLE["SD3"] = _known("StableDiffusion3Pipeline")
TABLE["Latte"] = _known("LattePipeline")
TABLE["FLUX"] = _known("FluxPipeline")
TABLE["FLUX img2img"] = _known("FluxImg2ImgPipeline")


def flux_pipe(cls: str, transformer: nn.Module | None = None, **parts: Any) -> Made:
    """A pipeline of the FLUX family."""
    import diffusers

    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = getattr(diffusers, cls)(
        scheduler=flow(), vae=vae(4, 1), transformer=transformer or flux(), **dict.fromkeys(names), **parts
    )
    return pipe, {**LATENT, **IMAGE, "prompt_embeds": words(1, 5, 12), "pooled_prompt_embeds": words(1, 12)}


@entry("FLUX inpaint")
def flux_inpaint() -> Made:
    """Half of a picture is made anew."""
    pipe, call = flux_pipe("FluxInpaintPipeline")
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 8:] = 1
    return pipe, call | {"image": torch.rand(1, 3, 16, 24), "mask_image": mask, "strength": 0.8}


@entry("FLUX Kontext")
def flux_kontext() -> Made:
    """The tokens of another picture stand behind those of the latents."""
    pipe, call = flux_pipe("FluxKontextPipeline")
    return pipe, call | {"image": torch.rand(1, 3, 16, 24), "_auto_resize": False, "max_area": 16 * 24}


@entry("FLUX Fill")
def flux_fill() -> Made:
    """The masked picture and the mask are channels beside the latents."""
    transformer = model(
        "FluxTransformer2DModel", patch_size=1, in_channels=48, out_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=12,
        axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    pipe, call = flux_pipe("FluxFillPipeline", transformer)
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 8:] = 1
    return pipe, call | {"image": torch.rand(1, 3, 16, 24), "mask_image": mask}


@entry("FLUX ControlNet")
def flux_controlnet() -> Made:
    """A second model adds to the stream after each block."""
    control = model(
        "FluxControlNetModel", patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe, call = flux_pipe("FluxControlNetPipeline", controlnet=control)
    return pipe, call | {"control_image": torch.rand(1, 3, 16, 24), "controlnet_conditioning_scale": 0.5}


@entry("Chroma")
def chroma() -> Made:
    """Two calls a step, in contexts."""
    import diffusers

    transformer = model(
        "ChromaTransformer2DModel", patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    pipe = diffusers.ChromaPipeline(
        scheduler=flow(), vae=vae(4, 1), text_encoder=None, tokenizer=None, transformer=transformer
    )
    return pipe, {**LATENT, **IMAGE, **texts(True, prompt_embeds=(1, 5, 12))}


@entry("QwenImage")
def qwen_image() -> Made:
    """Two calls a step, in contexts."""
    import diffusers

    transformer = model(
        "QwenImageTransformer2DModel", **HEADS, patch_size=2, in_channels=16, out_channels=4, joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = diffusers.QwenImagePipeline(
        scheduler=flow(), vae=Stub(temperal_downsample=[True], z_dim=4), text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip
    masks = {f"{n}prompt_embeds_mask": torch.ones(1, 5, dtype=torch.long) for n in ("", "negative_")}
    return pipe, {**LATENT, **IMAGE, **texts(prompt_embeds=(1, 5, 12)), **masks}


@entry("Sana")
def sana() -> Made:
    """Linear attention, convolutions in the MLP."""
    import diffusers

    transformer = model(
        "SanaTransformer2DModel", **HEADS, patch_size=1, in_channels=4, out_channels=4, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, sample_size=8,
    )  # fmt: skip
    autoencoder = Stub(encoder_block_out_channels=[8] * 5, scaling_factor=0.5)
    pipe = diffusers.SanaPipeline(None, None, autoencoder, transformer, flow())
    size = {"height": 64, "width": 96, "use_resolution_binning": False}
    return pipe, {**LATENT, **size, **texts(True, prompt_embeds=(1, 5, 12)), "negative_prompt": None}


@entry("HunyuanDiT")
def hunyuan_dit() -> Made:
    """Long skip connections between blocks."""
    import diffusers

    transformer = model(
        "HunyuanDiT2DModel", num_attention_heads=2, attention_head_dim=8, num_layers=4, in_channels=4, patch_size=2,
        sample_size=8, hidden_size=16, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8,
        text_len=5, text_len_t5=6, activation_fn="gelu-approximate",
    )  # fmt: skip
    pipe = diffusers.HunyuanDiTPipeline(
        video_vae(), None, None, transformer, diffusers.DDPMScheduler(), None, None, requires_safety_checker=False
    )
    call: dict[str, Any] = {**LATENT, "height": 64, "width": 96, "use_resolution_binning": False}
    for negative in ("", "negative_"):
        for end, length in (("", 5), ("_2", 6)):
            call[f"{negative}prompt_embeds{end}"] = words(1, length, 16, seed=len(negative))
            call[f"{negative}prompt_attention_mask{end}"] = torch.ones(1, length, dtype=torch.long)
    return pipe, call


@entry("AuraFlow")
def aura_flow() -> Made:
    """Joint blocks, then single ones."""
    import diffusers

    transformer = model(
        "AuraFlowTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    pipe = diffusers.AuraFlowPipeline(None, None, vae(4, 1), transformer, flow())
    return pipe, {**LATENT, **IMAGE, **texts(True, prompt_embeds=(1, 5, 12))}


@entry("Lumina2")
def lumina2() -> Made:
    """Grouped queries, sandwich norms, text of several lengths behind one mask."""
    import diffusers

    transformer = model(
        "Lumina2Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=1,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16), cap_feat_dim=12,
    )  # fmt: skip
    pipe = diffusers.Lumina2Pipeline(transformer, flow(), vae(4, 1), None, None)
    return pipe, {**LATENT, "height": 64, "width": 96, **texts(True, prompt_embeds=(1, 5, 12))}


@entry("StableAudio")
def stable_audio() -> Made:
    """A sequence of sound, no picture."""
    import diffusers

    transformer = model(
        "StableAudioDiTModel", sample_size=16, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=12,
        time_proj_dim=8, global_states_input_dim=24, cross_attention_input_dim=12,
    )  # fmt: skip
    projection = diffusers.StableAudioProjectionModel(12, 12, 0, 32).eval()
    autoencoder = Stub(hop_length=4, sampling_rate=4, audio_channels=2)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler()
    pipe = diffusers.StableAudioPipeline(autoencoder, None, projection, None, transformer, scheduler)
    return pipe, {"output_type": "latent", "audio_end_in_s": 12.0, **texts(prompt_embeds=(1, 5, 12))}


def wan(**config: Any) -> nn.Module:
    """A small ``WanTransformer3DModel``."""
    settings = HEADS | {"attention_head_dim": 12, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4}
    settings |= {"text_dim": 12, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    return model("WanTransformer3DModel", **settings | config)


def wan_pipe(two: bool = False) -> Made:
    """Text to video, by one transformer or two."""
    import diffusers

    more = {"transformer_2": randomize(wan(), 1), "boundary_ratio": 0.6} if two else {}
    pipe = diffusers.WanPipeline(None, None, video_vae(), flow(), wan(), **more)
    return pipe, {**LATENT, **VIDEO, **texts(prompt_embeds=(1, 5, 12))}


def wan_i2v_pipe(two: bool = False) -> Made:
    """A picture to video. The picture is latents beside the noise, and where there is one transformer, tokens of its
    own in the cross attention."""
    import diffusers

    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    config: dict[str, Any] = {"in_channels": 12} | ({} if two else {"image_dim": 12, "added_kv_proj_dim": 24})
    more: dict[str, Any] = {"transformer_2": randomize(wan(**config), 1), "boundary_ratio": 0.4} if two else {}
    pipe = diffusers.WanImageToVideoPipeline(None, None, autoencoder, flow(), transformer=wan(**config), **more)
    if not two:
        pipe.encode_image = lambda image, device: words(1, 3, 12)
    return pipe, {**LATENT, **VIDEO, **texts(prompt_embeds=(1, 5, 12)), "image": torch.rand(1, 3, 32, 48)}


@entry("Wan")
def wan_text() -> Made:
    """One transformer."""
    return wan_pipe()


@entry("Wan I2V")
def wan_image() -> Made:
    """One transformer that reads the picture."""
    return wan_i2v_pipe()


@entry("Wan 2.2")
def wan_text_two() -> Made:
    """Two transformers, each for a part of the steps."""
    return wan_pipe(True)


@entry("Wan 2.2 I2V")
def wan_image_two() -> Made:
    """Two transformers, and a picture."""
    return wan_i2v_pipe(True)


@entry("CogVideoX")
def cogvideox() -> Made:
    """Text and video in one stream."""
    import diffusers

    transformer = model(
        "CogVideoXTransformer3DModel", **HEADS, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=12,
        sample_width=6, sample_height=4, sample_frames=9, patch_size=2, max_text_seq_length=5,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(None, None, video_vae(), transformer, diffusers.CogVideoXDDIMScheduler())
    return pipe, {**LATENT, **VIDEO, **texts(prompt_embeds=(1, 5, 12))}


@entry("LTX")
def ltx() -> Made:
    """Packed latents; their shape comes as numbers."""
    import diffusers

    transformer = model(
        "LTXVideoTransformer3DModel", **HEADS, in_channels=8, out_channels=8, cross_attention_dim=16,
        caption_channels=12,
    )  # fmt: skip
    autoencoder = Stub(spatial_compression_ratio=16, temporal_compression_ratio=8)
    pipe = diffusers.LTXPipeline(flow(), autoencoder, None, None, transformer)
    return pipe, {**LATENT, "height": 64, "width": 96, "num_frames": 9, **texts(True, prompt_embeds=(1, 5, 12))}


@entry("HunyuanVideo")
def hunyuan_video() -> Made:
    """Refined text, double blocks, single ones."""
    import diffusers

    transformer = model(
        "HunyuanVideoTransformer3DModel", **HEADS, in_channels=4, out_channels=4, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, text_embed_dim=12, pooled_projection_dim=12, rope_axes_dim=(2, 2, 4),
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, video_vae(), flow(), None, None)
    text = {"prompt_embeds": words(1, 5, 12), "pooled_prompt_embeds": words(1, 12)}
    return pipe, {**LATENT, **VIDEO, **text, "prompt_attention_mask": torch.ones(1, 5, dtype=torch.long)}


@entry("Mochi")
def mochi() -> Made:
    """The mask of the text picks tokens."""
    import diffusers

    transformer = model(
        "MochiTransformer3DModel", **HEADS, patch_size=2, pooled_projection_dim=8, in_channels=4, text_embed_dim=16,
        time_embed_dim=16, max_sequence_length=5,
    )  # fmt: skip
    pipe = diffusers.MochiPipeline(flow(), Stub(latents_mean=None), None, None, transformer)
    return pipe, {**LATENT, "height": 32, "width": 48, "num_frames": 7, **texts(True, prompt_embeds=(1, 5, 16))}


@entry("Allegro")
def allegro() -> Made:
    """Rotary embeddings come as an argument."""
    import diffusers

    transformer = model(
        "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=12, num_layers=1, in_channels=4,
        out_channels=4, cross_attention_dim=24, sample_width=6, sample_height=4, sample_frames=2, caption_channels=12,
    )  # fmt: skip
    pipe = diffusers.AllegroPipeline(None, None, video_vae(), transformer, diffusers.DDIMScheduler())
    size = {"height": 32, "width": 48, "num_frames": 8, "clean_caption": False}
    return pipe, {**LATENT, **size, **texts(True, prompt_embeds=(1, 5, 12)), "negative_prompt": None}


@entry("EasyAnimate")
def easy_animate() -> Made:
    """Joint blocks, the last without an output for the text."""
    import diffusers

    transformer = model(
        "EasyAnimateTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=12, num_layers=2, mmdit_layers=2, sample_width=16, sample_height=16,
        patch_size=2,
    )  # fmt: skip
    pipe = diffusers.EasyAnimatePipeline(video_vae(), None, None, transformer, flow())
    return pipe, {**LATENT, **VIDEO, **texts(True, prompt_embeds=(1, 5, 12))}
