"""Diffusers pipelines with small random components: the real pipeline class and scheduler, nothing downloaded.

Each function returns ``(pipe, kwargs)`` where ``pipe(**kwargs)`` makes one sample. Weights depend on nothing but the
function, so that two pipelines of one function are equal; what a call is asked for depends on a ``Request``. Text
encoders are left out where a pipeline takes embeddings, and decoders where it returns latents.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

#: Steps of a generation unless a test asks for another number.
STEPS = 6
#: Tokens of a prompt.
TOKENS = 5


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a pipeline."""

    prompt: int = 0  # another number is another prompt
    batch: int = 1
    large: bool = False  # another size
    steps: int = STEPS
    guided: bool = True


Builder = Callable[[Request], tuple[Any, dict[str, Any]]]
BUILDERS: dict[str, Builder] = {}


def builder(build: Builder) -> Builder:
    """Register a builder under its name; weights are the same at each call."""

    @functools.wraps(build)
    def seeded(request: Request = Request()) -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what diffusers' own constructors use
            pipe, kwargs = build(request)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        fill_zeros(pipe.transformer)
        pipe.set_progress_bar_config(disable=True)
        return pipe, {"num_inference_steps": request.steps, **kwargs}

    BUILDERS[build.__name__] = seeded
    return seeded


def fill_zeros(model: nn.Module) -> None:
    """Replace parameters that start at zero: a gate of zero would hide the attention behind it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, 0.02)


def text(request: Request, width: int, *, tokens: int = TOKENS, negative: bool = False) -> Tensor:
    """Embeddings of a prompt, ``[batch, tokens, width]``."""
    return _random(request, (request.batch, tokens, width), negative)


def pooled(request: Request, width: int, *, negative: bool = False) -> Tensor:
    """The embedding of a whole prompt, ``[batch, width]``."""
    return _random(request, (request.batch, width), negative)


def mask(request: Request, *, tokens: int = TOKENS, dtype: torch.dtype = torch.long) -> Tensor:
    """The mask of a prompt whose last token is padding, ``[batch, tokens]``."""
    ones = torch.ones(request.batch, tokens, dtype=dtype)
    ones[:, -1] = 0
    return ones


def _random(request: Request, shape: tuple[int, ...], negative: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + (500 if negative else request.prompt))
    return torch.randn(shape, generator=generator)


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    """An image autoencoder that halves the sides once."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), latent_channels=channels,
        norm_num_groups=4, sample_size=16, shift_factor=0.1,
    )  # fmt: skip


# -- images ----------------------------------------------------------------------------------------------------------


@builder
def dit(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, tiny_vae(), DDIMScheduler())
    labels = [(request.prompt + 7 * i) % 1000 for i in range(request.batch)]
    return pipe, {"class_labels": labels, "guidance_scale": 4.0 if request.guided else 1.0, "output_type": "pt"}


def _unmasked(request: Request, width: int) -> dict[str, Any]:
    """Prompt and negative prompt under the names that most pipelines give them."""
    return {"prompt_embeds": text(request, width), "negative_prompt_embeds": text(request, width, negative=True)}


def _masked(request: Request, width: int, dtype: torch.dtype = torch.long) -> dict[str, Any]:
    """The same with masks."""
    masks = {f"{name}_attention_mask": mask(request, dtype=dtype) for name in ("prompt", "negative_prompt")}
    return {**_unmasked(request, width), **masks}


