"""Inputs made up from names and configs: every model runs on its own, and what cannot be made up is named."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dqar_fx.errors import CaptureError
from dqar_fx.example_inputs import example_inputs

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = {**HEADS, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}

# Class, config, and what the first dimensions of the latents or tokens must come out as.
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "DiTTransformer2DModel": ({**HEADS, "num_layers": 1, "sample_size": 8}, (1, 4, 8, 8)),
    "PixArtTransformer2DModel": (
        {**HEADS, "num_layers": 1, "sample_size": 8, "cross_attention_dim": 32, "caption_channels": 8},
        (1, 4, 8, 8),
    ),
    "SD3Transformer2DModel": (
        {**HEADS, "num_layers": 1, "sample_size": 8, "caption_projection_dim": 32, "joint_attention_dim": 8},
        (1, 16, 8, 8),
    ),
    "FluxTransformer2DModel": ({**FLUX, "guidance_embeds": True}, (1, 4096, 64)),
    "ChromaTransformer2DModel": ({**FLUX, "approximator_hidden_dim": 32, "approximator_layers": 1}, (1, 4096, 64)),
    "Flux2Transformer2DModel": ({**FLUX, "axes_dims_rope": (4, 4, 4, 4)}, (1, 4096, 128)),
    "QwenImageTransformer2DModel": (
        {**HEADS, "num_layers": 1, "joint_attention_dim": 8, "axes_dims_rope": (4, 4, 8)},
        (1, 4096, 64),
    ),
    "WanTransformer3DModel": ({**HEADS, "num_layers": 1, "text_dim": 8, "ffn_dim": 32}, (1, 16, 21, 60, 104)),
    "CogVideoXTransformer3DModel": ({**HEADS, "num_layers": 1, "text_embed_dim": 8}, (1, 13, 16, 60, 90)),
    "HunyuanVideoTransformer3DModel": (
        {**HEADS, "num_layers": 1, "num_single_layers": 1, "text_embed_dim": 8, "rope_axes_dim": (4, 4, 8)},
        (1, 16, 21, 60, 104),
    ),
    "LTXVideoTransformer3DModel": (
        {**HEADS, "num_layers": 1, "cross_attention_dim": 32, "caption_channels": 8},
        (1, 21 * 16 * 26, 128),
    ),
    "AllegroTransformer3DModel": (
        {**HEADS, "num_layers": 1, "cross_attention_dim": 32, "caption_channels": 8},
        (1, 4, 22, 90, 160),
    ),
    "LatteTransformer3DModel": (
        {
            **HEADS,
            "num_layers": 1,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 1000,
            "cross_attention_dim": 32,
            "caption_channels": 8,
        },
        (1, 4, 16, 8, 8),
    ),
    "SanaTransformer2DModel": (
        {
            **HEADS,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 8,
        },
        (1, 32, 32, 32),
    ),
    "AuraFlowTransformer2DModel": (
        {
            **HEADS,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 8,
            "caption_projection_dim": 32,
        },
        (1, 4, 64, 64),
    ),
    "CogView4Transformer2DModel": (
        {**HEADS, "num_layers": 1, "text_embed_dim": 8, "rope_axes_dim": (16, 16), "sample_size": 16},
        (1, 16, 16, 16),
    ),
    # Its attention looks for the padding of the prompt, which tensors without data do not show.
    "MochiTransformer3DModel": ({**HEADS, "num_layers": 1, "text_embed_dim": 8}, (1, 12, 21, 60, 104)),
}


@pytest.fixture
def without_data() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def build(name: str, **changes: Any) -> nn.Module:
    model: nn.Module = getattr(diffusers, name)(**{**MODELS[name][0], **changes})
    return model.eval().requires_grad_(False)


# Chroma uses a class that diffusers itself wants to be rid of.
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_runs_on_what_is_made_up_for_it(name: str, without_data: FakeTensorMode) -> None:
    with without_data:
        model = build(name)
    inputs = example_inputs(model)
    assert tuple(inputs["hidden_states"].shape) == MODELS[name][1]
    if name != "MochiTransformer3DModel":
        with without_data, torch.no_grad():
            model(**inputs)


def test_a_real_model_gets_real_inputs_and_the_seed_stays() -> None:
    model = build("PixArtTransformer2DModel")
    before = torch.get_rng_state()
    inputs = example_inputs(model, text_tokens=5)
    assert torch.equal(torch.get_rng_state(), before)
    again = example_inputs(model, text_tokens=5)
    assert torch.equal(inputs["hidden_states"], again["hidden_states"])
    with torch.no_grad():
        assert model(**inputs).sample.isfinite().all()


def test_sizes_can_be_chosen() -> None:
    with torch.device("meta"):
        model = build("WanTransformer3DModel")
    inputs = example_inputs(model, batch=2, height=8, width=12, frames=3, text_tokens=7)
    assert tuple(inputs["hidden_states"].shape) == (2, 16, 3, 8, 12)
    assert tuple(inputs["encoder_hidden_states"].shape) == (2, 7, 8)
    assert tuple(inputs["timestep"].shape) == (2,)
    assert inputs["hidden_states"].device.type == "meta"


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"batch=0"):
        example_inputs(build("DiTTransformer2DModel"), batch=0)


class Odd(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden_states: Tensor, frobnication: Tensor) -> Tensor:
        return hidden_states + frobnication


def test_an_argument_without_a_rule_is_named_with_its_class() -> None:
    with pytest.raises(CaptureError, match=r"Odd\.forward needs 'frobnication'"):
        example_inputs(Odd(in_channels=4))


def test_a_config_without_the_width_is_named() -> None:
    with pytest.raises(
        CaptureError, match=r"Odd: no 'hidden_states' can be made up, since its config gives no in_channels"
    ):
        example_inputs(Odd())


class Picky(Odd):
    def forward(self, hidden_states: Tensor) -> Tensor:
        raise ValueError(f"not {hidden_states.ndim} dimensions")


def test_what_a_model_said_of_each_layout_is_told() -> None:
    with pytest.raises(CaptureError, match=r"BNC .*not 3 dimensions.*BCHW .*not 4 dimensions"):
        example_inputs(Picky(in_channels=4))
