"""A short configuration of every transformer class that diffusers exports, and what may be cached in it.

An entry is data: how the model is made, what it is called with, and how many of its sites may do what. A class that is
not here fails ``test_every_class_has_an_entry``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Draw = Callable[[torch.Generator, int], Tensor]


def x(*shape: int) -> Draw:
    """Latents: other values at every step."""
    return lambda random, step: torch.randn(shape, generator=random) + 0.3 * step * torch.randn(shape, generator=random)


def c(*shape: int) -> Draw:
    """Conditioning: the same values at every step."""
    return lambda random, step: torch.randn(shape, generator=random)


def t(*shape: int, top: float = 900) -> Draw:
    """The time, from ``top`` down: whole numbers, or with a fraction in ``top`` floats."""
    return lambda random, step: torch.full(shape, type(top)(top * (1 - 0.1 * step)))


def grid(*sizes: int, axes: int = 3) -> Tensor:
    """The places of a grid of tokens, ``[tokens, axes]``, on the last of the axes."""
    ids = torch.cartesian_prod(*(torch.arange(s, dtype=torch.float32) for s in sizes)).reshape(-1, len(sizes))
    return torch.cat([torch.zeros(len(ids), axes - len(sizes)), ids], 1)


def wan_cache() -> Any:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return WanAnimate2KVCache(2)


@dataclass(frozen=True)
class Entry:
    """One configuration of a class.

    ``sites``: how many may be partial, take queries, or can only be reused. ``refused``: of why nothing is cached.
    ``since``: the torch that can trace it; one before splits the model, or is refused by name.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    sites: str = ""
    refused: str = ""
    since: str = ""

    def at(self, step: int) -> dict[str, Any]:
        """What the model is called with at a step."""
        random = torch.Generator().manual_seed(1)
        return dict(pytree.tree_map_only(Callable, lambda draw: draw(random, step), dict(self.inputs)))  # type: ignore[arg-type]


# fmt: off
HEADS = dict(num_attention_heads=2, attention_head_dim=8)
TEXT = dict(encoder_hidden_states=c(1, 5, 12))
FLUX = dict(hidden_states=x(1, 16, 4), **TEXT, img_ids=grid(4, 4), txt_ids=torch.zeros(5, 3), timestep=t(1, top=0.9))
ROPE = dict(axes_dims_rope=(2, 2, 4))
SIZES = dict(original_size=torch.tensor([[64, 64]]), target_size=torch.tensor([[64, 64]]),
    crop_coords=torch.tensor([[0, 0]]))
WAN = HEADS | dict(in_channels=4, out_channels=4, text_dim=12, freq_dim=8, ffn_dim=24, num_layers=1,
    rope_max_seq_len=32)
VIDEO = dict(hidden_states=x(1, 4, 2, 4, 6), timestep=t(1), **TEXT)
HUNYUAN = HEADS | dict(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
    patch_size=1, patch_size_t=1, text_embed_dim=12, pooled_projection_dim=6, rope_axes_dim=(2, 2, 4))
MASK = torch.tensor([[1, 1, 1, 1, 0]])

