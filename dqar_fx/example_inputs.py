"""Inputs made up for a diffusers transformer, from the names of its arguments and its config.

No table of classes: an argument called ``encoder_hidden_states`` is a text embedding whatever the class, and its width
is one of a few config keys. What names do not tell is the layout of ``hidden_states`` (an image, a video with channels
before or after the frames, a sequence of tokens): the likely ones are tried in turn on tensors without data.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.func import functional_call

from dqar_fx.errors import CaptureError

#: Sizes for a model whose config names none: a 1024 px image, or a 480p video of 81 frames, behind usual autoencoders.
IMAGE_SIZE = (128, 128)
VIDEO_SIZE = (60, 104)
TOKEN_GRID = (64, 64)
VIDEO_TOKEN_GRID = (16, 26)
FRAMES = 21
TEXT_TOKENS = 512  # of a T5 encoder, as the pipelines of Flux, Wan and others pad to
AUDIO_TOKENS = 256

_CHANNELS = (
    "in_channels", "in_visual_dim", "latent_dim", "io_channels", "in_dim", "latent_channel", "embedding_dim",
    "hidden_size",
)  # fmt: skip
_TEXT_WIDTH = (
    "caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cap_feat_dim", "context_in_dim",
    "in_text_dim", "text_in_dim", "text_hidden_dim", "cond_token_dim", "dit_text_dim", "cross_attention_input_dim",
    "condition_dim", "llm_features_dim", "cross_attention_dim", "encoder_hidden_size", "embedding_dim", "hidden_size",
)  # fmt: skip
_TEXT_LENGTH = ("max_text_seq_length", "max_sequence_length", "text_len", "num_embeddings")
_NOT_SHARED = ("return_dict", "attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")


def example_inputs(
    model: nn.Module,
    *,
    batch: int = 1,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    text_tokens: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments that ``model`` can be called with: of the right shapes, without meaning.

    Args:
        model: a diffusers transformer (anything with ``.config`` and a ``forward`` whose arguments have the usual
            names). The inputs are on its device, and fake tensors if its parameters are.
        batch: size of the batch; with guidance batched in one call, twice the number of images.
        height, width, frames: of ``hidden_states``, that is, in latent pixels and frames, or in tokens for a model that
            takes a sequence of tokens. By default what the config says, else a 1024 px image or a 480p video.
        text_tokens: length of the prompt.

    Returns:
        Arguments by name; optional ones only where a pipeline would give them.

    Raises:
        CaptureError: names the class and the argument that could not be made up, or what the model said of each try.
    """
    name = type(model).__name__
    parameters = dict(inspect.signature(model.forward).parameters)
    config = dict(getattr(model, "config", None) or {})
    given = {"batch": batch, "height": height, "width": width, "frames": frames, "text_tokens": text_tokens}
    for key, value in given.items():
        if value is not None and value < 1:
            raise CaptureError(f"example_inputs({key}={value}): give a number of at least 1.")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    refusals = []
    first: dict[str, Any] | None = None
    for attempt in _attempts(name, parameters):
        maker = _Maker(name, config, parameters, *attempt, parameter.device, parameter.dtype, **given)  # type: ignore[arg-type]  # all are ints or None
        with detect_fake_mode(parameter) or nullcontext():
            inputs = maker.inputs()
        refusal = _refusal(model, inputs)
        if refusal is None:
            return inputs
        if wants_values(refusal):
            first = first or inputs  # not a matter of shapes
        if not attempt[-1]:
            said = (str(refusal).strip().splitlines() or [""])[0]
            refusals.append(f"{attempt[0]} {list(_first_shape(inputs))}: {type(refusal).__name__}: {said}")
    if first is not None:
        return first
    raise CaptureError(
        f"no inputs could be made up for {name}; it was tried with hidden_states as {'; as '.join(refusals)}. "
        f"Call the model yourself and look at dqar_fx.runtime(model).report()."
    )


def wants_values(error: BaseException | None) -> bool:
    """True if a model fails on tensors without data because it looks at the data, not because shapes are wrong."""
    return isinstance(
        error,
        (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException, NotImplementedError),
    )


