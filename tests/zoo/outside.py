"""Denoisers that are not from diffusers, built with the attentions that people build their own from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.zoo.case import Case

WIDTH, HEADS, DEPTH = 32, 2, 2


class Attention(nn.Module):
    """As in timm: one linear layer for Q, K and V, norms on Q and K, and one for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, -1))


class MultiheadAttention(nn.Module):
    """A module around ``torch.nn.MultiheadAttention``, which in eval mode has a fast path of its own."""

    def __init__(self, *, weights: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.weights = weights
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.inner.batch_first else x.transpose(0, 1)
        out = self.inner(x, x, x, need_weights=self.weights)[0]
        return out if self.inner.batch_first else out.transpose(0, 1)


class Block(nn.Module):
    """Both halves shifted, scaled and gated by the timestep, as in the DiT paper."""

    def __init__(self, attn: nn.Module | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn = attn
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, -1)
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(x)


class InlineBlock(Block):
    """No module for the attention: it stands in the block's own code."""

    def __init__(self) -> None:
        super().__init__(None)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PatchDenoiser(nn.Module):
    """Patches of an image, sinusoidal embeddings of the timestep, ``DEPTH`` blocks, and patches out."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(4, WIDTH, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.embed_time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        self.head = nn.ConvTranspose2d(WIDTH, 4, 2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(WIDTH // 2, device=x.device) * (-2 * math.log(10000) / WIDTH))
        angles = t[:, None].float() * frequencies
        time = self.embed_time(torch.cat([angles.cos(), angles.sin()], -1))
        tokens = self.patchify(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens, time)
        return self.head(tokens.transpose(1, 2).unflatten(2, (4, 4)))


def case(block: Callable[[], nn.Module], **stated: Any) -> Case:
    def inputs(generator: Generator) -> dict[str, Any]:
        return {"x": torch.randn(2, 4, 8, 8, generator=generator), "t": torch.full((2,), 800)}

    return Case(
        make=lambda: PatchDenoiser(block), inputs=inputs, timestep="t", varies=("x",), **{"sites": DEPTH, **stated}
    )


CASES: dict[str, Case] = {
    "PatchDenoiser:timm": case(lambda: Block(Attention())),
    "PatchDenoiser:inline": case(InlineBlock),
    "PatchDenoiser:multihead": case(lambda: Block(MultiheadAttention()), note="torch's fast path for inference"),
    "PatchDenoiser:multihead_weights": case(lambda: Block(MultiheadAttention(weights=True))),
    "PatchDenoiser:multihead_tokens_first": case(lambda: Block(MultiheadAttention(batch_first=False))),
}
