"""Pipelines that make videos and sound."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from torch import nn
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel, UMT5Config, UMT5EncoderModel

from tests.pipelines.kit import (
    TOKENS,
    WORDS,
    Request,
    builder,
    mask,
    masked,
    noise,
    picture,
    pooled,
    seeded,
    text,
    tiny_tokenizer,
    twice_masked,
    unmasked,
    words,
)


def wan_transformer() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=24, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


@builder
def wan(request: Request) -> tuple[Any, dict[str, Any]]:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(None, None, None, scheduler, wan_transformer())
    return pipe, {
        **unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 5,
        "output_type": "latent", "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def ltx(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=12,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    return pipe, {
        **masked(request, 12), "height": 96 if request.large else 64, "width": 64, "num_frames": 9,
        "output_type": "latent", "guidance_scale": 3.0 if request.guided else 1.0,
    }  # fmt: skip


def cogvideox_transformer() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=12, num_layers=2, sample_width=4, sample_height=4, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TOKENS, use_rotary_positional_embeddings=True,
    )  # fmt: skip


@builder
def cogvideox(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.CogVideoXPipeline(None, None, None, cogvideox_transformer(), CogVideoXDDIMScheduler())
    return pipe, {
        **unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 5,
        "output_type": "latent", "max_sequence_length": TOKENS, "guidance_scale": 6.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def cogvideox_video2video(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.CogVideoXVideoToVideoPipeline(
        None, None, None, cogvideox_transformer(), diffusers.CogVideoXDPMScheduler()
    )
    height = 48 if request.large else 32
    return pipe, {
        **unmasked(request, 12), "height": height, "width": 32, "strength": 0.7,
        "latents": noise(request, (request.batch, 2, 4, height // 8, 4)),
        "output_type": "latent", "max_sequence_length": TOKENS, "guidance_scale": 6.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def wan_video2video(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.WanVideoToVideoPipeline(None, None, wan_transformer(), None, unipc_flow())
    height = 48 if request.large else 32
    return pipe, {
        **unmasked(request, 12), "height": height, "width": 32, "strength": 0.7, "output_type": "latent",
        "latents": noise(request, (request.batch, 4, 2, height // 8, 4)),
        "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def hunyuan_video(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=12,
        pooled_projection_dim=10, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    pipe = diffusers.HunyuanVideoPipeline(
        None, None, transformer, None, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None
    )
    given = {
        "prompt_embeds": text(request, 12), "prompt_attention_mask": mask(request),
        "pooled_prompt_embeds": pooled(request, 10),
    }  # fmt: skip
    if request.guided:
        given |= {
            "negative_prompt_embeds": text(request, 12, negative=True), "negative_prompt_attention_mask": mask(request),
            "negative_pooled_prompt_embeds": pooled(request, 10, negative=True), "true_cfg_scale": 3.0,
        }  # fmt: skip
    return pipe, {
        **given, "height": 48 if request.large else 32, "width": 32, "num_frames": 5, "output_type": "latent",
    }  # fmt: skip


@builder
def allegro(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=24, sample_width=4, sample_height=4, sample_frames=2, caption_channels=12,
    )  # fmt: skip
    pipe = diffusers.AllegroPipeline(None, None, None, transformer, diffusers.EulerAncestralDiscreteScheduler())
    return pipe, {
        **masked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 8,
        "output_type": "latent", "negative_prompt": None, "guidance_scale": 7.5 if request.guided else 1.0,
    }  # fmt: skip


@builder
def latte(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, attention_bias=True,
        activation_fn="gelu-approximate", video_length=2,
    )  # fmt: skip
    pipe = diffusers.LattePipeline(None, None, None, transformer, DDIMScheduler())
    return pipe, {
        **unmasked(request, 12), "height": 96 if request.large else 64, "width": 64, "video_length": 2,
        "output_type": "latent", "negative_prompt": None, "mask_feature": False,
        "guidance_scale": 7.5 if request.guided else 1.0,
    }  # fmt: skip


@builder
def mochi(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=TOKENS,
    )  # fmt: skip
    pipe = diffusers.MochiPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    return pipe, {
        **masked(request, 16, dtype=torch.bool), "height": 48 if request.large else 32, "width": 32, "num_frames": 7,
        "output_type": "latent",
        "guidance_scale": 4.5 if request.guided else 1.0, "max_sequence_length": TOKENS,
    }  # fmt: skip


@builder
def skyreels_v2(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.SkyReelsV2Pipeline(None, None, skyreels_transformer(), None, unipc_flow())
    return pipe, {
        **unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 5,
        "output_type": "latent", "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def skyreels_v2_forcing(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(None, None, skyreels_transformer(), None, unipc_flow())
    return pipe, {
        **unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 9,
        "base_num_frames": 9, "prompt": None, "output_type": "latent", "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


def skyreels_transformer() -> nn.Module:
    return diffusers.SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=24, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def unipc_flow() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@builder
def easyanimate(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=12, num_layers=2, mmdit_layers=1, sample_width=4, sample_height=4, patch_size=2,
        time_position_encoding_type="3d_rope",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMagvit(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4,
    )  # fmt: skip
    pipe = diffusers.EasyAnimatePipeline(vae, None, None, transformer, FlowMatchEulerDiscreteScheduler())
    return pipe, {
        **masked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 5,
        "output_type": "latent", "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def cosmos(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=12, adaln_lora_dim=4, max_size=(4, 16, 16), patch_size=(1, 2, 2), concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )  # fmt: skip
    pipe = diffusers.CosmosTextToWorldPipeline(
        None, None, transformer, None, diffusers.EDMEulerScheduler(), safety_checker=Harmless()
    )
    return pipe, {
        **unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 9,
        "output_type": "latent", "guidance_scale": 7.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def cosmos2(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=12, adaln_lora_dim=4, max_size=(4, 16, 16), patch_size=(1, 2, 2), concat_padding_mask=False,
        extra_pos_embed_type=None,
    )  # fmt: skip
    pipe = diffusers.Cosmos2TextToImagePipeline(
        None, None, transformer, None, FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Harmless(),
    )  # fmt: skip
    return pipe, {
        **unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "output_type": "latent",
        "guidance_scale": 7.0 if request.guided else 1.0,
    }  # fmt: skip


class Harmless(diffusers.ModelMixin):
    """Stands in for a safety checker, which would have to be downloaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))  # a pipeline asks its modules for their device

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