def _attempts(name: str, parameters: Mapping[str, Any]) -> Iterator[tuple[str, bool, bool]]:
    """Layouts of ``hidden_states``, the likeliest first; whether ``img_shapes`` is a list for each sample; whether
    masks are given that need not be (some models take theirs in a form of their own)."""
    named = set(parameters)
    tokens = bool(named & {"img_ids", "img_shapes"}) or {"num_frames", "height", "width"} <= named
    dimensions = _dimensions(name)
    if dimensions == 3:
        order = ["BCFHW", "BFCHW", "BFHWC", "BNC"]
    elif dimensions == 2:
        order = ["BCHW", "BNC"]
    else:
        order = ["BNC", "BCN", "BC", "BCHW", "BCFHW"]
    if tokens:
        order = ["BNC", *(layout for layout in order if layout != "BNC")]
    for layout in order:
        for nested in (True, False) if "img_shapes" in parameters else (True,):
            yield layout, nested, True
            yield layout, nested, False


def _dimensions(name: str) -> int:
    """2 for an image, 3 for a video, 1 for what does not say: ``WanTransformer3DModel`` is 3."""
    found = re.search(r"([123])D(?=Model|$)", name)
    return int(found.group(1)) if found else 1


def _refusal(model: nn.Module, inputs: Mapping[str, Any]) -> Exception | None:
    """What the model says when it is called on tensors of these shapes without data; None if it runs."""
    state = dict((*model.named_parameters(), *model.named_buffers()))
    mode = detect_fake_mode(next(iter(state.values()), None)) or FakeTensorMode(allow_non_fake_inputs=True)
    fake: dict[str, Tensor] = {
        name: value if isinstance(value, FakeTensor) else mode.from_tensor(value) for name, value in state.items()
    }
    try:
        with torch.no_grad(), mode, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial: what the model warns of, it will warn of again when it is used
            functional_call(model, fake, (), _without_data(inputs, mode))
    except Exception as error:  # whatever a model raises when it is given the wrong shapes
        return error
    return None


