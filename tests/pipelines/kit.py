"""What the builders of pipelines share: what is asked of a pipeline, prompts, pictures, and parts of every kind."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

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


def seeded(build: Builder) -> Builder:
    """A builder whose weights are the same at each call, its pipeline ready to run."""

    @functools.wraps(build)
    def ready(request: Request = Request()) -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what diffusers' own constructors use
            with uninitialized_as_nan():
                pipe, kwargs = build(request)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        for transformer in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if transformer is not None:
                fill_zeros(transformer)
        pipe.set_progress_bar_config(disable=True)
        if "num_inference_steps" in inspect.signature(pipe).parameters:
            kwargs = {"num_inference_steps": request.steps, **kwargs}
        return pipe, kwargs

    return ready


def builder(build: Builder) -> Builder:
    """Register a seeded builder under its name."""
    BUILDERS[build.__name__] = seeded(build)
    return BUILDERS[build.__name__]


@contextmanager
def uninitialized_as_nan() -> Iterator[None]:
    """Inside, ``torch.empty`` gives NaN: what a model leaves as it is (Lumina's padding) would differ otherwise."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def fill_zeros(model: nn.Module) -> None:
    """Replace parameters that start at zero, behind which an attention would be hidden, or at nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.isnan().any() or not parameter.any()):
                parameter.normal_(0, 0.02)


def text(request: Request, width: int, *, tokens: int = TOKENS, negative: bool = False) -> Tensor:
    """Embeddings of a prompt, ``[batch, tokens, width]``."""
    return noise(request, (request.batch, tokens, width), negative=negative)


def pooled(request: Request, width: int, *, negative: bool = False) -> Tensor:
    """The embedding of a whole prompt, ``[batch, width]``."""
    return noise(request, (request.batch, width), negative=negative)


def mask(request: Request, *, tokens: int = TOKENS, dtype: torch.dtype = torch.long) -> Tensor:
    """The mask of a prompt whose last token is padding, ``[batch, tokens]``."""
    ones = torch.ones(request.batch, tokens, dtype=dtype)
    ones[:, -1] = 0
    return ones


def noise(request: Request, shape: tuple[int, ...], *, negative: bool = False) -> Tensor:
    """Random values that depend on the prompt alone."""
    generator = torch.Generator().manual_seed(1000 + (500 if negative else request.prompt))
    return torch.randn(shape, generator=generator)


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    """An image autoencoder that halves the sides once."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), latent_channels=channels,
        norm_num_groups=4, sample_size=16, shift_factor=0.1,
    )  # fmt: skip


def unmasked(request: Request, width: int) -> dict[str, Any]:
    """Prompt and negative prompt under the names that most pipelines give them."""
    return {"prompt_embeds": text(request, width), "negative_prompt_embeds": text(request, width, negative=True)}


def masked(request: Request, width: int, dtype: torch.dtype = torch.long) -> dict[str, Any]:
    """The same with masks."""
    masks = {f"{name}_attention_mask": mask(request, dtype=dtype) for name in ("prompt", "negative_prompt")}
    return {**unmasked(request, width), **masks}


def twice_masked(request: Request) -> dict[str, Any]:
    """Prompts of two encoders, 12 and 10 wide, with masks: what Hunyuan's later pipelines are given."""
    given = {}
    for encoder, width, tokens in (("", 12, TOKENS), ("_2", 10, TOKENS + 1)):
        for name, negative in (("", False), ("negative_", True)):
            given[f"{name}prompt_embeds{encoder}"] = text(request, width, tokens=tokens, negative=negative)
            given[f"{name}prompt_embeds_mask{encoder}"] = mask(request, tokens=tokens)
    return given


def picture(request: Request, side: int = 16) -> Tensor:
    """An image in [0, 1], ``[batch, 3, height, width]``."""
    return noise(request, (request.batch, 3, side * 3 // 2 if request.large else side, side)).sigmoid()


#: The words that prompts are made of: whatever else a pipeline adds to them is unknown.
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "green", "cat", "dog"]


def tiny_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that knows a few words."""
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **kwargs
    )


def words(request: Request) -> list[str]:
    """A prompt in words for each sample."""
    prompts = ["a red cat", "a green cat", "a red dog"]
    return [prompts[(request.prompt + i) % len(prompts)] for i in range(request.batch)]