@builder
def kandinsky5(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=12, in_text_dim2=10, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=16, ff_dim=24, num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 4),
    )  # fmt: skip
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer, None, None, None, None, None, FlowMatchEulerDiscreteScheduler(shift=5.0)
    )
    ends = torch.arange(request.batch + 1, dtype=torch.int32) * TOKENS
    return pipe, {
        "prompt_embeds_qwen": text(request, 12), "prompt_embeds_clip": pooled(request, 10), "prompt_cu_seqlens": ends,
        "negative_prompt_embeds_qwen": text(request, 12, negative=True), "negative_prompt_cu_seqlens": ends,
        "negative_prompt_embeds_clip": pooled(request, 10, negative=True),
        "height": 48 if request.large else 32, "width": 32, "num_frames": 5, "output_type": "latent",
        "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def sana_video(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=12,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=12,
        sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )  # fmt: skip
    pipe = diffusers.SanaVideoPipeline(None, None, None, transformer, FlowMatchEulerDiscreteScheduler())
    return pipe, {
        **masked(request, 12), "height": 64 if request.large else 32, "width": 32, "frames": 5,
        "output_type": "latent", "use_resolution_binning": False, "complex_human_instruction": None,
        "negative_prompt": None, "guidance_scale": 6.0 if request.guided else 1.0,
    }  # fmt: skip


# -- audio -----------------------------------------------------------------------------------------------------------


@builder
def ltx2(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=12, rope_type="split",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_type=("spatial",),
        upsample_residual=(False,), upsample_factor=(1,), spatial_compression_ratio=32, temporal_compression_ratio=8,
    )  # fmt: skip
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    connector = {"num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=12, text_proj_in_factor=2, rope_type="split",
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in connector.items()},
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.LTX2Pipeline(scheduler, vae, audio_vae, None, None, connectors, transformer, None)
    scale = 3.0 if request.guided else 1.0
    return pipe, {
        **masked(request, 24), "height": 96 if request.large else 64, "width": 64, "num_frames": 9,
        "output_type": "latent", "guidance_scale": scale, "audio_guidance_scale": scale, "stg_scale": 0.0,
        "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0,
    }  # fmt: skip


