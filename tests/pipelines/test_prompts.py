"""A whole pipeline, from a prompt in words to a picture: tokenizer, text encoder, transformer, decoder."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel

import dqar_fx
from tests.pipelines.harness import SCHEDULE, SETTINGS
from tests.pipelines.kit import STEPS, WORDS, fill_zeros, tiny_tokenizer, tiny_vae


def make_pipe() -> Any:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(model_max_length=8)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(WORDS), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ).eval()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    fill_zeros(transformer)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    pipe = diffusers.PixArtSigmaPipeline(tokenizer, encoder, tiny_vae().eval(), transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str | list[str], seed: int = 0) -> np.ndarray[Any, Any]:
    pictures = pipe(
        prompt, negative_prompt="green dog", height=16, width=16, num_inference_steps=STEPS, max_sequence_length=8,
        use_resolution_binning=False, clean_caption=False, generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = make_pipe()
    dqar_fx.optimize(pipe.transformer, SCHEDULE, scheduler=pipe.scheduler, **SETTINGS)
    return pipe


def test_words_become_the_picture_that_a_fresh_pipeline_draws(pipe: Any) -> None:
    for prompt in ("a red cat", "a green cat", "a red cat"):
        draw(pipe, prompt, seed=1)
        assert dqar_fx.runtime(pipe.transformer).stats.reuse_ratio == 0.5
    drawn = draw(pipe, "a red dog")
    fresh = make_pipe()
    dqar_fx.optimize(fresh.transformer, SCHEDULE, scheduler=fresh.scheduler, **SETTINGS)
    assert np.array_equal(drawn, draw(fresh, "a red dog"))


def test_a_restored_pipeline_draws_what_it_drew_before(pipe: Any) -> None:
    eager = draw(make_pipe(), ["a red cat", "a dog"])
    draw(pipe, ["a red cat", "a dog"])
    dqar_fx.restore(pipe.transformer)
    assert np.array_equal(draw(pipe, ["a red cat", "a dog"]), eager)
