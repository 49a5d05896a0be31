"""Small configurations of the image and audio classes of ``diffusers.models.transformers``, and what is in them."""

from __future__ import annotations

import torch
from diffusers.models import transformers as zoo
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVCache,
    Flux2KVParallelSelfAttnProcessor,
)
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch import Generator, Tensor, nn

from tests.zoo.case import Case

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = {**HEADS, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8)}

EXCLUDED: dict[str, str] = {
    "MiniMaxMusic3RVQDepthDecoder": "no denoiser: it continues a sequence token by token and takes no timestep",
}


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def full(value: float, batch: int = 2) -> Tensor:
    return torch.full((batch,), value)


def mask(*lengths: int, dtype: torch.dtype = torch.long) -> Tensor:
    """One row for each sample, ones for its tokens and zeros for the padding."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(dtype)


def grid(height: int, width: int, axes: int = 3) -> Tensor:
    """Positions ``[height * width, axes]``, the row and the column last."""
    ids = torch.zeros(height, width, axes)
    ids[..., -2] += torch.arange(height)[:, None]
    ids[..., -1] += torch.arange(width)
    return ids.view(-1, axes)


def with_processors(model: nn.Module, **processors: type) -> nn.Module:
    """The model with another attention processor for each named class of its attentions."""
    for module in model.modules():
        if type(module).__name__ in processors:
            module.set_processor(processors[type(module).__name__]())
    return model


def dual_transformer() -> nn.Module:
    model = zoo.DualTransformer2DModel(**HEADS, in_channels=4, norm_num_groups=2, cross_attention_dim=8)
    model.condition_lengths = [3, 4]  # of the prompt and of the image, end to end in encoder_hidden_states
    return model


def flux2_cache(g: Generator) -> Flux2KVCache:
    cache = Flux2KVCache(2, 2)
    cache.num_ref_tokens = 3
    for layer in (*cache.double_block_caches, *cache.single_block_caches):
        layer.store(normal(g, 2, 3, 2, 16), normal(g, 2, 3, 2, 16))
    return cache


def qwen_cache(g: Generator) -> QwenImage21KVCache:
    cache = QwenImage21KVCache(2)
    for layer in cache.layer_caches:
        layer.store(normal(g, 2, 5, 2, 16), normal(g, 2, 5, 2, 16))
    return cache


def glm_cache(g: Generator) -> GlmImageKVCache:
    cache = GlmImageKVCache(2)
    for layer in cache.caches:
        layer.store(normal(g, 1, 3, 2, 16), normal(g, 1, 3, 2, 16))
    cache.set_mode("read")
    return cache


CASES: dict[str, Case] = {
    "DiTTransformer2DModel": Case(
        make=lambda: zoo.DiTTransformer2DModel(
            **HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=1000
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "timestep": full(800),
            "class_labels": torch.tensor([1, 2]),
        },
        timestep="timestep",
        sites=2,
    ),
    "PixArtTransformer2DModel": Case(
        make=lambda: zoo.PixArtTransformer2DModel(
            **{**HEADS, "attention_head_dim": 24}, num_layers=2, sample_size=8, cross_attention_dim=48,
            caption_channels=8, use_additional_conditions=True,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_attention_mask": mask(5, 3),
            "timestep": full(800),
            "added_cond_kwargs": {"resolution": normal(g, 2, 2), "aspect_ratio": normal(g, 2, 1)},
        },
        timestep="timestep",
        sites=4,
    ),
    "SD3Transformer2DModel": Case(
        make=lambda: zoo.SD3Transformer2DModel(
            **HEADS, sample_size=8, in_channels=4, num_layers=3, joint_attention_dim=8, caption_projection_dim=32,
            pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "pooled_projections": normal(g, 2, 8),
            "timestep": full(800.0),
        },
        timestep="timestep",
        sites=3,
        note="the last block drops its text",
    ),
    "SD3Transformer2DModel:dual": Case(
        make=lambda: zoo.SD3Transformer2DModel(
            **HEADS, sample_size=8, in_channels=4, num_layers=3, joint_attention_dim=8, caption_projection_dim=32,
            pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "pooled_projections": normal(g, 2, 8),
            "timestep": full(800.0),
        },
        timestep="timestep",
        sites=5,
        note="SD3.5: a second attention over the image alone in the first blocks",
    ),
    "FluxTransformer2DModel": Case(
        make=lambda: zoo.FluxTransformer2DModel(
            **FLUX, in_channels=4, pooled_projection_dim=8, guidance_embeds=True
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "pooled_projections": normal(g, 2, 8),
            "timestep": full(0.8),
            "img_ids": grid(3, 4),
            "txt_ids": torch.zeros(5, 3),
            "guidance": full(3.5),
        },
        timestep="timestep",
        sites=4,
    ),
    "Flux2Transformer2DModel": Case(
        make=lambda: zoo.Flux2Transformer2DModel(
            **{**FLUX, "axes_dims_rope": (4, 4, 4, 4)}, in_channels=4, timestep_guidance_channels=16
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "timestep": full(0.8),
            "img_ids": grid(3, 4, 4),
            "txt_ids": torch.zeros(5, 4),
            "guidance": full(3.5),
        },
        timestep="timestep",
        sites=4,
        note="the single blocks' attention module holds the MLP too",
    ),
    "QwenImageTransformer2DModel": Case(
        make=lambda: zoo.QwenImageTransformer2DModel(
            **HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8)
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 16),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "encoder_hidden_states_mask": mask(5, 3),
            "timestep": full(0.8),
            "img_shapes": [[(1, 3, 4)], [(1, 3, 4)]],
        },
        timestep="timestep",
        sites=2,
    ),
    "SanaTransformer2DModel": Case(
        make=lambda: zoo.SanaTransformer2DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=8, sample_size=8,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_attention_mask": mask(5, 3),
            "timestep": full(800),
        },
        timestep="timestep",
        sites=4,
        note="self-attention is linear, in two products without a softmax",
    ),
    "AuraFlowTransformer2DModel": Case(
        make=lambda: zoo.AuraFlowTransformer2DModel(
            **HEADS, sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, joint_attention_dim=8,
            caption_projection_dim=32, pos_embed_max_size=16,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "timestep": full(0.8),
        },
        timestep="timestep",
        sites=4,
    ),
    "Lumina2Transformer2DModel": Case(
        make=lambda: zoo.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
            num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=8,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_attention_mask": mask(5, 3, dtype=torch.bool),
            "timestep": full(0.8),
        },
        timestep="timestep",
        sites=4,
        breaks=1,
        note="breaks where prompts of different lengths are put into one tensor",
    ),
    "LuminaNextDiT2DModel": Case(
        make=lambda: zoo.LuminaNextDiT2DModel(
            sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2,
            multiple_of=16, cross_attention_dim=8,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_mask": mask(5, 3),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 16, 16),
            "cross_attention_kwargs": {},
            "timestep": full(0.8),
        },
        timestep="timestep",
        sites=4,
        note="self- and cross-attention are summed before the one projection of both",
    ),
    "ChromaTransformer2DModel": Case(
        make=lambda: zoo.ChromaTransformer2DModel(
            **FLUX, in_channels=4, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "timestep": full(0.8),
            "img_ids": grid(3, 4),
            "txt_ids": torch.zeros(5, 3),
            "attention_mask": mask(17, 15, dtype=torch.bool),
        },
        timestep="timestep",
        sites=4,
    ),
    "HiDreamImageTransformer2DModel": Case(
        make=lambda: zoo.HiDreamImageTransformer2DModel(
            **HEADS, patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, caption_channels=[8, 12],
            text_emb_dim=8, num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(8, 4, 4),
            max_resolution=(8, 8), llama_layers=[0, 1],
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states_t5": normal(g, 2, 5, 8),
            "encoder_hidden_states_llama3": normal(g, 2, 2, 5, 12),
            "pooled_embeds": normal(g, 2, 8),
            "timesteps": full(800.0),
        },
        timestep="timesteps",
        sites=2,
        breaks=4,
        captures=17,
        note="mixture of experts, token by token: Dynamo steps over the model's own forward and the blocks'",
    ),
    "ZImageTransformer2DModel": Case(
        make=lambda: zoo.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
            axes_dims=[4, 4, 8], axes_lens=[128, 64, 64],
        ),
        inputs=lambda g: {
            "x": [normal(g, 4, 1, 8, 8) for _ in range(2)],
            "cap_feats": [normal(g, 5, 8), normal(g, 3, 8)],
            "t": full(0.8),
        },
        timestep="t",
        varies=("x",),
        sites=4,
    ),
    "OmniGenTransformer2DModel": Case(
        make=lambda: zoo.OmniGenTransformer2DModel(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=2,
            pad_token_id=0, vocab_size=100, max_position_embeddings=64, original_max_position_embeddings=32,
            pos_embed_max_size=16, time_step_dim=16,
            rope_scaling={"long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]},
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "timestep": full(0.8),
            "input_ids": torch.randint(1, 100, (2, 9), generator=g),
            "input_img_latents": [normal(g, 1, 4, 4, 4)],
            "input_image_sizes": {0: [[2, 6]]},
            "attention_mask": mask(26, 24)[:, None, :].expand(2, 26, 26).contiguous(),
            "position_ids": torch.arange(26).repeat(2, 1),
        },
        timestep="timestep",
        sites=2,
        breaks=2,
        captures=4,
        note="breaks where the rotary table is chosen by the largest position",
    ),
    "HunyuanDiT2DModel": Case(
        make=lambda: zoo.HunyuanDiT2DModel(
            **HEADS, in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=4, mlp_ratio=2.0,
            cross_attention_dim=8, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=5, text_len_t5=6,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "timestep": full(800.0),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "text_embedding_mask": mask(5, 3),
            "encoder_hidden_states_t5": normal(g, 2, 6, 16),
            "text_embedding_mask_t5": mask(6, 2),
            "image_meta_size": normal(g, 2, 6),
            "style": torch.tensor([0, 0]),
            "image_rotary_emb": (normal(g, 16, 16), normal(g, 16, 16)),
        },
        timestep="timestep",
        sites=9,
        note="long skips, and the prompt is pooled by an attention of its own",
    ),
    "PriorTransformer": Case(
        make=lambda: zoo.PriorTransformer(
            **HEADS, num_layers=2, embedding_dim=8, num_embeddings=5, additional_embeddings=4
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 8),
            "timestep": full(800),
            "proj_embedding": normal(g, 2, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "attention_mask": mask(5, 3, dtype=torch.bool),
        },
        timestep="timestep",
        sites=2,
        note="causal",
    ),
    "StableAudioDiTModel": Case(
        make=lambda: zoo.StableAudioDiTModel(
            **HEADS, sample_size=6, in_channels=4, num_layers=2, num_key_value_attention_heads=1, out_channels=4,
            cross_attention_dim=32, time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=12,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 6),
            "timestep": full(0.8),
            "encoder_hidden_states": normal(g, 2, 5, 12),
            "global_hidden_states": normal(g, 2, 1, 8),
            "rotary_embedding": (normal(g, 7, 8), normal(g, 7, 8)),
            "attention_mask": mask(6, 4, dtype=torch.bool),
            "encoder_attention_mask": mask(5, 3, dtype=torch.bool),
        },
        timestep="timestep",
        sites=4,
        breaks=1,
        captures=1,
        note="breaks when all is done: the class it returns says that it is deprecated",
    ),
    "StableAudio3DiTModel": Case(
        make=lambda: zoo.StableAudio3DiTModel(
            io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=12, global_cond_dim=8,
            local_add_cond_dim=5, timestep_features_dim=8, ff_mult=2.0, num_memory_tokens=3,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 6),
            "timestep": full(0.8),
            "encoder_hidden_states": normal(g, 2, 5, 12),
            "global_hidden_states": normal(g, 2, 8),
            "encoder_attention_mask": mask(5, 3),
            "local_add_cond": normal(g, 2, 5, 6),
        },
        timestep="timestep",
        sites=4,
        note="differential attention: a site is the difference of two products",
    ),
    "T5FilmDecoder": Case(
        make=lambda: zoo.T5FilmDecoder(
            input_dims=8, targets_length=6, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=32
        ),
        inputs=lambda g: {
            "encodings_and_masks": [
                (normal(g, 2, 5, 32), mask(5, 3).float()),
                (normal(g, 2, 4, 32), mask(4, 4).float()),
            ],
            "decoder_input_tokens": normal(g, 2, 6, 8),
            "decoder_noise_time": full(0.8),
        },
        timestep="decoder_noise_time",
        varies=("decoder_input_tokens",),
        sites=4,
        note="attention written out in products, without scaled_dot_product_attention",
    ),
    "Transformer2DModel": Case(
        make=lambda: zoo.Transformer2DModel(
            **HEADS, in_channels=4, num_layers=2, norm_num_groups=2, cross_attention_dim=8, num_embeds_ada_norm=1000,
            norm_type="ada_norm",
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 4, 4),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_attention_mask": mask(5, 3),
            "timestep": torch.tensor(800),
        },
        timestep="timestep",
        sites=4,
        breaks=1,
        captures=1,
        note="as in a UNet; ada_norm takes one timestep for the whole batch",
    ),
    "Transformer2DModel:patches": Case(
        make=lambda: zoo.Transformer2DModel(
            **HEADS, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, attention_bias=True,
            sample_size=8, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
            norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=12,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 12),
            "timestep": full(800),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        timestep="timestep",
        sites=4,
        breaks=1,
        captures=1,
    ),
    "DualTransformer2DModel": Case(
        make=dual_transformer,
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 4, 4),
            "encoder_hidden_states": normal(g, 2, 7, 8),
            "timestep": full(800),
        },
        timestep="timestep",
        sites=4,
        note="two stacks, one for the prompt and one for an image, mixed",
    ),
    "DreamLiteTransformer2DModel": Case(
        make=lambda: zoo.DreamLiteTransformer2DModel(
            **HEADS, in_channels=32, num_layers=2, norm_num_groups=2, cross_attention_dim=8, qk_norm="rms_norm",
            ff_mult=2, use_linear_projection=True,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 32, 4, 4),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_attention_mask": mask(5, 3),
            "timestep": full(800),
        },
        timestep="timestep",
        sites=4,
        breaks=1,
        captures=1,
        note="a part of a UNet",
    ),
    "AceStepTransformer1DModel": Case(
        make=lambda: zoo.AceStepTransformer1DModel(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=2, encoder_hidden_size=8,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "timestep": full(0.8),
            "timestep_r": full(0.1),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "context_latents": normal(g, 2, 12, 8),
        },
        timestep="timestep",
        sites=4,
        note="a sliding window in every other layer",
    ),
    "BriaTransformer2DModel": Case(
        make=lambda: zoo.BriaTransformer2DModel(**FLUX, in_channels=4, pooled_projection_dim=8),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "timestep": full(800.0),
            "img_ids": grid(3, 4),
            "txt_ids": torch.zeros(5, 3),
        },
        timestep="timestep",
        sites=4,
    ),
    "BriaFiboTransformer2DModel": Case(
        make=lambda: zoo.BriaFiboTransformer2DModel(
            **FLUX, in_channels=4, pooled_projection_dim=8, text_encoder_dim=12, guidance_embeds=True
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "text_encoder_layers": [normal(g, 2, 5, 12) for _ in range(4)],
            "timestep": full(800.0),
            "img_ids": grid(3, 4),
            "txt_ids": torch.zeros(5, 3),
            "guidance": full(5.0),
        },
        timestep="timestep",
        sites=4,
    ),
    "BriaFibo2Transformer2DModel": Case(
        make=lambda: zoo.BriaFibo2Transformer2DModel(
            in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, cap_feat_dim=8, injection_layer_ids=(1,),
            perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=4, gist_step=2, gist_min_text_len=2,
            gist_max_text_len=8, axes_dims=(4, 4, 8), axes_lens=(64, 64, 64),
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "timestep": full(0.8),
            "encoder_hidden_states": normal(g, 2, 2, 7, 8),
            "encoder_attention_mask": mask(7, 3, dtype=torch.bool),
            "context_latents": [normal(g, 2, 4, 4, 4)],
        },
        timestep="timestep",
        sites=7,
        breaks=1,
        note="breaks where the lengths of the prompts are read off their mask",
    ),
    "CogView3PlusTransformer2DModel": Case(
        make=lambda: zoo.CogView3PlusTransformer2DModel(
            **HEADS, in_channels=4, num_layers=2, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=2,
            pos_embed_max_size=8, sample_size=8,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "timestep": full(800),
            "original_size": torch.tensor([[8.0, 8.0]] * 2),
            "target_size": torch.tensor([[8.0, 8.0]] * 2),
            "crop_coords": torch.zeros(2, 2),
        },
        timestep="timestep",
        sites=2,
    ),
    "CogView4Transformer2DModel": Case(
        make=lambda: zoo.CogView4Transformer2DModel(
            **HEADS, in_channels=4, num_layers=2, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=2,
            pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8),
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "timestep": full(800),
            "original_size": torch.tensor([[8.0, 8.0]] * 2),
            "target_size": torch.tensor([[8.0, 8.0]] * 2),
            "crop_coords": torch.zeros(2, 2),
        },
        timestep="timestep",
        sites=2,
    ),
    "ErnieImageTransformer2DModel": Case(
        make=lambda: zoo.ErnieImageTransformer2DModel(
            hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4, out_channels=4,
            text_in_dim=8, rope_axes_dim=(4, 4, 8),
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 4, 4),
            "timestep": full(800.0),
            "text_bth": normal(g, 2, 5, 8),
            "text_lens": torch.tensor([5, 3]),
        },
        timestep="timestep",
        sites=2,
        note="tokens first: [sequence, batch, channels]",
    ),
    "Flux3Transformer2DModel": Case(
        make=lambda: zoo.Flux3Transformer2DModel(
            **{**FLUX, "num_layers": 1, "axes_dims_rope": (4, 4, 4, 4)}, in_channels=4, cond_in_channels=4,
            timestep_channels=16,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "timestep": full(0.8),
            "img_ids": grid(3, 4, 4),
            "txt_ids": torch.zeros(5, 4),
            "image_cond_hidden_states": normal(g, 2, 6, 4),
            "image_cond_ids": grid(3, 2, 4),
        },
        timestep="timestep",
        sites=5,
        note="a stack for each stream, then a joint one",
    ),
    "GlmImageTransformer2DModel": Case(
        make=lambda: zoo.GlmImageTransformer2DModel(
            **HEADS, in_channels=4, num_layers=2, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=2,
            prior_vq_quantizer_codebook_size=20,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "prior_token_id": torch.randint(20, (2, 16), generator=g),
            "prior_token_drop": torch.tensor([False, True])[:, None].expand(2, 16),
            "timestep": full(800),
            "target_size": torch.tensor([[8.0, 8.0]] * 2),
            "crop_coords": torch.zeros(2, 2),
        },
        timestep="timestep",
        sites=2,
        note="a boolean mask says which tokens are dropped",
    ),
    "HunyuanImageTransformer2DModel": Case(
        make=lambda: zoo.HunyuanImageTransformer2DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1,
            guidance_embeds=True, text_embed_dim=8, rope_axes_dim=(8, 8), use_meanflow=True,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 4, 4),
            "timestep": full(800.0),
            "timestep_r": full(600.0),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_attention_mask": mask(5, 3),
            "guidance": full(3500.0),
        },
        timestep="timestep",
        sites=5,
    ),
    "HunyuanImageTransformer2DModel:glyphs": Case(
        make=lambda: zoo.HunyuanImageTransformer2DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1,
            text_embed_dim=8, text_embed_2_dim=12, rope_axes_dim=(8, 8),
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 4, 4),
            "timestep": full(800.0),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_attention_mask": mask(5, 3),
            "encoder_hidden_states_2": normal(g, 2, 4, 12),
            "encoder_attention_mask_2": mask(4, 2),
        },
        timestep="timestep",
        sites=5,
        captures=9,
        note="two texts are put together by their masks in a loop: Dynamo steps over the model's own forward",
    ),
    "Ideogram4Transformer2DModel": Case(
        make=lambda: zoo.Ideogram4Transformer2DModel(
            **HEADS, in_channels=4, num_layers=2, intermediate_size=32, adaln_dim=8, llm_features_dim=12,
            mrope_section=(4, 2, 2),
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 17, 4),
            "timestep": full(0.8),
            "encoder_hidden_states": normal(g, 2, 17, 12),
            "position_ids": torch.cat([torch.arange(5)[:, None].expand(5, 3), grid(3, 4).long()])[None].repeat(2, 1, 1),
            "segment_ids": torch.tensor([[1] * 17, [0] * 2 + [1] * 15]),
            "indicator": torch.tensor([[3] * 5 + [2] * 12, [0] * 2 + [3] * 3 + [2] * 12]),
        },
        timestep="timestep",
        sites=2,
    ),
    "JoyImageEditTransformer3DModel": Case(
        make=lambda: zoo.JoyImageEditTransformer3DModel(
            in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=8, mlp_width_ratio=2.0, num_layers=2,
            rope_dim_list=[4, 4, 8],
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 2, 4, 1, 4, 6),
            "timestep": full(800.0),
            "encoder_hidden_states": normal(g, 2, 5, 8),
        },
        timestep="timestep",
        sites=2,
        note="an image to edit rides along as a second item",
    ),
    "JoyImageEditPlusTransformer3DModel": Case(
        make=lambda: zoo.JoyImageEditPlusTransformer3DModel(
            in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=8, mlp_width_ratio=2.0, num_layers=2,
            rope_dim_list=[4, 4, 8],
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 10, 4, 1, 2, 2),
            "timestep": full(800.0),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_hidden_states_mask": mask(5, 3),
            "shape_list": [[(1, 2, 3), (1, 2, 2)], [(1, 2, 3)]],
        },
        timestep="timestep",
        sites=2,
        note="images of different sizes in one batch",
    ),
    "Krea2Transformer2DModel": Case(
        make=lambda: zoo.Krea2Transformer2DModel(
            **HEADS, in_channels=4, num_layers=2, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8,
            text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
            text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8),
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 3, 16),
            "timestep": full(0.8),
            "position_ids": torch.cat([torch.zeros(5, 3), grid(3, 4)]),
            "encoder_attention_mask": mask(5, 3, dtype=torch.bool),
        },
        timestep="timestep",
        sites=4,
        note="the text's layers attend to each other, token by token",
    ),
    "LongCatAudioDiTTransformer": Case(
        make=lambda: zoo.LongCatAudioDiTTransformer(
            dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=8, latent_dim=4, ff_mult=2.0
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 6, 4),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_attention_mask": mask(5, 3, dtype=torch.bool),
            "timestep": full(0.8),
            "attention_mask": mask(6, 4, dtype=torch.bool),
            "latent_cond": normal(g, 2, 6, 4),
        },
        timestep="timestep",
        sites=4,
    ),
    "LongCatImageTransformer2DModel": Case(
        make=lambda: zoo.LongCatImageTransformer2DModel(**FLUX, in_channels=4, pooled_projection_dim=8),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "timestep": full(0.8),
            "img_ids": grid(3, 4),
            "txt_ids": torch.zeros(5, 3),
        },
        timestep="timestep",
        sites=4,
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        make=lambda: zoo.MiniMaxMusic3Transformer1DModel(
            **HEADS, in_channels=4, condition_dim=8, num_layers=2, ff_inner_dim=32, rotary_dim=8,
            fourier_embedding_dim=8,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 6),
            "timestep": full(0.8),
            "encoder_hidden_states": normal(g, 2, 6, 8),
        },
        timestep="timestep",
        sites=2,
    ),
    "NucleusMoEImageTransformer2DModel": Case(
        make=lambda: zoo.NucleusMoEImageTransformer2DModel(
            **HEADS, in_channels=16, out_channels=4, num_layers=3, num_key_value_heads=1, joint_attention_dim=8,
            axes_dims_rope=(4, 4, 8), mlp_ratio=2.0, dense_moe_strategy="leave_first_block_dense", num_experts=4,
            moe_intermediate_dim=16, capacity_factors=2.0,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 16),
            "img_shapes": [(1, 3, 4), (1, 3, 4)],
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_hidden_states_mask": mask(5, 3, dtype=torch.bool),
            "timestep": full(0.8),
        },
        timestep="timestep",
        sites=3,
        note="mixture of experts that choose their tokens",
    ),
    "OvisImageTransformer2DModel": Case(
        make=lambda: zoo.OvisImageTransformer2DModel(**FLUX, in_channels=4, out_channels=4),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "timestep": full(0.8),
            "img_ids": grid(3, 4),
            "txt_ids": torch.zeros(5, 3),
        },
        timestep="timestep",
        sites=4,
    ),
    "PRXTransformer2DModel": Case(
        make=lambda: zoo.PRXTransformer2DModel(
            in_channels=4, context_in_dim=8, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "timestep": full(0.8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "attention_mask": mask(5, 3, dtype=torch.bool),
        },
        timestep="timestep",
        sites=2,
    ),
    "QwenImage21Transformer2DModel": Case(
        make=lambda: zoo.QwenImage21Transformer2DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, context_in_dim=8, axes_dims_rope=(4, 4, 8)
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 16, 4),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "timestep": full(0.8),
            "img_shapes": [[(1, 4, 4)], [(1, 4, 4)]],
            "img_mask": torch.tensor([[False] * 5 + [True] * 4] * 2),
            "encoder_hidden_states_mask": mask(5, 3),
        },
        timestep="timestep",
        sites=2,
        breaks=8,
        captures=11,
        note="lays out its tokens by values: many breaks before the first block",
    ),
    "FluxTransformer2DModel:controlnet": Case(
        make=lambda: zoo.FluxTransformer2DModel(**FLUX, in_channels=4, pooled_projection_dim=8),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "pooled_projections": normal(g, 2, 8),
            "timestep": full(0.8),
            "img_ids": grid(3, 4),
            "txt_ids": torch.zeros(5, 3),
            "controlnet_block_samples": [normal(g, 2, 12, 32)],
            "controlnet_single_block_samples": [normal(g, 2, 12, 32) for _ in range(2)],
        },
        timestep="timestep",
        varies=("hidden_states", "controlnet_block_samples"),
        sites=4,
    ),
    "Flux2Transformer2DModel:cached": Case(
        make=lambda: with_processors(
            zoo.Flux2Transformer2DModel(
                **{**FLUX, "axes_dims_rope": (4, 4, 4, 4)}, in_channels=4, timestep_guidance_channels=16,
                guidance_embeds=False,
            ),
            Flux2Attention=Flux2KVAttnProcessor, Flux2ParallelSelfAttention=Flux2KVParallelSelfAttnProcessor,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 12, 4),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "timestep": full(0.8),
            "img_ids": grid(3, 4, 4),
            "txt_ids": torch.zeros(5, 4),
            "kv_cache": flux2_cache(g),
            "kv_cache_mode": "cached",
        },
        timestep="timestep",
        sites=4,
        note="keys and values of the picture to edit come from diffusers' own cache",
    ),
    "QwenImageTransformer2DModel:edit": Case(
        make=lambda: zoo.QwenImageTransformer2DModel(
            **HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
            zero_cond_t=True,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 18, 16),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "encoder_hidden_states_mask": mask(5, 3),
            "timestep": full(0.8),
            "img_shapes": [[(1, 3, 4), (1, 2, 3)]] * 2,
        },
        timestep="timestep",
        sites=2,
        note="the picture to edit is modulated as if it were without noise",
    ),
    "QwenImageTransformer2DModel:layered": Case(
        make=lambda: zoo.QwenImageTransformer2DModel(
            **HEADS, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
            use_additional_t_cond=True, use_layer3d_rope=True,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 24, 16),
            "encoder_hidden_states": normal(g, 2, 5, 16),
            "encoder_hidden_states_mask": mask(5, 5),
            "timestep": full(0.8),
            "img_shapes": [[(1, 3, 4), (1, 3, 4)]] * 2,
            "additional_t_cond": torch.tensor([0, 0]),
        },
        timestep="timestep",
        sites=2,
    ),
    "QwenImage21Transformer2DModel:cached": Case(
        make=lambda: zoo.QwenImage21Transformer2DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, context_in_dim=8, axes_dims_rope=(4, 4, 8)
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 16, 4),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "timestep": full(0.8),
            "img_shapes": [[(1, 4, 4)], [(1, 4, 4)]],
            "img_mask": torch.tensor([[False] * 5 + [True] * 4] * 2),
            "kv_cache": qwen_cache(g),
            "kv_cache_mode": "cached",
        },
        timestep="timestep",
        sites=2,
        breaks=3,
        captures=6,
        note="keys and values of the prompt come from diffusers' own cache",
    ),
    "GlmImageTransformer2DModel:cached": Case(
        make=lambda: zoo.GlmImageTransformer2DModel(
            **HEADS, in_channels=4, num_layers=2, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=2,
            prior_vq_quantizer_codebook_size=20,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "prior_token_id": torch.randint(20, (2, 16), generator=g),
            "prior_token_drop": torch.tensor([False, True])[:, None].expand(2, 16),
            "timestep": full(800),
            "target_size": torch.tensor([[8.0, 8.0]] * 2),
            "crop_coords": torch.zeros(2, 2),
            "kv_caches": glm_cache(g),
        },
        timestep="timestep",
        sites=2,
        note="keys and values of the picture to edit come from diffusers' own cache",
    ),
    "SanaTransformer2DModel:sprint": Case(
        make=lambda: zoo.SanaTransformer2DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=8, sample_size=8,
            guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0,
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 8, 8),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "encoder_attention_mask": mask(5, 3),
            "timestep": full(0.8),
            "guidance": full(0.45),
        },
        timestep="timestep",
        sites=4,
    ),
    "Transformer2DModel:gligen": Case(
        make=lambda: zoo.Transformer2DModel(
            **HEADS, in_channels=4, num_layers=2, norm_num_groups=2, cross_attention_dim=8, attention_type="gated"
        ),
        inputs=lambda g: {
            "hidden_states": normal(g, 2, 4, 4, 4),
            "encoder_hidden_states": normal(g, 2, 5, 8),
            "timestep": full(800),
            "cross_attention_kwargs": {"gligen": {"objs": normal(g, 2, 3, 8)}},
        },
        timestep="timestep",
        sites=6,
        breaks=1,
        captures=1,
        note="a third attention, over objects and their boxes",
    ),
    "RFD4ProteinaTransformer": Case(
        make=lambda: zoo.RFD4ProteinaTransformer(
            nlayers=2, token_dim=32, nheads=2, dim_cond=8, pair_repr_dim=8, latent_dim=4, t_emb_dim=8,
            token_type_emb_dim=4, xt_pair_dist_dim=6, tri_mult_c=8, num_sequence_classes=5,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
            feats_pair_repr=("xt_bb_ca_pair_dists", "bond_mask"),
        ),
        inputs=lambda g: {
            "bb_ca": normal(g, 2, 6, 3),
            "local_latents": normal(g, 2, 6, 4),
            "bb_ca_time": full(0.8),
            "local_latents_time": full(0.8),
            "padding_mask": mask(6, 4),
            "token_type": torch.randint(7, (2, 6), generator=g),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(2, 6),
                "supports_local_latent": torch.ones(2, 6),
            },
            "recycle_depth": 2,
        },
        timestep="bb_ca_time",
        varies=("bb_ca", "local_latents"),
        sites=4,
        note="folds proteins: pair bias, and its two layers run twice in one evaluation",
    ),
}  # fmt: skip