ENTRIES: dict[str, Entry] = {
    "AceStepTransformer1DModel": Entry(
        dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4),
        dict(hidden_states=x(2, 16, 4), timestep=t(2, top=0.9), timestep_r=t(2, top=0.9),
            encoder_hidden_states=c(2, 5, 16), context_latents=c(2, 16, 8)),
        "4 partial, 2 queries", since="2.12",
    ),
    "AllegroTransformer3DModel": Entry(
        HEADS | dict(num_layers=1, cross_attention_dim=16, sample_width=8, sample_height=8, sample_frames=8,
            caption_channels=12),
        dict(hidden_states=x(1, 4, 2, 8, 8), timestep=t(1), **TEXT),
        "2 partial, 1 queries",
    ),
    "AnyFlowFARTransformer3DModel": Entry(
        WAN | dict(full_chunk_limit=3),
        dict(hidden_states=x(1, 4, 4, 8, 8), timestep=t(1, 4, top=900.0), r_timestep=t(1, 4, top=450.0), **TEXT,
            chunk_partition=[2, 2]),
        "2 partial, 1 queries", since="2.13",
    ),
    "AnyFlowTransformer3DModel": Entry(
        WAN,
        dict(hidden_states=x(1, 2, 4, 4, 6), timestep=t(1, 2, top=900.0), r_timestep=t(1, 2, top=450.0), **TEXT),
        "2 partial, 1 queries",
    ),
    "AuraFlowTransformer2DModel": Entry(
        HEADS | dict(sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=12,
            caption_projection_dim=16, pos_embed_max_size=64),
        dict(hidden_states=x(1, 4, 8, 8), timestep=t(1, top=0.9), **TEXT),
        "1 partial, 2 queries",
    ),
    "BriaFibo2Transformer2DModel": Entry(
        dict(in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, cap_feat_dim=12,
            injection_layer_ids=(0,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4,
            gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 4, 8), axes_lens=(32, 32, 32)),
        dict(hidden_states=x(1, 4, 8, 8), timestep=t(1, top=0.9), encoder_hidden_states=c(1, 2, 5, 12)),
        "5 partial, 3 queries",
    ),
    "BriaFiboTransformer2DModel": Entry(
        HEADS | dict(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12, text_encoder_dim=6,
            axes_dims_rope=[0, 4, 4]),
        FLUX | dict(text_encoder_layers=[c(1, 5, 6), c(1, 5, 6)]),
        "3 partial, 2 queries",
    ),
    "BriaTransformer2DModel": Entry(
        HEADS | dict(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12,
            axes_dims_rope=[0, 4, 4]),
        FLUX,
        "3 partial, 2 queries",
    ),
    "ChromaTransformer2DModel": Entry(
        HEADS | ROPE | dict(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12,
            approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
        FLUX,
        "3 partial, 2 queries",
    ),
    "ChronoEditTransformer3DModel": Entry(
        WAN | dict(rope_temporal_skip_len=4),
        VIDEO,
        "2 partial, 1 queries",
    ),
    "CogVideoXTransformer3DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=12, num_layers=2, sample_width=6,
            sample_height=4, sample_frames=5, temporal_compression_ratio=4, max_text_seq_length=5),
        dict(hidden_states=x(1, 2, 4, 4, 6), timestep=t(1), **TEXT),
        "3 partial, 4 queries",
    ),
    "CogVideoXTransformer3DModel/rotary": Entry(
        HEADS | dict(in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=12, num_layers=1, sample_width=6,
            sample_height=4, sample_frames=5, max_text_seq_length=5, use_rotary_positional_embeddings=True),
        dict(hidden_states=x(1, 2, 4, 4, 6), timestep=t(1), **TEXT, image_rotary_emb=(c(12, 8), c(12, 8))),
        "1 partial, 2 queries",
    ),
    "CogView3PlusTransformer2DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, num_layers=2, text_embed_dim=12, time_embed_dim=8, condition_dim=2,
            pos_embed_max_size=8, sample_size=8),
        dict(hidden_states=x(1, 4, 8, 8), timestep=t(1), **TEXT, **SIZES),
        "3 partial, 4 queries",
    ),
    "CogView4Transformer2DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, num_layers=2, text_embed_dim=12, time_embed_dim=8, condition_dim=4,
            rope_axes_dim=(8, 8)),
        dict(hidden_states=x(1, 4, 8, 8), timestep=t(1), **TEXT, **SIZES),
        "3 partial, 3 queries",
    ),
    "ConsisIDTransformer3DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=12, num_layers=2, sample_width=6,
            sample_height=4, sample_frames=5, max_text_seq_length=5, cross_attn_interval=2, is_train_face=True,
            cross_attn_dim_head=4, cross_attn_num_heads=2, LFE_id_dim=4, LFE_vit_dim=4, LFE_depth=1, LFE_dim_head=4,
            LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=3, LFE_output_dim=10, LFE_ff_mult=1, LFE_num_scale=1),
        dict(hidden_states=x(1, 2, 4, 4, 6), timestep=t(1), **TEXT, id_cond=c(1, 4), id_vit_hidden=[c(1, 2, 4)]),
        "6 partial, 5 queries",
    ),
    "Cosmos3OmniTransformer": Entry(
        dict(head_dim=12, hidden_size=16, intermediate_size=24, latent_channel=2, latent_patch_size=1,
            num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=1, patch_latent_dim=2,
            rope_axes_dim=[2, 2, 2], vocab_size=16),
        dict(input_ids=torch.tensor([1, 2]), text_indexes=torch.tensor([0, 1]),
            position_ids=torch.zeros(3, 18, dtype=torch.long), und_len=2, sequence_length=18,
            vision_tokens=[x(1, 2, 1, 4, 4)], vision_token_shapes=[(1, 4, 4)],
            vision_sequence_indexes=torch.arange(2, 18), vision_mse_loss_indexes=torch.arange(2, 18),
            vision_timesteps=t(16, top=900.0), vision_noisy_frame_indexes=[torch.tensor([0])]),
        "2 partial, 2 queries",
    ),
    "CosmosTransformer3DModel": Entry(
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, concat_padding_mask=False,
            num_layers=1, mlp_ratio=2, text_embed_dim=12, adaln_lora_dim=4, max_size=(4, 16, 16)),
        VIDEO | dict(fps=30),
        "2 partial, 1 queries",
    ),
    "DiTTransformer2DModel": Entry(
        HEADS | dict(in_channels=2, out_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10,
            norm_num_groups=1),
        dict(hidden_states=x(2, 2, 8, 8), timestep=t(2), class_labels=torch.tensor([1, 2])),
        "2 partial, 2 queries",
    ),
    "DreamLiteTransformer2DModel": Entry(
        HEADS | dict(in_channels=8, num_layers=1, norm_num_groups=2, cross_attention_dim=12, qk_norm="rms_norm"),
        dict(hidden_states=x(1, 8, 4, 4), **TEXT),
        "2 partial, 1 queries",
    ),
    "DualTransformer2DModel": Entry(
        HEADS | dict(in_channels=8, num_layers=1, norm_num_groups=2, cross_attention_dim=12),
        dict(hidden_states=x(1, 8, 4, 4), encoder_hidden_states=c(1, 334, 12)),
        "4 partial, 2 queries",
    ),
    "EasyAnimateTransformer3DModel": Entry(
        HEADS | dict(attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, mmdit_layers=1, num_layers=2,
            text_embed_dim=12, time_embed_dim=8, sample_height=8, sample_width=8),
        VIDEO | dict(hidden_states=x(1, 4, 2, 8, 8)),
        "3 partial, 3 queries",
    ),
    "ErnieImageTransformer2DModel": Entry(
        dict(hidden_size=16, num_attention_heads=2, num_layers=1, ffn_hidden_size=24, in_channels=4, out_channels=4,
            patch_size=1, text_in_dim=12, rope_axes_dim=(4, 2, 2)),
        dict(hidden_states=x(1, 4, 4, 4), timestep=t(1, top=0.9), text_bth=c(1, 5, 12), text_lens=torch.tensor([5])),
        "1 partial, 1 queries",
    ),
    "Flux2Transformer2DModel": Entry(
        HEADS | dict(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12,
            timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2)),
        FLUX | dict(img_ids=grid(4, 4, axes=4), txt_ids=grid(5, axes=4), guidance=torch.ones(1)),
        "3 partial, 2 queries",
    ),
    "Flux3Transformer2DModel": Entry(
        HEADS | dict(in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12,
            timestep_channels=8, axes_dims_rope=(2, 2, 2, 2)),
        FLUX | dict(img_ids=grid(4, 4, axes=4), txt_ids=grid(5, axes=4)),
        "2 partial, 1 queries",
    ),
    "Flux3Transformer2DModel/references": Entry(
        HEADS | dict(in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12,
            timestep_channels=8, axes_dims_rope=(2, 2, 2, 2)),
        FLUX | dict(img_ids=grid(4, 4, axes=4), txt_ids=grid(5, axes=4), image_cond_hidden_states=c(1, 9, 4),
            image_cond_ids=grid(3, 3, axes=4)),
        "3 partial",
    ),
    "FluxTransformer2DModel": Entry(
        HEADS | ROPE | dict(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12,
            pooled_projection_dim=6),
        FLUX | dict(pooled_projections=c(1, 6)),
        "3 partial, 2 queries",
    ),
    "GlmImageTransformer2DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, num_layers=1, text_embed_dim=12, time_embed_dim=8, condition_dim=4,
            prior_vq_quantizer_codebook_size=16),
        dict(hidden_states=x(1, 4, 8, 8), timestep=t(1), **TEXT, prior_token_id=torch.arange(16)[None],
            prior_token_drop=(torch.arange(16) % 5 == 0)[None], target_size=torch.tensor([[8.0, 8.0]]),
            crop_coords=torch.zeros(1, 2)),
        "1 partial, 1 queries",
    ),
    "HeliosTransformer3DModel": Entry(
        {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | dict(num_layers=1, attention_head_dim=12,
            rope_dim=(4, 4, 4)),
        dict(hidden_states=x(1, 4, 2, 8, 8), timestep=t(1), **TEXT, indices_hidden_states=torch.arange(2.0)[None] + 5,
            indices_latents_history_short=torch.ones(1, 1), indices_latents_history_mid=torch.ones(1, 1),
            indices_latents_history_long=torch.ones(1, 4), latents_history_short=c(1, 4, 1, 8, 8),
            latents_history_mid=c(1, 4, 1, 8, 8), latents_history_long=c(1, 4, 4, 8, 8)),
        "2 partial, 1 queries",
    ),
    "HiDreamImageTransformer2DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, patch_size=2, num_layers=1, num_single_layers=1,
            caption_channels=[12, 6], text_emb_dim=6, num_routed_experts=2, num_activated_experts=2,
            axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=(0, 1), force_inference_output=True),
        dict(hidden_states=x(1, 4, 8, 8), timesteps=t(1), encoder_hidden_states_t5=c(1, 5, 12),
            encoder_hidden_states_llama3=c(2, 1, 5, 6), pooled_embeds=c(1, 6)),
        "3 queries",
    ),
    "HunyuanDiT2DModel": Entry(
        HEADS | dict(sample_size=8, patch_size=2, in_channels=4, num_layers=2, cross_attention_dim=12,
            cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=16, text_len=5, text_len_t5=3,
            activation_fn="gelu-approximate"),
        dict(hidden_states=x(1, 4, 8, 8), timestep=t(1, top=900.0), **TEXT, text_embedding_mask=MASK,
            encoder_hidden_states_t5=c(1, 3, 8), text_embedding_mask_t5=torch.ones(1, 3),
            image_meta_size=torch.tensor([[8.0, 8, 8, 8, 0, 0]]), style=torch.zeros(1, dtype=torch.long),
            image_rotary_emb=[c(16, 8), c(16, 8)]),
        "4 partial, 2 queries",
    ),
    "HunyuanImageTransformer2DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1,
            patch_size=(1, 1), text_embed_dim=12, rope_axes_dim=(4, 4)),
        dict(hidden_states=x(1, 4, 4, 4), timestep=t(1, top=900.0), **TEXT, encoder_attention_mask=torch.ones(1, 5)),
        "4 partial, 3 queries",
    ),
    "HunyuanVideo15Transformer3DModel": Entry(
        {k: v for k, v in HUNYUAN.items() if k not in ("num_single_layers", "pooled_projection_dim")} |
            dict(num_layers=2, text_embed_2_dim=10, image_embed_dim=6, target_size=16),
        VIDEO | dict(timestep=t(1, top=900.0), encoder_attention_mask=MASK, encoder_hidden_states_2=c(1, 3, 10),
            encoder_attention_mask_2=torch.ones(1, 3), image_embeds=torch.zeros(1, 2, 6)),
        "3 partial, 3 queries",
    ),
    "HunyuanVideoFramepackTransformer3DModel": Entry(
        HUNYUAN | dict(patch_size=2, guidance_embeds=True, has_image_proj=True, image_proj_dim=6,
            has_clean_x_embedder=True),
        VIDEO | dict(encoder_attention_mask=MASK, pooled_projections=c(1, 6), guidance=torch.tensor([4.0]),
            image_embeds=c(1, 3, 6), indices_latents=torch.arange(2), latents_clean=c(1, 4, 1, 4, 6),
            indices_latents_clean=torch.ones(1), latents_history_2x=c(1, 4, 2, 4, 6),
            indices_latents_history_2x=torch.ones(2), latents_history_4x=c(1, 4, 4, 4, 6),
            indices_latents_history_4x=torch.ones(4)),
        "4 partial, 3 queries",
    ),
    "HunyuanVideoTransformer3DModel": Entry(
        HUNYUAN | dict(guidance_embeds=True),
        VIDEO | dict(encoder_attention_mask=MASK, pooled_projections=c(1, 6), guidance=torch.tensor([4.0])),
        "4 partial, 3 queries",
    ),
    "Ideogram4Transformer2DModel": Entry(
        HEADS | dict(in_channels=4, num_layers=1, intermediate_size=24, adaln_dim=8, llm_features_dim=12,
            mrope_section=(2, 1, 1)),
        dict(hidden_states=x(1, 21, 4), encoder_hidden_states=c(1, 21, 12), timestep=t(1, top=0.9),
            position_ids=torch.arange(63).reshape(1, 21, 3), segment_ids=torch.ones(1, 21, dtype=torch.long),
            indicator=torch.tensor([[3] * 5 + [2] * 16])),
        "1 partial, 1 queries",
    ),
    "JoyImageEditPlusTransformer3DModel": Entry(
        dict(in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=12, num_layers=2, rope_dim_list=[2, 2, 4],
            theta=256),
        VIDEO | dict(hidden_states=x(1, 8, 4, 1, 2, 2), shape_list=[[(1, 2, 2), (1, 2, 2)]]),
        "3 partial, 3 queries",
    ),
    "JoyImageEditTransformer3DModel": Entry(
        dict(in_channels=4, hidden_size=16, num_attention_heads=2, text_dim=12, num_layers=2, rope_dim_list=[2, 2, 4],
            theta=256),
        VIDEO | dict(hidden_states=x(1, 4, 1, 8, 8)),
        "3 partial, 3 queries",
    ),
    "Kandinsky5Transformer3DModel": Entry(
        dict(in_visual_dim=4, in_text_dim=12, in_text_dim2=6, time_dim=8, out_visual_dim=4, model_dim=16, ff_dim=24,
            num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2)),
        dict(hidden_states=x(1, 2, 4, 6, 4), **TEXT, timestep=t(1, top=900.0), pooled_projections=c(1, 6),
            visual_rope_pos=(torch.arange(2), torch.arange(2), torch.arange(3)), text_rope_pos=torch.arange(5)),
        "3 partial, 2 queries",
    ),
    "Kandinsky6SRTransformer3DModel": Entry(
        dict(in_visual_dim=2, out_visual_dim=4, time_dim=8, model_dim=16, ff_dim=24, num_visual_blocks=1,
            axes_dims=(4, 2, 2)),
        dict(hidden_states=x(1, 2, 8, 8, 5), timestep=t(1, top=900.0)),
        "1 partial, 1 reuse", since="2.13",
    ),
    "Kandinsky6Transformer3DModel": Entry(
        dict(in_visual_dim=4, in_text_dim=12, in_text_dim2=6, time_dim=8, out_visual_dim=4, model_dim=16, ff_dim=24,
            num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2), visual_cond=False, in_audio_dim=4,
            out_audio_dim=4, ca_rope=True, cross_gates=True, fix_modulation=True),
        dict(hidden_states=x(1, 2, 4, 6, 4), **TEXT, timestep=t(1, top=900.0), pooled_projections=c(1, 6),
            audio_hidden_states=x(1, 7, 4)),
        "8 partial, 4 queries",
    ),
    "Krea2Transformer2DModel": Entry(
        HEADS | dict(in_channels=4, num_layers=1, num_key_value_heads=1, intermediate_size=24, timestep_embed_dim=8,
            text_hidden_dim=12, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1,
            text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2)),
        dict(hidden_states=x(1, 16, 4), encoder_hidden_states=c(1, 5, 3, 12), timestep=t(1, top=0.9),
            position_ids=torch.cat([torch.zeros(5, 3), grid(4, 4)]), encoder_attention_mask=MASK.bool()),
        "6 partial",
    ),
    "LTX2VideoTransformer3DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
            audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=1,
            caption_channels=12, rope_double_precision=False),
        dict(hidden_states=x(1, 24, 4), audio_hidden_states=x(1, 7, 4), **TEXT, audio_encoder_hidden_states=c(1, 5, 12),
            timestep=t(1, top=900.0), encoder_attention_mask=MASK, num_frames=2, height=3, width=4, audio_num_frames=7,
            fps=25.0),
        "6 partial, 2 queries",
    ),
    "LTXVideoTransformer3DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, cross_attention_dim=16, num_layers=1, caption_channels=12),
        dict(hidden_states=x(1, 24, 4), **TEXT, timestep=t(1), encoder_attention_mask=MASK, num_frames=2, height=3,
            width=4),
        "2 partial, 1 queries",
    ),
    "LatteTransformer3DModel": Entry(
        HEADS | dict(sample_size=8, num_layers=1, patch_size=2, caption_channels=12, in_channels=4,
            cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=3),
        dict(hidden_states=x(1, 4, 3, 8, 8), timestep=t(1), **TEXT),
        "4 partial, 1 queries",
    ),
    "LatteTransformer3DModel/pair": Entry(
        HEADS | dict(sample_size=8, num_layers=1, patch_size=2, caption_channels=12, in_channels=4,
            cross_attention_dim=16, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=3),
        dict(hidden_states=x(2, 4, 3, 8, 8), timestep=t(2), encoder_hidden_states=c(2, 5, 12)),
        "3 partial, 2 queries",
    ),
    "LongCatAudioDiTTransformer": Entry(
        dict(dit_dim=16, dit_depth=1, dit_heads=2, dit_text_dim=12, latent_dim=4, text_conv=False),
        dict(hidden_states=x(1, 16, 4), **TEXT, encoder_attention_mask=MASK.bool(),
            attention_mask=torch.ones(1, 16, dtype=torch.bool), timestep=t(1, top=0.9)),
        "2 partial, 1 queries",
    ),
    "LongCatImageTransformer2DModel": Entry(
        HEADS | ROPE | dict(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12,
            pooled_projection_dim=6),
        FLUX,
        "3 partial, 2 queries",
    ),
    "Lumina2Transformer2DModel": Entry(
        dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
            cap_feat_dim=12),
        dict(hidden_states=x(1, 4, 8, 8), **TEXT, timestep=t(1, top=0.9),
            encoder_attention_mask=torch.ones(1, 5, dtype=torch.bool)),
        "3 partial, 3 queries",
    ),
    "LuminaNextDiT2DModel": Entry(
        dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=8, learn_sigma=False, qk_norm=True, cross_attention_dim=12, scaling_factor=1.0),
        dict(hidden_states=x(1, 4, 8, 8), **TEXT, timestep=t(1, top=0.9), encoder_mask=MASK,
            image_rotary_emb=c(8, 8, 4), cross_attention_kwargs={}),
        "2 partial",
    ),
    "MiniMaxH3Transformer3DModel": Entry(
        HEADS | dict(hidden_size=24, num_layers=1, num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=6,
            text_dim=12, freq_dim=8, time_embed_hidden_dim=24, time_embed_dim=16, rope_freq_dim=1),
        dict(hidden_states=x(1, 8, 16), audio_hidden_states=x(1, 6, 6), encoder_hidden_states=c(1, 5, 12),
            timestep=t(2, top=0.9), timestep_indices=torch.tensor([0] * 5 + [1] * 6 + [0] * 8),
            token_tags=torch.tensor([1] * 5 + [2] * 6 + [0] * 8), position_ids=torch.arange(57.0).reshape(19, 3),
            video_indices=torch.arange(11, 19), audio_indices=torch.arange(5, 11), text_indices=torch.arange(5)),
        "2 partial, 2 queries",
    ),
    "MiniMaxMusic3RVQDepthDecoder": Entry(
        dict(hidden_size=16, num_layers=1, num_attention_heads=2, intermediate_size=24, audio_vocab_size=8,
            num_codebooks=3),
        dict(inputs_embeds=x(1, 8, 16)),
        "1 partial, 1 queries",
    ),
    "MiniMaxMusic3Transformer1DModel": Entry(
        HEADS | dict(in_channels=4, condition_dim=12, num_layers=1, ff_inner_dim=24, rotary_dim=4,
            fourier_embedding_dim=8),
        dict(hidden_states=x(1, 4, 16), encoder_hidden_states=c(1, 16, 12), timestep=t(1, top=0.9)),
        "3 partial, 1 queries",
    ),
    "MochiTransformer3DModel": Entry(
        HEADS | dict(num_layers=1, pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=4,
            max_sequence_length=5),
        VIDEO | dict(encoder_hidden_states=c(1, 5, 16), encoder_attention_mask=MASK.bool()),
        "1 partial, 1 reuse",
    ),
    "MotifVideoTransformer3DModel": Entry(
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=9, out_channels=4, num_layers=1,
            num_single_layers=1, num_decoder_layers=0, patch_size=1, patch_size_t=1, text_embed_dim=12,
            image_embed_dim=4, rope_axes_dim=(4, 4, 4)),
        VIDEO | dict(hidden_states=x(1, 9, 2, 4, 4)),
        "3 partial, 2 queries",
    ),
    "NucleusMoEImageTransformer2DModel": Entry(
        HEADS | ROPE | dict(attention_head_dim=24, axes_dims_rope=(8, 8, 8), in_channels=4, out_channels=4,
            num_layers=1, joint_attention_dim=12, moe_enabled=False, capacity_factors=[8.0, 8.0]),
        dict(hidden_states=x(1, 16, 4), **TEXT, encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.long),
            timestep=t(1, top=0.9), img_shapes=[(1, 4, 4)]),
        "1 partial, 1 queries",
    ),
    "NucleusMoEImageTransformer2DModel/narrow": Entry(
        HEADS | ROPE | dict(in_channels=4, out_channels=4, num_layers=1, joint_attention_dim=12, moe_enabled=False,
            capacity_factors=[8.0, 8.0]),
        dict(hidden_states=x(1, 16, 4), **TEXT, encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.long),
            timestep=t(1, top=0.9), img_shapes=[(1, 4, 4)]),
        "1 partial, 1 queries",
    ),
    "OmniGenTransformer2DModel": Entry(
        dict(in_channels=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
            num_layers=1, pad_token_id=0, vocab_size=20, time_step_dim=8,
            rope_scaling=dict(long_factor=[1, 2, 3, 4], short_factor=[1, 2, 3, 4])),
        dict(hidden_states=x(1, 4, 8, 8), timestep=t(1, top=0.9), input_ids=torch.arange(5)[None], input_img_latents=[],
            input_image_sizes={}, attention_mask=torch.ones(1, 22, 22), position_ids=torch.arange(22)[None]),
        "1 partial, 1 queries",
    ),
    "OvisImageTransformer2DModel": Entry(
        HEADS | ROPE | dict(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12),
        FLUX,
        "3 partial, 2 queries",
    ),
    "PRXTransformer2DModel": Entry(
        dict(in_channels=4, patch_size=2, context_in_dim=12, hidden_size=16, mlp_ratio=2, num_heads=2, depth=1,
            axes_dim=[4, 4]),
        dict(hidden_states=x(1, 4, 8, 8), **TEXT, timestep=t(1, top=0.9)),
        "1 partial, 1 queries",
    ),
    "PixArtTransformer2DModel": Entry(
        HEADS | dict(in_channels=4, num_layers=1, cross_attention_dim=16, sample_size=8, caption_channels=12,
            norm_num_groups=1),
        dict(hidden_states=x(1, 4, 8, 8), **TEXT, timestep=t(1), encoder_attention_mask=MASK,
            added_cond_kwargs=dict(resolution=None, aspect_ratio=None)),
        "2 partial, 1 queries",
    ),
    "PriorTransformer": Entry(
        HEADS | dict(num_layers=1, embedding_dim=8, num_embeddings=7, additional_embeddings=4),
        dict(hidden_states=x(1, 8), timestep=t(1), proj_embedding=c(1, 8), encoder_hidden_states=c(1, 7, 8)),
        "1 partial, 1 queries",
    ),
    "QwenImage21Transformer2DModel": Entry(
        HEADS | ROPE | dict(in_channels=4, out_channels=4, num_layers=2, context_in_dim=12),
        dict(hidden_states=x(1, 16, 4), **TEXT, timestep=t(1, top=0.9), img_shapes=[[(1, 4, 4)]],
            img_mask=torch.tensor([[False] * 5 + [True] * 4])),
        "2 partial, 2 queries",
    ),
    "QwenImageTransformer2DModel": Entry(
        HEADS | ROPE | dict(in_channels=4, out_channels=1, num_layers=2, joint_attention_dim=12),
        dict(hidden_states=x(1, 16, 4), **TEXT, encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.long),
            timestep=t(1, top=0.9), img_shapes=[(1, 4, 4)]),
        "3 partial, 3 queries",
    ),
    "RFD4ProteinaTransformer": Entry(
        dict(nlayers=2, token_dim=16, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=4, token_type_emb_dim=4,
            cath_emb_dim=4, t_emb_dim=8, seq_sep_dim=8, tri_mult_c=8, num_sequence_classes=5,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",)),
        dict(bb_ca=x(1, 12, 3), local_latents=x(1, 12, 4), bb_ca_time=t(1, top=0.9), local_latents_time=t(1, top=0.9),
            padding_mask=torch.ones(1, 12, dtype=torch.bool), token_type=torch.zeros(1, 12, dtype=torch.long),
            conditioning=dict(is_in_context_conditioning=torch.zeros(1, 12), supports_local_latent=torch.ones(1, 12))),
        "7 partial, 1 queries, 1 reuse",
    ),
    "SD3Transformer2DModel": Entry(
        HEADS | dict(sample_size=8, patch_size=2, in_channels=4, num_layers=2, joint_attention_dim=12,
            caption_projection_dim=16, pooled_projection_dim=6, out_channels=4, pos_embed_max_size=8),
        dict(hidden_states=x(1, 4, 8, 8), **TEXT, pooled_projections=c(1, 6), timestep=t(1)),
        "3 partial, 3 queries",
    ),
    "SanaTransformer2DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, sample_size=4, patch_size=1),
        dict(hidden_states=x(1, 4, 4, 4), **TEXT, timestep=t(1), encoder_attention_mask=MASK),
        "1 partial, 1 queries, 1 reuse",
    ),
    "SanaVideoTransformer3DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, sample_size=8,
            rope_max_seq_len=32),
        VIDEO | dict(encoder_attention_mask=MASK),
        "1 partial, 1 queries, 1 reuse",
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Entry(
        HEADS | dict(in_channels=4, out_channels=4, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
            audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=1,
            caption_channels=12, rope_double_precision=False),
        dict(hidden_states=x(1, 24, 4), **TEXT, timestep=t(1, top=900.0),
            video_rotary_emb=(c(1, 24, 16), c(1, 24, 16))),
        "2 partial, 1 queries",
    ),
    "SanaWMTransformer3DModel": Entry(
        dict(in_channels=4, num_layers=2, hidden_size=16, num_attention_heads=2, softmax_every_n=2, linear_head_dim=8,
            caption_channels=12, chunk_plucker_channels=4, mlp_ratio=2.0, image_size=32),
        VIDEO | dict(encoder_hidden_states=c(1, 1, 5, 12), timestep=t(1, 1, 2, top=900.0), mask=MASK),
        "3 partial, 3 reuse",
    ),
    "SkyReelsV2Transformer3DModel": Entry(
        WAN,
        VIDEO,
        "2 partial, 1 queries",
    ),
    "StableAudio3DiTModel": Entry(
        dict(io_channels=4, embed_dim=16, depth=1, num_heads=2, cond_token_dim=12, global_cond_dim=6,
            local_add_cond_dim=5, timestep_features_dim=8, ff_mult=2.0, num_memory_tokens=3),
        dict(hidden_states=x(1, 4, 16), **TEXT, timestep=t(1, top=0.9), global_hidden_states=c(1, 6)),
        "4 partial, 1 queries",
    ),
    "StableAudioDiTModel": Entry(
        HEADS | dict(sample_size=16, in_channels=4, out_channels=4, num_layers=1, num_key_value_attention_heads=1,
            cross_attention_dim=8, time_proj_dim=8, global_states_input_dim=6, cross_attention_input_dim=12),
        dict(hidden_states=x(1, 4, 16), **TEXT, timestep=t(1, top=0.9), global_hidden_states=c(1, 1, 6),
            rotary_embedding=(c(17, 4), c(17, 4))),
        "4 partial, 1 queries",
    ),
    "T5FilmDecoder": Entry(
        dict(input_dims=6, targets_length=16, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=24),
        dict(encodings_and_masks=[(c(1, 5, 16), torch.ones(1, 5))], decoder_input_tokens=x(1, 16, 6),
            decoder_noise_time=t(1, top=0.9)),
        "2 partial, 1 queries",
    ),
    "Transformer2DModel": Entry(
        HEADS | dict(in_channels=8, num_layers=1, norm_num_groups=2, cross_attention_dim=12),
        dict(hidden_states=x(1, 8, 4, 4), **TEXT),
        "2 partial, 1 queries",
    ),
    "TransformerTemporalModel": Entry(
        HEADS | dict(in_channels=8, num_layers=1, norm_num_groups=2),
        dict(hidden_states=x(6, 8, 4, 4), num_frames=6),
        "1 partial, 2 queries",
    ),
    "WanAnimate2Transformer3DModel": Entry(
        dict(text_len=5, in_dim=8, dim=32, ffn_dim=24, freq_dim=8, text_dim=12, out_dim=4, num_heads=2, num_layers=2,
            use_img_emb=False),
        dict(hidden_states=[x(4, 2, 4, 4)], timestep=t(1, top=900.0), encoder_hidden_states=[c(5, 12)],
            condition_latents=[c(4, 2, 4, 4)], seq_len=8, offset_grid_sizes=torch.tensor([[2, 2, 2]]),
            kv_cache=lambda random, step: wan_cache(), kv_cache_mode="extract"),
        "2 partial",
    ),
    "WanAnimateTransformer3DModel": Entry(
        WAN | dict(in_channels=12, latent_channels=4, image_dim=6,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=4,
            motion_dim=2, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
            inject_face_latents_blocks=1),
        dict(hidden_states=x(1, 12, 3, 4, 6), timestep=t(1), **TEXT, encoder_hidden_states_image=c(1, 3, 6),
            pose_hidden_states=c(1, 4, 2, 4, 6), face_pixel_values=c(1, 3, 5, 16, 16)),
        "3 partial, 1 queries",
    ),
    "WanTransformer3DModel": Entry(
        WAN | dict(num_layers=2),
        VIDEO,
        "4 partial, 2 queries",
    ),
    "WanVACETransformer3DModel": Entry(
        WAN | dict(vace_layers=[0], vace_in_channels=6),
        VIDEO | dict(control_hidden_states=c(1, 6, 2, 4, 6)),
        "4 partial, 2 queries",
    ),
    "ZImageTransformer2DModel": Entry(
        dict(in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
            axes_dims=[4, 2, 2], axes_lens=[64, 32, 32]),
        dict(x=[x(4, 1, 8, 8)], cap_feats=[c(5, 12)], t=t(1, top=0.9)),
        "3 partial, 3 queries",
    ),
}
# fmt: on
