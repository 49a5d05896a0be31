"""Attention reuse in a diffusion transformer and a sampling loop of one's own; nothing of diffusers is used.

    python examples/own_model.py

All that ``dqar_fx`` asks of a model is that its attentions call ``scaled_dot_product_attention``. What it should know
of a loop is where a generation begins and ends, and how many steps it has: ``runtime(model).generation(num_steps)``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dqar_fx

DIM, HEADS, DEPTH, TOKENS = 64, 4, 4, 64


class Attention(nn.Module):
    """Self-attention; its output is what gets stored and reused."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block of DiT: attention and MLP, both modulated by the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM, elementwise_affine=False), Attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.modulation = nn.Linear(DIM, 6 * DIM)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x [B, N, D]`` and ``condition [B, D]`` to ``[B, N, D]``."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Predicts the velocity of a rectified flow for ``x [B, N, D]`` at the noise levels ``t [B]``, from 1 to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(DIM, DIM), nn.SiLU(), nn.Linear(DIM, DIM), nn.SiLU())
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity, shaped as ``x``."""
        angles = t[:, None] * torch.logspace(0, 3, DIM // 2, device=t.device)
        condition = self.embed(torch.cat([angles.cos(), angles.sin()], -1))
        for block in self.blocks:
            x = block(x, condition)
        return x


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, num_steps: int) -> Tensor:
    """Euler steps from noise (t = 1) to data (t = 0)."""
    x = noise
    for step in range(num_steps):
        t = torch.full((len(x),), 1 - step / num_steps)
        x = x - model(x, t) / num_steps
    return x


def main(argv: Sequence[str] | None = None) -> None:
    """Sample without and with reuse, and compare."""
    parser = argparse.ArgumentParser(description="Attention reuse in a model of one's own.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="inductor", help="inductor or eager")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = DiT().eval()
    noise = torch.randn(2, TOKENS, DIM)
    expected = sample(model, noise, args.steps)

    dqar_fx.optimize(model, dqar_fx.Schedule.taper(), backend=args.backend)
    runtime = dqar_fx.runtime(model)
    with runtime.generation(args.steps):  # the schedule, made for 50 steps, plans itself anew for these
        result = sample(model, noise, args.steps)
        print(runtime.report())  # before leaving: what is stored is freed then

    error = (result - expected).norm() / (expected - noise).norm()
    print(f"relative error of the way from noise to sample, against no reuse: {error:.2e}")


if __name__ == "__main__":
    main()