@builder
def hunyuan_video15(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_refiner_layers=1,
        text_embed_dim=12, text_embed_2_dim=10, image_embed_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.HunyuanVideo15Pipeline(
        None, None, transformer, vae, scheduler, None, None, diffusers.ClassifierFreeGuidance(guidance_scale=6.0)
    )
    pipe.vision_num_semantic_tokens = 3  # of 729 for the picture, of which there is none
    return pipe, {
        **twice_masked(request), "height": 96 if request.large else 64, "width": 64, "num_frames": 5,
        "output_type": "latent",
    }  # fmt: skip


@builder
def hunyuan_video_framepack(request: Request) -> tuple[Any, dict[str, Any]]:
    """Two sections of a video, the last one first."""
    transformer = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(2, 4, 4),
        has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    image_encoder = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
    )
    pipe = diffusers.HunyuanVideoFramepackPipeline(
        None, None, transformer, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None, image_encoder,
        SiglipImageProcessor(size={"height": 8, "width": 8}),
    )  # fmt: skip
    given = {
        **masked(request, 12), "pooled_prompt_embeds": pooled(request, 10),
        "negative_pooled_prompt_embeds": pooled(request, 10, negative=True),
        "true_cfg_scale": 3.0 if request.guided else 1.0,
    }  # fmt: skip
    return pipe, {
        **given, "image": picture(request, 32), "height": 48 if request.large else 32, "width": 32, "num_frames": 10,
        "latent_window_size": 2, "output_type": "pt",
    }  # fmt: skip


@builder
def helios(request: Request) -> tuple[Any, dict[str, Any]]:
    """Two chunks of a video, the second one continues the first."""
    scheduler = diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    return _helios(diffusers.HeliosPipeline, scheduler, request)


@builder
def helios_pyramid(request: Request) -> tuple[Any, dict[str, Any]]:
    """The same, each chunk first small and then large, with timesteps of their own."""
    # With the gamma of 1/3 that it has by itself, the noise's covariance has no Cholesky factor in float32 on a CPU.
    scheduler = diffusers.HeliosScheduler(stages=2, stage_range=[0, 0.5, 1], gamma=0.3)
    pipe, kwargs = _helios(diffusers.HeliosPyramidPipeline, scheduler, request)
    return pipe, {**kwargs, "pyramid_num_inference_steps_list": [request.steps] * 2}


def _helios(kind: Any, scheduler: Any, request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
        ffn_dim=24, num_layers=2, rope_dim=(4, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return kind(None, None, vae, scheduler, transformer), {
        **unmasked(request, 12), "height": 64 if request.large else 32, "width": 32, "num_frames": 10,
        "num_latent_frames_per_chunk": 2, "history_sizes": [4, 2, 1], "output_type": "latent",
        "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@seeded
def wan22(request: Request) -> tuple[Any, dict[str, Any]]:
    """Two transformers, one after the other: ``test_wan22`` has the tests."""
    pipe = diffusers.WanPipeline(
        None, None, None, unipc_flow(), wan_transformer(), wan_transformer(), boundary_ratio=0.7
    )
    return pipe, {
        **unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 5,
        "output_type": "latent", "guidance_scale": 4.0 if request.guided else 1.0, "guidance_scale_2": 3.0,
    }  # fmt: skip


@builder
def stable_audio(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.StableAudioDiTModel(
        sample_size=4, in_channels=3, num_layers=2, attention_head_dim=4, num_key_value_attention_heads=2,
        out_channels=3, num_attention_heads=2, cross_attention_input_dim=4, global_states_input_dim=8, time_proj_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    projection = diffusers.StableAudioProjectionModel(text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32)
    pipe = diffusers.StableAudioPipeline(
        vae, None, projection, None, transformer, diffusers.EDMDPMSolverMultistepScheduler(solver_order=2)
    )
    return pipe, {
        "prompt_embeds": text(request, 4), "attention_mask": mask(request), "output_type": "latent",
        "negative_prompt_embeds": text(request, 4, negative=True), "negative_attention_mask": mask(request),
        "guidance_scale": 7.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def longcat_audio(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=12, latent_dim=4, ff_mult=2.0
    )
    vae = diffusers.LongCatAudioDiTVae(
        channels=4, c_mults=[1, 2], strides=[2], latent_dim=4, encoder_latent_dim=8, downsampling_ratio=2,
        sample_rate=24,
    )  # fmt: skip
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    pipe = diffusers.LongCatAudioDiTPipeline(vae, encoder, tiny_tokenizer(), transformer)
    return pipe, {
        "prompt": words(request), "negative_prompt": ["green dog"] * request.batch,
        "audio_duration_s": 1.5 if request.large else 1.0, "output_type": "latent",
        "guidance_scale": 4.0 if request.guided else 1.0,
    }  # fmt: skip
