"""The video, 3D, omni and world transformers of diffusers, each with a small configuration of our own.

A configuration has every kind of attention that its class has (self, cross, image cross, token refiner, audio, control
branch), two heads at the least, and few tokens; nothing else is meant by its numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import ModelMixin
from diffusers.models import transformers as zoo
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Generator, Tensor

from tests.zoo.case import Case

WAN_TEXT_TOKENS = 512  # written into WanAttnProcessor: what precedes the last 512 keys is the image


def _real(g: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


def _time(value: float = 800.0, *shape: int) -> Tensor:
    return torch.full(shape or (2,), value)


def _mask(*lengths: int, size: int) -> Tensor:
    """A text mask ``[B, size]``, 1 for the first ``lengths[b]`` tokens."""
    return (torch.arange(size) < torch.tensor(lengths)[:, None]).long()


def _rotary(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens)[:, None] / torch.arange(1, width + 1)
    return angles.cos(), angles.sin()


_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
_WAN_IMAGE = {**_WAN, "image_dim": 8, "added_kv_proj_dim": 24}


def _wan(g: Generator, *, frames: int = 2, channels: int = 4, text: int = 6) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, channels, frames, 6, 8),
        "timestep": _time(),
        "encoder_hidden_states": _real(g, 2, text, 16),
    }


def _wan_image(g: Generator, **sizes: int) -> dict[str, Any]:
    return {**_wan(g, text=WAN_TEXT_TOKENS, **sizes), "encoder_hidden_states_image": _real(g, 2, 5, 8)}


def _skyreels_forcing(g: Generator) -> dict[str, Any]:
    return {
        **_wan(g),
        "timestep": torch.tensor([[600.0, 800.0], [600.0, 800.0]]),
        "enable_diffusion_forcing": True,
    }


def _wan_vace(g: Generator) -> dict[str, Any]:
    return {
        **_wan(g),
        "control_hidden_states": _real(g, 2, 6, 2, 6, 8),
        "control_hidden_states_scale": torch.tensor([0.7, 1.2]),
    }


_COGVIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 4,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "max_text_seq_length": 6,
}


def _cogvideo(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 2, 4, 8, 8),
        "encoder_hidden_states": _real(g, 2, 6, 8),
        "timestep": _time(),
    }


def _cogvideo_15(g: Generator) -> dict[str, Any]:
    return {**_cogvideo(g), "ofs": torch.tensor([2.0]), "image_rotary_emb": _rotary(16, 8)}


_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "rope_axes_dim": (2, 4, 4),
}


def _hunyuan(g: Generator, *, frames: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 4, frames, 4, 4),
        "timestep": _time(),
        "encoder_hidden_states": _real(g, 2, 6, 16),
        "encoder_attention_mask": _mask(6, 4, size=6),
        "pooled_projections": _real(g, 2, 8),
        "guidance": _time(6000.0),
    }


def _hunyuan_15(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 4, 2, 4, 4),
        "timestep": _time(),
        "encoder_hidden_states": _real(g, 2, 6, 16),
        "encoder_attention_mask": _mask(6, 4, size=6),
        "encoder_hidden_states_2": _real(g, 2, 5, 12),
        "encoder_attention_mask_2": _mask(3, 5, size=5),
        "image_embeds": _real(g, 2, 3, 8),
    }


_FRAMEPACK = {
    **_HUNYUAN,
    "num_layers": 1,
    "num_single_layers": 1,
    "patch_size": 2,
    "pooled_projection_dim": 8,
    "has_image_proj": True,
    "image_proj_dim": 8,
    "has_clean_x_embedder": True,
}


def _framepack_one(g: Generator) -> dict[str, Any]:
    inputs = _framepack(g)
    batched = {name for name in inputs if "indices" not in name}
    return {name: value[1:] if name in batched else value for name, value in inputs.items()}


def _framepack(g: Generator) -> dict[str, Any]:
    return {
        **_hunyuan(g, frames=3),
        "image_embeds": _real(g, 2, 2, 8),
        "indices_latents": torch.arange(8, 11),
        "latents_clean": _real(g, 2, 4, 2, 4, 4),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": _real(g, 2, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.tensor([5, 6]),
        "latents_history_4x": _real(g, 2, 4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(1, 5),
    }


def _mochi(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 4, 2, 6, 8),
        "encoder_hidden_states": _real(g, 2, 6, 16),
        "timestep": _time(),
        "encoder_attention_mask": _mask(6, 4, size=6).bool(),
    }


def _latte(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 4, 3, 8, 8),
        "timestep": _time(),
        "encoder_hidden_states": _real(g, 2, 6, 8),
    }


def _ltx(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 24, 4),
        "encoder_hidden_states": _real(g, 2, 6, 12),
        "timestep": _time(),
        "encoder_attention_mask": _mask(6, 4, size=6),
        "num_frames": 2,
        "height": 3,
        "width": 4,
    }


_LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 2,
    "caption_channels": 12,
}


def _ltx2(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 24, 4),
        "audio_hidden_states": _real(g, 2, 7, 4),
        "encoder_hidden_states": _real(g, 2, 6, 12),
        "audio_encoder_hidden_states": _real(g, 2, 6, 12),
        "timestep": _time(),
        "encoder_attention_mask": _mask(6, 4, size=6),
        "audio_encoder_attention_mask": _mask(6, 4, size=6),
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "audio_num_frames": 7,
        "fps": 25.0,
    }


def _allegro(g: Generator) -> dict[str, Any]:
    token = torch.arange(12)
    frame, row, column = token // 6, token // 3 % 2, token % 3
    return {
        "hidden_states": _real(g, 2, 4, 2, 4, 6),
        "encoder_hidden_states": _real(g, 2, 6, 12),
        "timestep": _time(),
        "attention_mask": torch.ones(2, 2, 4, 6),
        "encoder_attention_mask": _mask(6, 4, size=6),
        "image_rotary_emb": ([_rotary(n, 4) for n in (2, 2, 3)], [n[None] for n in (frame, row, column)]),
    }


def _anyflow(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 2, 4, 6, 8),
        "timestep": _time(800.0, 2, 2),
        "r_timestep": _time(300.0, 2, 2),
        "encoder_hidden_states": _real(g, 2, 6, 16),
    }


def _anyflow_far(g: Generator) -> dict[str, Any]:
    tokens = 12  # of one frame
    return {
        **_anyflow(g),
        "chunk_partition": [1, 2],
        "kv_cache": [
            {"full_cache": _real(g, 2, 2, 2, tokens, 12), "compressed_cache": _real(g, 2, 2, 2, 4, 12)}
            for _ in range(2)
        ],
        "kv_cache_flag": {
            "is_cache_step": False,
            "num_cached_chunks": 1,
            "num_cached_full_tokens": tokens,
            "num_cached_compressed_tokens": 0,
        },
    }


def _anyflow_far_write(g: Generator) -> dict[str, Any]:
    inputs = _anyflow_far(g)
    caches = [
        {"full_cache": torch.zeros(2, 2, 2, 36, 12), "compressed_cache": torch.zeros(2, 2, 2, 4, 12)} for _ in "12"
    ]
    flags = {"is_cache_step": True, "num_full_tokens": 24, "num_compressed_tokens": 0}
    return {**inputs, "chunk_partition": [1, 1], "kv_cache": caches, "kv_cache_flag": flags}


def _cosmos(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 4, 2, 6, 8),
        "timestep": _time(0.8),
        "encoder_hidden_states": (_real(g, 2, 6, 12), _real(g, 2, 5, 10)),
        "attention_mask": None,
        "fps": 24,
    }


def _cosmos3(g: Generator) -> dict[str, Any]:
    text, video = 5, 8  # tokens; the first of the two frames is given, the second is denoised
    return {
        "input_ids": torch.tensor([3, 1, 4, 1, 5]),
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(text + video).expand(3, -1),
        "und_len": text,
        "sequence_length": text + video,
        "vision_tokens": [_real(g, 1, 4, 2, 4, 4)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": torch.arange(text, text + video),
        "vision_mse_loss_indexes": torch.arange(text + video // 2, text + video),
        "vision_timesteps": _time(800.0, video // 2),
        "vision_noisy_frame_indexes": [torch.tensor([1])],
    }


def _easyanimate(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 4, 2, 6, 8),
        "timestep": _time(),
        "encoder_hidden_states": _real(g, 2, 6, 12),
        "encoder_hidden_states_t5": _real(g, 2, 5, 10),
    }


def _helios(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 4, 2, 8, 8),
        "timestep": _time(),
        "encoder_hidden_states": _real(g, 2, 6, 16),
        "indices_hidden_states": torch.arange(8, 10).expand(2, -1),
        "indices_latents_history_short": torch.arange(6, 8).expand(2, -1),
        "indices_latents_history_mid": torch.arange(4, 6).expand(2, -1),
        "indices_latents_history_long": torch.arange(0, 4).expand(2, -1),
        "latents_history_short": _real(g, 2, 4, 2, 8, 8),
        "latents_history_mid": _real(g, 2, 4, 2, 8, 8),
        "latents_history_long": _real(g, 2, 4, 4, 8, 8),
    }


_KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 12,
    "in_text_dim2": 10,
    "time_dim": 8,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
    "visual_cond": False,
}


def _kandinsky5(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 2, 4, 6, 4),
        "encoder_hidden_states": _real(g, 2, 6, 12),
        "timestep": _time(),
        "pooled_projections": _real(g, 2, 10),
        "visual_rope_pos": (torch.arange(2), torch.arange(2), torch.arange(3)),
        "text_rope_pos": torch.arange(6),
    }


def _kandinsky6(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 2, 4, 6, 4),
        "encoder_hidden_states": _real(g, 2, 6, 12),
        "pooled_projections": _real(g, 2, 10),
        "timestep": _time(),
        "audio_hidden_states": _real(g, 2, 7, 4),
    }


def _kandinsky5_sparse(g: Generator) -> dict[str, Any]:
    frames, height, width = 1, 16, 16  # four blocks of 8 x 8 tokens
    return {
        **_kandinsky5(g),
        "hidden_states": _real(g, 2, frames, 2 * height, 2 * width, 4),
        "visual_rope_pos": tuple(torch.arange(size) for size in (frames, height, width)),
        "sparse_params": {"to_fractal": True, "sta_mask": torch.eye(4).bool()[None, None], "P": 0.5},
    }


def _flex(model: ModelMixin) -> ModelMixin:
    """``model`` with flex_attention for every attention, as its pipeline sets it for a sparse one."""
    for processor in model.attn_processors.values():
        # Not `model.set_attention_backend`: that would change it for all other models of this process, too.
        processor._attention_backend = AttentionBackendName.FLEX
    return model


def _minimax_h3(g: Generator) -> dict[str, Any]:
    text, video, audio = 5, 12, 7
    length = text + video + audio
    sound = torch.arange(length) >= text + video
    return {
        "hidden_states": _real(g, 2, video, 16),
        "audio_hidden_states": _real(g, 2, audio, 6),
        "encoder_hidden_states": _real(g, 2, text, 12),
        "timestep": torch.tensor([800.0, 600.0]),
        "timestep_indices": sound.long(),
        "token_tags": (torch.arange(length) >= text).long() + sound,
        "position_ids": torch.arange(length)[:, None].expand(-1, 3),
        "video_indices": torch.arange(text, text + video),
        "audio_indices": torch.arange(text + video, length),
        "text_indices": torch.arange(text),
    }


def _motif(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 4, 2, 4, 6),
        "timestep": _time(),
        "encoder_hidden_states": _real(g, 2, 6, 12),
        "encoder_attention_mask": _mask(6, 4, size=6),
        "image_embeds": _real(g, 2, 3, 8),
    }


def _sana_video(g: Generator) -> dict[str, Any]:
    return {
        "hidden_states": _real(g, 2, 4, 2, 6, 8),
        "encoder_hidden_states": _real(g, 2, 6, 12),
        "timestep": _time(),
        "encoder_attention_mask": _mask(6, 4, size=6),
    }


def _sana_wm(g: Generator) -> dict[str, Any]:
    pose = torch.eye(4).flatten().expand(2, 2, -1) + 0.01 * _real(g, 2, 2, 16)
    lens = torch.tensor([5.0, 5.0, 2.0, 1.5]).expand(2, 2, -1)
    return {
        "hidden_states": _real(g, 2, 4, 2, 3, 4),
        "timestep": _time(800.0, 2, 1, 2),
        "encoder_hidden_states": _real(g, 2, 6, 12),
        "encoder_attention_mask": _mask(6, 4, size=6),
        "camera_conditions": torch.cat([pose, lens], dim=-1),
        "chunk_plucker": _real(g, 2, 6, 2, 3, 4),
    }


def _sana_wm_refiner(g: Generator) -> dict[str, Any]:
    cos, sin = _rotary(24, 16)
    return {
        "hidden_states": _real(g, 2, 24, 4),
        "encoder_hidden_states": _real(g, 2, 6, 12),
        "timestep": _time(),
        "video_rotary_emb": (cos[None], sin[None]),
        "encoder_attention_mask": _mask(6, 4, size=6),
    }


def _sana_wm_refiner_cache(g: Generator) -> dict[str, Any]:
    cache = SanaWMRefinerKVCache(2)
    cache.sink_pe = tuple(table[None] for table in _rotary(5, 16))
    for i in range(2):
        cache.get(i).store_sink(_real(g, 2, 5, 16), _real(g, 2, 5, 16))
        cache.get(i).store_history(_real(g, 2, 7, 16), _real(g, 2, 7, 16))
    return {**_sana_wm_refiner(g), "kv_cache": cache, "kv_cache_mode": "inject"}


def _temporal(g: Generator) -> dict[str, Any]:
    return {"hidden_states": _real(g, 6, 32, 4, 4), "timestep": _time(), "num_frames": 3}


def _wan_animate(g: Generator) -> dict[str, Any]:
    return {
        **_wan_image(g, frames=3, channels=12),
        "pose_hidden_states": _real(g, 2, 4, 2, 6, 8),
        "face_pixel_values": _real(g, 2, 3, 8, 16, 16),
    }


def _wan_animate2(g: Generator) -> dict[str, Any]:
    cache = WanAnimate2KVCache(2)
    for layer in cache.layer_caches:  # of the reference: two frames of 12 tokens
        layer.store(_real(g, 1, 24, 2, 12), _real(g, 1, 24, 2, 12))
    return {
        "hidden_states": [_real(g, 4, 3, 6, 8)],
        "timestep": _time(800.0, 1),
        "encoder_hidden_states": [_real(g, 5, 16)],
        "condition_latents": [_real(g, 2, 3, 6, 8)],
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": 36,
        "encoder_hidden_states_image": _real(g, 1, 3, 1280),
        "reference_grid_sizes": torch.tensor([[2, 3, 4]]),
        "origin_len": 7,
        "origin_area": [48, 64],
    }


def _consisid(g: Generator) -> dict[str, Any]:
    return {
        **_cogvideo(g),
        "id_cond": _real(g, 2, 10),
        "id_vit_hidden": [_real(g, 2, 3, 8) for _ in range(2)],
    }


def _ltx2_gated(g: Generator) -> dict[str, Any]:
    return {**_ltx2(g), "sigma": _time(), "audio_sigma": _time(700.0), "audio_timestep": _time(700.0)}


CASES: dict[str, Case] = {
    "WanTransformer3DModel": Case(
        make=lambda: zoo.WanTransformer3DModel(**_WAN_IMAGE),
        inputs=_wan_image,
        timestep="timestep",
        sites=4,
        note="cross-attention to the image and to the text in one module",
    ),
    "LTXVideoTransformer3DModel": Case(
        make=lambda: zoo.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=12,
        ),
        inputs=_ltx,
        timestep="timestep",
        sites=4,
    ),
    "CogVideoXTransformer3DModel": Case(
        make=lambda: zoo.CogVideoXTransformer3DModel(**_COGVIDEO),
        inputs=_cogvideo,
        timestep="timestep",
        sites=2,
        note="position embedding written in place into a fresh tensor",
    ),
    "HunyuanVideoTransformer3DModel": Case(
        make=lambda: zoo.HunyuanVideoTransformer3DModel(
            **_HUNYUAN, num_layers=2, num_single_layers=2, pooled_projection_dim=8
        ),
        inputs=_hunyuan,
        timestep="timestep",
        sites=5,
        note="token refiner, two double blocks, two single blocks",
    ),
    "MochiTransformer3DModel": Case(
        make=lambda: zoo.MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=4,
            max_sequence_length=6,
        ),
        inputs=_mochi,
        timestep="timestep",
        sites=3,
        note="attends sample by sample to the valid part of each text, whose length depends on the mask's values",
    ),
    "LatteTransformer3DModel": Case(
        make=lambda: zoo.LatteTransformer3DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=8,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=3,
        ),
        inputs=_latte,
        timestep="timestep",
        sites=6,
        note="spatial self and cross, temporal self",
    ),
    "LTX2VideoTransformer3DModel": Case(
        make=lambda: zoo.LTX2VideoTransformer3DModel(**_LTX2),
        inputs=_ltx2,
        timestep="timestep",
        varies=("hidden_states", "audio_hidden_states"),
        sites=12,
        note="self, text, and each other's attention, for video and for audio",
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        make=lambda: zoo.HunyuanVideo15Transformer3DModel(
            **_HUNYUAN, num_layers=2, text_embed_2_dim=12, image_embed_dim=8
        ),
        inputs=_hunyuan_15,
        timestep="timestep",
        sites=3,
        breaks=1,
        note="asks whether the image is all zero; moves the valid part of each text to the front",
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        make=lambda: zoo.HunyuanVideoFramepackTransformer3DModel(**_FRAMEPACK),
        inputs=_framepack,
        timestep="timestep",
        sites=3,
    ),
    "WanVACETransformer3DModel": Case(
        make=lambda: zoo.WanVACETransformer3DModel(**_WAN, vace_layers=[0, 1], vace_in_channels=6),
        inputs=_wan_vace,
        timestep="timestep",
        sites=8,
        note="a control branch of its own blocks",
    ),
    "AllegroTransformer3DModel": Case(
        make=lambda: zoo.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=24,
            sample_height=4,
            sample_width=6,
            sample_frames=2,
            caption_channels=12,
        ),
        inputs=_allegro,
        timestep="timestep",
        sites=4,
    ),
    "AnyFlowTransformer3DModel": Case(
        make=lambda: zoo.AnyFlowTransformer3DModel(**_WAN),
        inputs=_anyflow,
        timestep="timestep",
        sites=4,
        note="a timestep for each frame, and one to arrive at",
    ),
    "AnyFlowFARTransformer3DModel": Case(
        make=lambda: zoo.AnyFlowFARTransformer3DModel(**_WAN, chunk_partition=(1, 2)),
        inputs=_anyflow_far,
        timestep="timestep",
        sites=4,
        note="self-attention is flex_attention over a cache of earlier frames",
    ),
    "ChronoEditTransformer3DModel": Case(
        make=lambda: zoo.ChronoEditTransformer3DModel(**_WAN_IMAGE, rope_temporal_skip_len=4),
        inputs=_wan_image,
        timestep="timestep",
        sites=4,
    ),
    "ConsisIDTransformer3DModel": Case(
        make=lambda: zoo.ConsisIDTransformer3DModel(
            **{**_COGVIDEO, "attention_head_dim": 16},
            is_train_face=True,
            cross_attn_interval=2,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=10,
            LFE_vit_dim=8,
            LFE_depth=2,
            LFE_dim_head=4,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=3,
            LFE_output_dim=21,
            LFE_ff_mult=2,
            LFE_num_scale=2,
        ),
        inputs=_consisid,
        timestep="timestep",
        sites=5,
        note="the face's own attentions are written out: matrix products and a softmax",
    ),
    "CosmosTransformer3DModel": Case(
        make=lambda: zoo.CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            mlp_ratio=2.0,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(4, 8, 8),
            concat_padding_mask=False,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=12,
            encoder_hidden_states_channels=16,
            img_context_dim_in=10,
            img_context_num_tokens=5,
            img_context_dim_out=24,
        ),
        inputs=_cosmos,
        timestep="timestep",
        sites=4,
        note="cross-attention to the image and to the text in one module",
    ),
    "Cosmos3OmniTransformer": Case(
        make=lambda: zoo.Cosmos3OmniTransformer(
            head_dim=8,
            hidden_size=16,
            intermediate_size=32,
            latent_channel=4,
            patch_latent_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            vocab_size=11,
            rope_axes_dim=(2, 1, 1),
        ),
        inputs=_cosmos3,
        timestep="vision_timesteps",
        varies=("vision_tokens",),
        sites=2,
        note="causal text and full video attention in one module, keys shared by pairs of heads",
    ),
    "EasyAnimateTransformer3DModel": Case(
        make=lambda: zoo.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=8,
            sample_height=6,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=4,
            text_embed_dim=12,
            text_embed_dim_t5=10,
            after_norm=True,
        ),
        inputs=_easyanimate,
        timestep="timestep",
        sites=2,
    ),
    "HeliosTransformer3DModel": Case(
        make=lambda: zoo.HeliosTransformer3DModel(**_WAN, rope_dim=(4, 4, 4), is_amplify_history=True),
        inputs=_helios,
        timestep="timestep",
        sites=4,
        note="three histories of other resolutions in the sequence",
    ),
    "Kandinsky5Transformer3DModel": Case(
        make=lambda: zoo.Kandinsky5Transformer3DModel(**_KANDINSKY),
        inputs=_kandinsky5,
        timestep="timestep",
        sites=5,
        note="token refiner, then self and cross",
    ),
    "Kandinsky6Transformer3DModel": Case(
        make=lambda: zoo.Kandinsky6Transformer3DModel(**_KANDINSKY, in_audio_dim=4, out_audio_dim=4),
        inputs=_kandinsky6,
        timestep="timestep",
        varies=("hidden_states", "audio_hidden_states"),
        sites=14,
        note="two token refiners; self, text, and each other's attention, for video and for audio",
    ),
    "MiniMaxH3Transformer3DModel": Case(
        make=lambda: zoo.MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=32,
            in_channels=4,
            audio_in_channels=6,
            text_dim=12,
            freq_dim=8,
            time_embed_hidden_dim=8,
            time_embed_dim=8,
            rope_freq_dim=1,
        ),
        inputs=_minimax_h3,
        timestep="timestep",
        varies=("hidden_states", "audio_hidden_states"),
        sites=3,
        note="text, video and audio in one sequence, each with a timestep of its own",
    ),
    "MotifVideoTransformer3DModel": Case(
        make=lambda: zoo.MotifVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=2,
            num_decoder_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=12,
            image_embed_dim=8,
            rope_axes_dim=(2, 4, 4),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        inputs=_motif,
        timestep="timestep",
        sites=5,
        note="a cross-attention whose query is what the joint attention gave",
    ),
    "SanaVideoTransformer3DModel": Case(
        make=lambda: zoo.SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=12,
        ),
        inputs=_sana_video,
        timestep="timestep",
        sites=4,
        note="self-attention is linear",
    ),
    "SanaWMTransformer3DModel": Case(
        make=lambda: zoo.SanaWMTransformer3DModel(
            in_channels=4,
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=16,
            chunk_plucker_channels=6,
            caption_channels=12,
            mlp_ratio=2.0,
        ),
        inputs=_sana_wm,
        timestep="timestep",
        sites=4,
        note="one block is a gated delta rule, left computing; the other has a softmax and a camera attention",
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Case(
        make=lambda: zoo.SanaWMLTX2RefinerTransformer3DModel(**_LTX2),
        inputs=_sana_wm_refiner,
        timestep="timestep",
        sites=4,
        note="the audio half of its blocks is never called",
    ),
    "SkyReelsV2Transformer3DModel": Case(
        make=lambda: zoo.SkyReelsV2Transformer3DModel(**_WAN_IMAGE, num_frame_per_block=2),
        inputs=lambda g: _wan_image(g, frames=4),
        timestep="timestep",
        sites=4,
        note="causal mask over blocks of frames",
    ),
    "TransformerTemporalModel": Case(
        make=lambda: zoo.TransformerTemporalModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=32, num_layers=2, norm_num_groups=8
        ),
        inputs=_temporal,
        timestep="timestep",
        sites=4,
        note="its timestep changes nothing",
    ),
    "WanAnimateTransformer3DModel": Case(
        make=lambda: zoo.WanAnimateTransformer3DModel(
            **{**_WAN_IMAGE, "in_channels": 12},
            latent_channels=4,
            motion_encoder_channel_sizes={"4": 8, "8": 6, "16": 4},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=12,
            face_encoder_hidden_dim=12,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        inputs=_wan_animate,
        timestep="timestep",
        sites=5,
        note="face attention between the blocks",
    ),
    "WanAnimate2Transformer3DModel": Case(
        make=lambda: zoo.WanAnimate2Transformer3DModel(
            text_len=6, in_dim=6, dim=24, ffn_dim=32, freq_dim=16, text_dim=16, out_dim=4, num_heads=2, num_layers=2
        ),
        inputs=_wan_animate2,
        timestep="timestep",
        sites=4,
        breaks=5,
        captures=11,
        note="flex_attention over the tokens and a cached reference; one graph serves both blocks",
    ),
    "WanTransformer3DModel:tokens": Case(
        make=lambda: zoo.WanTransformer3DModel(**_WAN),
        inputs=lambda g: {**_wan(g), "timestep": torch.tensor([0.0] * 12 + [800.0] * 12).expand(2, -1)},
        timestep="timestep",
        sites=4,
        note="a timestep for each token; the first frame is given",
    ),
    "CogVideoXTransformer3DModel:rotary": Case(
        make=lambda: zoo.CogVideoXTransformer3DModel(
            **_COGVIDEO, ofs_embed_dim=4, patch_size_t=2, patch_bias=False, use_rotary_positional_embeddings=True
        ),
        inputs=_cogvideo_15,
        timestep="timestep",
        sites=2,
    ),
    "HunyuanVideoTransformer3DModel:first-frame": Case(
        make=lambda: zoo.HunyuanVideoTransformer3DModel(
            **_HUNYUAN,
            num_layers=2,
            num_single_layers=2,
            pooled_projection_dim=8,
            image_condition_type="token_replace",
        ),
        inputs=_hunyuan,
        timestep="timestep",
        sites=5,
        note="the sequence is split for two gates after each attention",
    ),
    "LTX2VideoTransformer3DModel:gated": Case(
        make=lambda: zoo.LTX2VideoTransformer3DModel(
            **_LTX2,
            gated_attn=True,
            cross_attn_mod=True,
            audio_gated_attn=True,
            audio_cross_attn_mod=True,
            rope_type="split",
        ),
        inputs=_ltx2_gated,
        timestep="timestep",
        varies=("hidden_states", "audio_hidden_states"),
        sites=12,
        note="gates inside the attention, modulated text, rotation in place on views",
    ),
    "Kandinsky6Transformer3DModel:gates": Case(
        make=lambda: zoo.Kandinsky6Transformer3DModel(
            **_KANDINSKY, in_audio_dim=4, out_audio_dim=4, ca_rope=True, cross_gates=True, fix_modulation=True
        ),
        inputs=_kandinsky6,
        timestep="timestep",
        varies=("hidden_states", "audio_hidden_states"),
        sites=14,
    ),
    "Kandinsky6Transformer3DModel:silent": Case(
        make=lambda: zoo.Kandinsky6Transformer3DModel(**_KANDINSKY, in_audio_dim=4, out_audio_dim=4),
        inputs=lambda g: {k: v for k, v in _kandinsky6(g).items() if k != "audio_hidden_states"},
        timestep="timestep",
        sites=6,
        note="without sound; the text is refined for it all the same",
    ),
    "SkyReelsV2Transformer3DModel:forcing": Case(
        make=lambda: zoo.SkyReelsV2Transformer3DModel(**_WAN),
        inputs=_skyreels_forcing,
        timestep="timestep",
        sites=4,
        note="a timestep for each frame",
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        make=lambda: zoo.Kandinsky6SRTransformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=8,
            model_dim=32,
            ff_dim=32,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        inputs=lambda g: {"hidden_states": _real(g, 2, 1, 8, 16, 9), "timestep": _time()},
        timestep="timestep",
        sites=2,
        note="flex_attention under a block mask made of queries and keys",
    ),
    "HunyuanVideoFramepackTransformer3DModel:one": Case(
        make=lambda: zoo.HunyuanVideoFramepackTransformer3DModel(**_FRAMEPACK),
        inputs=_framepack_one,
        timestep="timestep",
        sites=3,
        note="one sample: the padding of its text is cut off, so the length depends on the mask's values",
    ),
    "Kandinsky5Transformer3DModel:sparse": Case(
        make=lambda: _flex(zoo.Kandinsky5Transformer3DModel(**_KANDINSKY)),
        inputs=_kandinsky5_sparse,
        timestep="timestep",
        sites=5,
        note="flex_attention under a block mask made of queries and keys",
    ),
    "SanaWMLTX2RefinerTransformer3DModel:cache": Case(
        make=lambda: zoo.SanaWMLTX2RefinerTransformer3DModel(**_LTX2),
        inputs=_sana_wm_refiner_cache,
        timestep="timestep",
        sites=4,
        note="keys and values of earlier frames come from outside",
    ),
    "AnyFlowFARTransformer3DModel:write": Case(
        make=lambda: zoo.AnyFlowFARTransformer3DModel(**_WAN, chunk_partition=(1, 2)),
        inputs=_anyflow_far_write,
        timestep="timestep",
        sites=2,
        left=2,
        note="self-attention writes its keys into a cache that is the caller's: left computing",
    ),
}

EXCLUDED: dict[str, str] = {}