def _pixart(kind: type, request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = kind(None, None, None, transformer, DPMSolverMultistepScheduler())
    side = 96 if request.large else 64
    return pipe, {
        **_masked(request, 12), "negative_prompt": None, "height": side, "width": 64, "output_type": "latent",
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
        **_unmasked(request, 12),
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


def picture(request: Request, side: int = 16) -> Tensor:
    """An image in [0, 1], ``[batch, 3, height, width]``."""
    return _random(request, (request.batch, 3, side * 3 // 2 if request.large else side, side), False).sigmoid()


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
        **_masked(request, 12), "height": 192 if request.large else 128, "width": 128, "output_type": "latent",
        "use_resolution_binning": False, "complex_human_instruction": None, "negative_prompt": None,
        "guidance_scale": 4.5 if request.guided else 1.0,
    }  # fmt: skip


# -- videos ----------------------------------------------------------------------------------------------------------


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
        **_unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 5,
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
        **_masked(request, 12), "height": 96 if request.large else 64, "width": 64, "num_frames": 9,
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
        **_unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 5,
        "output_type": "latent", "max_sequence_length": TOKENS, "guidance_scale": 6.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def cogvideox_video2video(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.CogVideoXVideoToVideoPipeline(
        None, None, None, cogvideox_transformer(), diffusers.CogVideoXDPMScheduler()
    )
    height = 48 if request.large else 32
    return pipe, {
        **_unmasked(request, 12), "height": height, "width": 32, "strength": 0.7,
        "latents": _random(request, (request.batch, 2, 4, height // 8, 4), False),
        "output_type": "latent", "max_sequence_length": TOKENS, "guidance_scale": 6.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def wan_video2video(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.WanVideoToVideoPipeline(None, None, wan_transformer(), None, unipc_flow())
    height = 48 if request.large else 32
    return pipe, {
        **_unmasked(request, 12), "height": height, "width": 32, "strength": 0.7, "output_type": "latent",
        "latents": _random(request, (request.batch, 4, 2, height // 8, 4), False),
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
        **_masked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 8,
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
        **_unmasked(request, 12), "height": 96 if request.large else 64, "width": 64, "video_length": 2,
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
        **_masked(request, 16, dtype=torch.bool), "height": 48 if request.large else 32, "width": 32, "num_frames": 7,
        "output_type": "latent",
        "guidance_scale": 4.5 if request.guided else 1.0, "max_sequence_length": TOKENS,
    }  # fmt: skip


@builder
def skyreels_v2(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.SkyReelsV2Pipeline(None, None, skyreels_transformer(), None, unipc_flow())
    return pipe, {
        **_unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 5,
        "output_type": "latent", "guidance_scale": 5.0 if request.guided else 1.0,
    }  # fmt: skip


@builder
def skyreels_v2_forcing(request: Request) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(None, None, skyreels_transformer(), None, unipc_flow())
    return pipe, {
        **_unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 9,
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
        **_masked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 5,
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
        **_unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "num_frames": 9,
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
        **_unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "output_type": "latent",
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
        **_masked(request, 12), "height": 64 if request.large else 32, "width": 32, "frames": 5,
        "output_type": "latent", "use_resolution_binning": False, "complex_human_instruction": None,
        "negative_prompt": None, "guidance_scale": 6.0 if request.guided else 1.0,
    }  # fmt: skip


# -- more images -----------------------------------------------------------------------------------------------------


@builder
def auraflow(request: Request) -> tuple[Any, dict[str, Any]]:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    pipe = diffusers.AuraFlowPipeline(None, None, None, transformer, FlowMatchEulerDiscreteScheduler(shift=1.7))
    return pipe, {
        **_masked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
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
        **_masked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
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
        **_masked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
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
        **_unmasked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
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
        **_unmasked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
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
        **_masked(request, 12, dtype=torch.bool), "height": 96 if request.large else 64, "width": 64,
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
        **_masked(request, 16), "prompt_embeds_2": text(request, 16, tokens=long),
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
        **_unmasked(request, 12), "height": 24 if request.large else 16, "width": 16, "output_type": "latent",
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
        **_unmasked(request, 12), "height": 48 if request.large else 32, "width": 32, "output_type": "latent",
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
        **_masked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
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
        **_unmasked(request, 12), "height": 96 if request.large else 64, "width": 64, "output_type": "latent",
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


# -- audio -----------------------------------------------------------------------------------------------------------


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