def _without_data(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return value if isinstance(value, FakeTensor) else mode.from_tensor(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_without_data(v, mode) for v in value)
    if isinstance(value, Mapping):
        return {k: _without_data(v, mode) for k, v in value.items()}
    return value


def _first_shape(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    return next((tuple(v.shape) for v in inputs.values() if isinstance(v, Tensor)), ())


class _Skip(Exception):
    """Raised by a rule for an argument that had better be left out."""


@dataclass(slots=True)
class _Maker:
    """Makes one set of inputs; each argument has a method of its name, or an entry in ``_ALIASES``."""

    name: str
    config: Mapping[str, Any]
    parameters: Mapping[str, inspect.Parameter]
    layout: str
    nested: bool
    masks: bool
    device: torch.device
    dtype: torch.dtype
    batch: int
    height: int | None
    width: int | None
    frames: int | None
    text_tokens: int | None
    argument: str = field(default="", init=False)

    def inputs(self) -> dict[str, Any]:
        """An entry for each argument that is required, or that a pipeline would give."""
        self._set_sizes()
        found = {}
        for name, parameter in self.parameters.items():
            if name in _NOT_SHARED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            self.argument = name
            rule = _RULES.get(name)
            if rule is None:
                if parameter.default is parameter.empty:
                    raise CaptureError(
                        f"{self.name}.forward needs {name!r}, and there is no rule to make it up from the config. "
                        f"Call the model yourself and look at dqar_fx.runtime(model).report()."
                    )
                continue
            try:
                found[name] = rule(self)
            except _Skip:
                if parameter.default is parameter.empty:
                    found[name] = None
        return found

    # -- the config -------------------------------------------------------------------------------------------------

    def get(self, *keys: str) -> Any:
        """The first of these config keys that has a value, or None."""
        return next((self.config[k] for k in keys if self.config.get(k) is not None), None)

    def need(self, *keys: str) -> Any:
        """The same; an error if there is none."""
        value = self.get(*keys)
        if value is None:
            present = [k for k in keys if k in self.config]
            raise CaptureError(
                f"{self.name}: no {self.argument!r} can be made up, since its config gives no "
                f"{' or '.join(present or keys[:1])}. Pass a config that does."
            )
        return value

    def optional(self, *keys: str) -> Any:
        """The same; leaves the argument out if there is none."""
        value = self.get(*keys)
        if value is None or value is False:
            raise _Skip
        return value

    @property
    def required(self) -> bool:
        return self.parameters[self.argument].default is inspect.Parameter.empty

    def _set_sizes(self) -> None:
        dimensions = _dimensions(self.name)
        video = dimensions == 3
        tokens = self.layout == "BNC"
        default = (VIDEO_TOKEN_GRID if video else TOKEN_GRID) if tokens else (VIDEO_SIZE if video else IMAGE_SIZE)
        size = self.get("sample_size")
        in_config = tuple(size[-2:]) if isinstance(size, (tuple, list)) else (size, size)
        if self.get("sample_height", "sample_width") is not None:
            in_config = (self.get("sample_height"), self.get("sample_width"))
        if tokens and video:
            in_config = (None, None)  # what configs give is in latent pixels
        if dimensions == 1:
            default, in_config = (1, 1024), (1, in_config[1])  # a sound: its length is its width
        self.height = self.height or in_config[0] or default[0]
        self.width = self.width or in_config[1] or default[1]
        if self.frames is None:
            frames = self.get("sample_frames", "video_length")
            every = self.get("temporal_compression_ratio") or 1
            self.frames = (frames - 1) // every + 1 if frames else FRAMES if video else 1
        self.text_tokens = self.text_tokens or self.get(*_TEXT_LENGTH) or TEXT_TOKENS

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, height and width in tokens."""
        frames, height, width = self.frames or 1, self.height or 1, self.width or 1
        if self.layout == "BNC":
            return frames, height, width
        patch = self.get("patch_size") or 1
        sides = tuple(patch) if isinstance(patch, (tuple, list)) else (patch, patch)
        temporal = self.get("patch_size_t") or (sides[0] if len(sides) == 3 else 1)
        return frames // temporal, height // sides[-2 if len(sides) > 1 else -1], width // sides[-1]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    # -- tensors ----------------------------------------------------------------------------------------------------

    def real(self, *shape: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        # From the CPU's generator and a seed of its own: the same on every device, and the caller's seed stays.
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)

    def whole(self, *shape: int, value: int = 0) -> Tensor:
        return torch.full(shape, value, dtype=torch.long, device=self.device)

    def ones(self, *shape: int) -> Tensor:
        """A mask that lets everything through, of the dtype that the signature asks for."""
        if not self.masks and not self.required:
            raise _Skip
        wants = str(self.parameters[self.argument].annotation)
        return torch.ones(shape, dtype=torch.bool if "Bool" in wants else torch.long, device=self.device)

    def text(self, *keys: str, length: int | None = None) -> Tensor:
        return self.real(self.batch, length or self.text_tokens or TEXT_TOKENS, self.need(*keys))

    def ids(self, length: int) -> Tensor:
        """Positions ``[length, axes]``."""
        axes = self.get("axes_dims_rope", "axes_dims", "axes_dim_rope")
        count = len(axes) if axes else 3
        ids = torch.zeros(length, count, dtype=self.dtype, device=self.device)
        if length == self.tokens:
            ids[:, count - 2] = torch.arange(length, device=self.device) // self.grid[2]
            ids[:, count - 1] = torch.arange(length, device=self.device) % self.grid[2]
        return ids

    def hidden_states(self) -> Tensor:
        channels = self.need(*_CHANNELS)
        if self.get("visual_cond"):
            channels = 2 * channels + 1  # the picture to start from, and its mask, ride along
        sizes = {"B": self.batch, "C": channels, "F": self.frames, "H": self.height, "W": self.width, "N": self.tokens}
        return self.real(*(sizes[letter] or 1 for letter in self.layout))

    def time(self) -> Tensor:
        wants = str(self.parameters[self.argument].annotation)
        discrete = "Long" in wants or self.get("num_embeds_ada_norm") is not None
        if discrete:
            return self.whole(self.batch, value=500)
        return torch.full((self.batch,), 0.5, dtype=self.dtype, device=self.device)

    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine, ``[tokens, head_dim]`` each."""
        if not self.required and not self.get("use_rotary_positional_embeddings"):
            raise _Skip
        width = self.get("attention_head_dim") or self.need("hidden_size") // self.need("num_attention_heads")
        return self.real(self.tokens, width), self.real(self.tokens, width)


def _encoder(maker: _Maker) -> Tensor:
    if not maker.required and maker.get(*_TEXT_WIDTH) is None:
        raise _Skip
    return maker.text(*_TEXT_WIDTH)


def _class_labels(maker: _Maker) -> Tensor:
    if maker.get("norm_type") != "ada_norm_zero":
        raise _Skip
    return maker.whole(maker.batch)


def _guidance(maker: _Maker) -> Tensor:
    maker.optional("guidance_embeds")
    return torch.full((maker.batch,), 4.0, dtype=maker.dtype, device=maker.device)


def _conditions(maker: _Maker) -> dict[str, Tensor | None]:
    """PixArt's: the size of the image, which models for 1024 px do not want."""
    if maker.get("norm_type") != "ada_norm_single":
        raise _Skip
    wanted = maker.get("use_additional_conditions")
    if wanted is None:
        wanted = maker.get("sample_size") == 128
    if not wanted:
        return {"resolution": None, "aspect_ratio": None}
    return {"resolution": maker.real(maker.batch, 2), "aspect_ratio": maker.real(maker.batch, 1)}


def _image_shapes(maker: _Maker) -> list[Any]:
    shape = maker.grid
    return [[shape]] * maker.batch if maker.nested else [shape] * maker.batch


def _pooled(maker: _Maker) -> Tensor:
    return maker.real(maker.batch, maker.optional("pooled_projection_dim", "in_text_dim2", "text_emb_dim"))


def _time_if_wanted(*keys: str) -> Callable[[_Maker], Tensor]:
    def rule(maker: _Maker) -> Tensor:
        if not maker.required:
            maker.optional(*keys)
        return maker.time()

    return rule


def _second_text(maker: _Maker) -> Tensor:
    width = maker.optional("text_embed_2_dim", "cross_attention_dim_t5", "text_embed_dim_t5")
    return maker.real(maker.batch, _second_length(maker), width)


def _second_mask(maker: _Maker) -> Tensor:
    maker.optional("text_embed_2_dim", "cross_attention_dim_t5", "text_embed_dim_t5")
    return maker.ones(maker.batch, _second_length(maker))


def _second_length(maker: _Maker) -> int:
    return int(maker.get("text_len_t5") or maker.text_tokens or TEXT_TOKENS)


def _t5(maker: _Maker) -> Tensor:
    captions = maker.get("caption_channels")
    if isinstance(captions, (tuple, list)):  # HiDream: one width for each of its text encoders
        return maker.real(maker.batch, maker.text_tokens or TEXT_TOKENS, captions[0])
    return _second_text(maker)


def _llama(maker: _Maker) -> Tensor:
    layers = max(maker.need("llama_layers")) + 1
    return maker.real(layers, maker.batch, maker.text_tokens or TEXT_TOKENS, maker.need("caption_channels")[-1])


def _image_embeds(maker: _Maker) -> Tensor:
    keys = ("image_embed_dim", "image_dim", "image_proj_dim", "img_context_dim_in")
    width = maker.need(*keys) if maker.required else maker.optional(*keys)
    return maker.real(maker.batch, maker.get("img_context_num_tokens") or 257, width)


def _text_layers(maker: _Maker) -> list[Tensor]:
    layers = maker.need("num_layers") + maker.need("num_single_layers")
    return [maker.text("text_encoder_dim") for _ in range(layers)]


def _style(maker: _Maker) -> Tensor:
    maker.optional("use_style_cond_and_image_meta_size")
    return maker.whole(maker.batch)


def _meta_size(maker: _Maker) -> Tensor:
    maker.optional("use_style_cond_and_image_meta_size")
    return maker.real(maker.batch, 6)


def _padding(maker: _Maker) -> Tensor:
    maker.optional("concat_padding_mask")
    return torch.zeros(1, 1, maker.height or 1, maker.width or 1, dtype=maker.dtype, device=maker.device)


def _globals(maker: _Maker) -> Tensor:
    if maker.get("global_states_input_dim"):
        return maker.real(maker.batch, 1, maker.need("global_states_input_dim"))
    return maker.real(maker.batch, maker.need("global_cond_dim"))


def _rotary_audio(maker: _Maker) -> tuple[Tensor, Tensor]:
    """For the latents and the token of the global condition in front of them, over half of each head."""
    length = (maker.get("sample_size") or maker.tokens) + 1
    width = maker.need("attention_head_dim") // 2
    return maker.real(length, width), maker.real(length, width)


def _list_of_latents(maker: _Maker) -> list[Tensor]:
    return [
        maker.real(maker.need("in_channels"), maker.frames or 1, maker.height or 1, maker.width or 1)
        for _ in range(maker.batch)
    ]


def _list_of_captions(maker: _Maker) -> list[Tensor]:
    return [maker.real(maker.text_tokens or TEXT_TOKENS, maker.need("cap_feat_dim")) for _ in range(maker.batch)]


def _control(maker: _Maker) -> Tensor:
    channels = maker.optional("vace_in_channels")
    return maker.real(maker.batch, channels, maker.frames or 1, maker.height or 1, maker.width or 1)


def _axis(position: int) -> Callable[[_Maker], int]:
    return lambda maker: maker.grid[position]


def _positions(maker: _Maker) -> tuple[Tensor, ...]:
    return tuple(torch.arange(size, device=maker.device) for size in maker.grid)


def _pair(maker: _Maker) -> Tensor:
    return maker.real(maker.batch, 2)


_RULES: dict[str, Callable[[_Maker], Any]] = {
    # the sample
    "hidden_states": _Maker.hidden_states,
    "x": _list_of_latents,
    "inputs_embeds": lambda m: m.real(m.batch, m.need("num_codebooks"), m.need("hidden_size")),
    "img_ids": lambda m: m.ids(m.tokens),
    "img_shapes": _image_shapes,
    "num_frames": lambda m: m.grid[0] if {"height", "width"} <= set(m.parameters) else 1,
    "height": _axis(1),
    "width": _axis(2),
    "image_rotary_emb": _Maker.rotary,
    "rotary_embedding": _rotary_audio,
    "visual_rope_pos": _positions,
    "text_rope_pos": lambda m: torch.arange(m.text_tokens or TEXT_TOKENS, device=m.device),
    "padding_mask": _padding,
    "control_hidden_states": _control,
    "audio_hidden_states": lambda m: m.real(m.batch, AUDIO_TOKENS, m.need("audio_in_channels", "in_audio_dim")),
    "audio_num_frames": lambda _: AUDIO_TOKENS,
    "latent_cond": lambda m: m.hidden_states() if m.optional("use_latent_condition") else None,
    # the time
    "timestep": _Maker.time,
    "timesteps": _Maker.time,
    "t": _Maker.time,
    "r_timestep": _Maker.time,
    "timestep_r": _time_if_wanted("use_meanflow"),
    "target_timestep": _time_if_wanted("flow_map"),
    "ofs": lambda m: m.time() if m.optional("ofs_embed_dim") else None,
    "guidance": _guidance,
    # the prompt
    "encoder_hidden_states": _encoder,
    "txt_ids": lambda m: m.ids(m.text_tokens or TEXT_TOKENS),
    "encoder_attention_mask": lambda m: m.ones(m.batch, m.text_tokens or TEXT_TOKENS),
    "encoder_mask": lambda m: m.ones(m.batch, m.text_tokens or TEXT_TOKENS),
    "text_embedding_mask": lambda m: m.ones(m.batch, m.text_tokens or TEXT_TOKENS),
    "text_embedding_mask_t5": _second_mask,
    "encoder_hidden_states_t5": _t5,
    "encoder_hidden_states_llama3": _llama,
    "encoder_hidden_states_2": _second_text,
    "encoder_attention_mask_2": _second_mask,
    "encoder_hidden_states_image": _image_embeds,
    "image_embeds": _image_embeds,
    "audio_encoder_hidden_states": lambda m: m.text("caption_channels"),
    "pooled_projections": _pooled,
    "pooled_embeds": _pooled,
    "proj_embedding": lambda m: m.real(m.batch, m.need("embedding_proj_dim", "embedding_dim")),
    "global_hidden_states": _globals,
    "text_encoder_layers": _text_layers,
    "text_bth": lambda m: m.text("text_in_dim"),
    "text_lens": lambda m: m.whole(m.batch, value=m.text_tokens or TEXT_TOKENS),
    "cap_feats": _list_of_captions,
    "class_labels": _class_labels,
    # other conditions
    "added_cond_kwargs": _conditions,
    "original_size": _pair,
    "target_size": _pair,
    "crop_coords": _pair,
    "image_meta_size": _meta_size,
    "style": _style,
}
