"""Which sites follow from the conditioning alone: by dataflow, through memory too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dqar_fx.graph.keys_values import find_stored
from dqar_fx.graph.lossless import mark_lossless
from dqar_fx.graph.sites import Region
from dqar_fx.runtime.lossless import constant_inputs
from tests.graph.conftest import MODELS, WIDTH, Attention, attend, capture, captured_model, tokens

CONSTANT = partial(constant_inputs, latents="hidden_states")


class Cross(nn.Module):
    """Queries of one stream, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        return self.out(attend(self.q(x), *self.kv(self.prepare(prompt)).chunk(2, -1)))

    def prepare(self, prompt: Tensor) -> Tensor:
        return prompt


class Noisy(Cross):
    def prepare(self, prompt: Tensor) -> Tensor:
        return prompt + torch.randn_like(prompt)


class Counting(Cross):
    """Scales the prompt by what it counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def prepare(self, prompt: Tensor) -> Tensor:
        self.calls.add_(1)
        return prompt * self.calls


class Denoiser(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn, self.refine = attn, Attention()

    def embed(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return encoder_hidden_states.tanh()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        prompt = self.embed(hidden_states, timestep, encoder_hidden_states)
        return hidden_states + self.attn(hidden_states, prompt + self.refine(prompt)) * timestep


class Modulated(Denoiser):
    def embed(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return encoder_hidden_states * timestep


class ThroughMemory(Denoiser):
    """The latents reach the prompt by a write whose result nobody names."""

    def embed(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        prompt = encoder_hidden_states.clone()
        prompt[:, :1].add_(x[:, :1])
        return prompt


class OwnMemory(Denoiser):
    def embed(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        prompt = torch.empty_like(encoder_hidden_states)
        prompt[:] = encoder_hidden_states * 2
        return prompt


def marked(model: nn.Module, target: str) -> list[Region]:
    gm = capture(model.eval(), tokens(), torch.tensor(3.0), tokens(length=4))
    return mark_lossless(gm, find_stored(gm, target), CONSTANT)


@pytest.mark.parametrize(
    ("make", "lossless"),
    [
        (lambda: Denoiser(Cross()), [True, True]),
        (lambda: OwnMemory(Cross()), [True, True]),
        (lambda: Modulated(Cross()), [False, False]),
        (lambda: ThroughMemory(Cross()), [False, False]),
        (lambda: Denoiser(Noisy()), [True, False]),
        (lambda: Denoiser(Counting()), [True, False]),
    ],
)
def test_keys_and_values_that_only_the_prompt_reaches(make: object, lossless: list[bool]) -> None:
    regions = marked(make(), "kv")  # type: ignore[operator]
    assert [region.site.lossless for region in regions] == lossless  # the refinement, then the cross-attention


def test_of_whole_outputs_only_what_attends_within_the_prompt() -> None:
    refine, cross = marked(Denoiser(Cross()), "output")
    assert (refine.site.path, refine.site.lossless) == ("refine", True)
    assert (cross.site.path, cross.site.lossless) == ("attn", False)


@pytest.mark.parametrize(
    ("name", "lossless"),
    [("dit", []), ("pixart", [1, 3]), ("sd3", []), ("flux", []), ("wan", [1, 3])],
)
def test_in_diffusers_models_it_is_the_cross_attention(name: str, lossless: list[int]) -> None:
    assert name in MODELS
    gm, _ = captured_model(name)
    regions = mark_lossless(gm, find_stored(gm, "kv"), CONSTANT)
    assert [i for i, region in enumerate(regions) if region.site.lossless] == lossless
    assert all(region.site.kind == "cross" for region in regions if region.site.lossless)
    whole = mark_lossless(gm, find_stored(gm, "output"), CONSTANT)
    assert not any(region.site.lossless for region in whole)


def test_with_sizes_left_open_it_is_the_same() -> None:
    gm = capture(Denoiser(Cross()).eval(), tokens(), torch.tensor(3.0), tokens(length=4), dynamic=True)
    regions = mark_lossless(gm, find_stored(gm, "kv"), CONSTANT)
    assert [region.site.lossless for region in regions] == [True, True]
