"""Pipelines that make and change images."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.pipelines.kit import (
    TOKENS,
    WORDS,
    Request,
    builder,
    mask,
    masked,
    picture,
    pooled,
    text,
    tiny_tokenizer,
    tiny_vae,
    twice_masked,
    unmasked,
    words,
)


@builder
def dit(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, tiny_vae(), DDIMScheduler())
    labels = [(request.prompt + 7 * i) % 1000 for i in range(request.batch)]
    return pipe, {"class_labels": labels, "guidance_scale": 4.0 if request.guided else 1.0, "output_type": "pt"}


def _pixart(kind: type, request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = kind(None, None, None, transformer, DPMSolverMultistepScheduler())
    side = 96 if request.large else 64
    return pipe, {
        **masked(request, 12), "negative_prompt": None, "height": side, "width": 64, "output_type": "latent",
        "use_resolution_binning": False, "guidance_scale": 4.5 if request.guided else 1.0,
    }  # fmt: skip


@builder
def pixart_sigma(request: Request) -> tuple[Any, dict[str, Any]]:
    return _pixart(diffusers.PixArtSigmaPipeline, request)


@builder
def pixart_alpha(request: Request) -> tuple[Any, dict[str, Any]]:
    return _pixart(diffusers.PixArtAlphaPipeline, request)


def sd3_transformer(**kwargs: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        pos_embed_max_size=24, **kwargs,
    )  # fmt: skip


def sd3_text(request: Request) -> dict[str, Any]:
    return {
        **unmasked(request, 12),
        "pooled_prompt_embeds": pooled(request, 10),
        "negative_pooled_prompt_embeds": pooled(request, 10, negative=True),
        "guidance_scale": 5.0 if request.guided else 1.0,
    }


@builder
def sd3(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = sd3_transformer(dual_attention_layers=(0,), qk_norm="rms_norm")
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, None, None, None, None
    )
    return pipe, {
        **sd3_text(request), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
    }  # fmt: skip


@builder
def sd3_img2img(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(
        sd3_transformer(), FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_vae(), None, None, None, None, None, None
    )
    return pipe, {
        **sd3_text(request), "image": picture(request), "strength": 0.7, "output_type": "latent",
        "height": 24 if request.large else 16, "width": 16,
    }  # fmt: skip


def flux_transformer(**kwargs: Any) -> nn.Module:
    given = {
        "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }  # fmt: skip
    return diffusers.FluxTransformer2DModel(**{**given, **kwargs})


def flux_text(request: Request) -> dict[str, Any]:
    """Two calls a step if guided."""
    given = {"prompt_embeds": text(request, 12), "pooled_prompt_embeds": pooled(request, 10)}
    if request.guided:
        given |= {
            "negative_prompt_embeds": text(request, 12, negative=True),
            "negative_pooled_prompt_embeds": pooled(request, 10, negative=True),
            "true_cfg_scale": 3.0,
        }
    return given


@builder
def flux(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, None, None, flux_transformer()
    )
    return pipe, {
        **flux_text(request), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
    }  # fmt: skip


@builder
def flux_img2img(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.FluxImg2ImgPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), tiny_vae(), None, None, None, None,
        flux_transformer(),
    )  # fmt: skip
    return pipe, {
        **flux_text(request), "image": picture(request), "strength": 0.7, "output_type": "latent",
        "height": 24 if request.large else 16, "width": 16,
    }  # fmt: skip


@builder
def flux_kontext(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.FluxKontextPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), tiny_vae(), None, None, None, None,
        flux_transformer(),
    )  # fmt: skip
    return pipe, {
        **flux_text(request), "image": picture(request), "output_type": "latent", "_auto_resize": False,
        "height": 24 if request.large else 16, "width": 16, "max_area": 24 * 16 if request.large else 16 * 16,
    }  # fmt: skip


def qwenimage_transformer() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def qwenimage_text(request: Request) -> dict[str, Any]:
    """Two calls a step if guided; the negative prompt is shorter."""
    given = {"prompt_embeds": text(request, 12), "prompt_embeds_mask": mask(request), "true_cfg_scale": 1.0}
    if request.guided:
        given |= {
            "negative_prompt_embeds": text(request, 12, negative=True, tokens=TOKENS - 1),
            "negative_prompt_embeds_mask": mask(request, tokens=TOKENS - 1),
            "true_cfg_scale": 3.0,
        }
    return given


@builder
def qwenimage(request: Request) -> tuple[Any, dict[str, Any]]:
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.QwenImagePipeline(scheduler, None, None, None, qwenimage_transformer())
    return pipe, {
        **qwenimage_text(request), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
    }  # fmt: skip


@builder
def qwenimage_img2img(request: Request) -> tuple[Any, dict[str, Any]]:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    pipe = diffusers.QwenImageImg2ImgPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, None, None, qwenimage_transformer()
    )
    return pipe, {
        **qwenimage_text(request), "image": picture(request, 32), "strength": 0.7, "output_type": "latent",
        "height": 48 if request.large else 32, "width": 32,
    }  # fmt: skip


@builder
def sana(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8,
    )  # fmt: skip
    pipe = diffusers.SanaPipeline(None, None, None, transformer, FlowMatchEulerDiscreteScheduler(shift=3.0))
    return pipe, {
        **masked(request, 12), "height": 192 if request.large else 128, "width": 128, "output_type": "latent",
        "use_resolution_binning": False, "complex_human_instruction": None, "negative_prompt": None,
        "guidance_scale": 4.5 if request.guided else 1.0,
    }  # fmt: skip


@builder
def auraflow(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    pipe = diffusers.AuraFlowPipeline(None, None, None, transformer, FlowMatchEulerDiscreteScheduler(shift=1.7))
    return pipe, {
        **masked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
        "guidance_scale": 3.5 if request.guided else 1.0,
    }  # fmt: skip


@builder
def lumina(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=2, num_kv_heads=1,
        multiple_of=8, cross_attention_dim=12, learn_sigma=True,
    )  # fmt: skip
    pipe = diffusers.LuminaPipeline(transformer, FlowMatchEulerDiscreteScheduler(), None, None, None)
    return pipe, {
        **masked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
        "guidance_scale": 4.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def lumina2(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
        cap_feat_dim=12,
    )  # fmt: skip
    pipe = diffusers.Lumina2Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), None, None, None)
    return pipe, {
        **masked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
        "guidance_scale": 4.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def cogview4(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=12, time_embed_dim=8, condition_dim=4, rope_axes_dim=(32, 32),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = diffusers.CogView4Pipeline(None, None, None, transformer, scheduler)
    return pipe, {
        **unmasked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
        "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def cogview3plus(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=12, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8,
    )  # fmt: skip
    pipe = diffusers.CogView3PlusPipeline(None, None, None, transformer, CogVideoXDDIMScheduler())
    return pipe, {
        **unmasked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
        "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def chroma(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=16, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    pipe = diffusers.ChromaPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    return pipe, {
        **masked(request, 12, dtype=torch.bool), "height": 96 if request.large else 64, "width": 64,
        "output_type": "latent", "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def hunyuan_dit(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8, hidden_size=16,
        activation_fn="gelu-approximate", text_len=TOKENS, text_len_t5=TOKENS + 2,
    )  # fmt: skip
    pipe = diffusers.HunyuanDiTPipeline(
        None, None, None, transformer, diffusers.DDPMScheduler(), None, None, requires_safety_checker=False
    )
    long = TOKENS + 2
    return pipe, {
        **masked(request, 16), "prompt_embeds_2": text(request, 16, tokens=long),
        "prompt_attention_mask_2": mask(request, tokens=long),
        "negative_prompt_embeds_2": text(request, 16, tokens=long, negative=True),
        "negative_prompt_attention_mask_2": mask(request, tokens=long), "use_resolution_binning": False,
        "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
        "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


def z_image_transformer() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[4, 4, 8], axes_lens=[64, 32, 32],
    )  # fmt: skip


def z_image_text(request: Request) -> dict[str, Any]:
    return {
        "prompt_embeds": list(text(request, 12)), "negative_prompt_embeds": list(text(request, 12, negative=True)),
        "guidance_scale": 5.0 if request.guided else 0.0,
    }  # fmt: skip


@builder
def z_image(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.ZImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, z_image_transformer())
    return pipe, {
        **z_image_text(request), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
    }  # fmt: skip


@builder
def z_image_img2img(request: Request) -> tuple[Any, dict[str, Any]]:
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.ZImageImg2ImgPipeline(scheduler, tiny_vae(), None, None, z_image_transformer())
    return pipe, {
        **z_image_text(request), "image": picture(request, 32), "strength": 0.7, "output_type": "latent",
        "height": 48 if request.large else 32, "width": 32,
    }  # fmt: skip


@builder
def flux2_klein(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    pipe = diffusers.Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)
    return pipe, {
        **unmasked(request, 12), "height": 24 if request.large else 16, "width": 16, "output_type": "latent",
        "guidance_scale": 4.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def bria(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    pipe = diffusers.BriaPipeline(transformer, FlowMatchEulerDiscreteScheduler(), tiny_vae(), None, None)
    return pipe, {
        **unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "output_type": "latent",
        "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def prx(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=12, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[4, 4],
    )  # fmt: skip
    pipe = diffusers.PRXPipeline(transformer, FlowMatchEulerDiscreteScheduler(), None, None, None)
    return pipe, {
        **masked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
        "use_resolution_binning": False, "guidance_scale": 4.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def ovis_image(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = diffusers.OvisImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)
    return pipe, {
        **unmasked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
        "guidance_scale": 5.0 if request.guided else 1.0, "negative_prompt": None,
    }  # fmt: skip


@builder
def krea2(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, timestep_embed_dim=16, text_hidden_dim=12, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=24, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    pipe = diffusers.Krea2Pipeline(
        FlowMatchEulerDiscreteScheduler(), None, None, None, transformer, text_encoder_select_layers=[0, 1, 2]
    )
    layers = lambda negative: text(request, 36, negative=negative).unflatten(-1, (3, 12))  # noqa: E731  # used twice
    return pipe, {
        "prompt_embeds": layers(False), "prompt_embeds_mask": mask(request).bool(),
        "negative_prompt_embeds": layers(True), "negative_prompt_embeds_mask": mask(request).bool(),
        "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
        "guidance_scale": 4.5 if request.guided else 0.0,
    }  # fmt: skip


@builder
def hunyuan_image(request: Request) -> tuple[Any, dict[str, Any]]:
    return _hunyuan_image(request, diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3))


@builder
def hunyuan_image_distilled(request: Request) -> tuple[Any, dict[str, Any]]:
    """Guidance is an input of the model, and so is the timestep that it steps to."""
    return _hunyuan_image(request, None, guidance_embeds=True, use_meanflow=True)


def _hunyuan_image(request: Request, guider: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=12, text_embed_2_dim=10, rope_axes_dim=(8, 8), **kwargs,
    )  # fmt: skip
    pipe = diffusers.HunyuanImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=5.0), None, None, None, None, None, transformer, guider
    )
    return pipe, {
        **twice_masked(request), "height": 192 if request.large else 128, "width": 128, "output_type": "latent",
    }  # fmt: skip


@builder
def longcat_image(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": len(WORDS)}
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                **sizes, "num_hidden_layers": 1, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 1,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
            },
            vision_config={**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 16},
        )
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.LongCatImagePipeline(scheduler, None, encoder, tiny_tokenizer(), None, transformer)
    pipe.tokenizer_max_length = 2 * TOKENS  # of the 512 that it pads to
    return pipe, {
        "prompt": words(request), "negative_prompt": ["green dog"] * request.batch, "enable_prompt_rewrite": False,
        "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
        "guidance_scale": 4.5 if request.guided else 1.0,
    }  # fmt: skip
