"""DQAR by hand: a sampling loop that asks a controller, at every attention, whether it may read a stored value.

    python examples/minimal_loop.py

Nothing is compiled and nothing is captured. This is the loop to start from for a model that ``dqar_fx.optimize`` cannot
capture, and to see what the gates decide. Here the entropy is measured at every step, before it is decided: what that
costs, and what is saved only after the queries and keys are there, is why ``optimize`` measures when it computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from dqar_fx import Controller, EntropyGate, Gates, Schedule, SnrGate
from dqar_fx.metrics import attention_entropy

DIM, HEADS, DEPTH, TOKENS = 64, 4, 6, 8


class Block(nn.Module):
    """Attention and MLP; the attention is read from the controller where it says so."""

    def __init__(self, site: int) -> None:
        super().__init__()
        self.site = site
        self.norm = nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, controller: Controller | None) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        if controller is not None and controller.should_reuse(self.site, entropy=attention_entropy(q, k), like=x):
            y = controller.reuse(self.site)
        else:
            y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            if controller is not None:
                controller.commit(self.site, y)
        return x + y + self.mlp(x)


class DiT(nn.Module):
    """Predicts the velocity of a rectified flow for ``x [B, N, D]`` at the noise level ``t``, from 1 to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(Block(site) for site in range(DEPTH))

    def forward(self, x: Tensor, t: Tensor, controller: Controller | None = None) -> Tensor:
        """The velocity, shaped as ``x``."""
        x = x + self.time(t[:, None])
        for block in self.blocks:
            x = block(x, controller)
        return x


@torch.no_grad()
def sample(model: DiT, noise: Tensor, num_steps: int, controller: Controller | None = None) -> Tensor:
    """Euler steps from noise (t = 1) to data (t = 0); with a controller, every step begins by telling it."""
    x = noise
    for step in range(num_steps):
        t = 1 - step / num_steps
        if controller is not None:
            # of a rectified flow: x = (1 - t) * data + t * noise
            controller.begin_step(step, snr=((1 - t) / t) ** 2, timestep=t)
        x = x - model(x, torch.tensor([t]), controller) / num_steps
    return x


def main(argv: Sequence[str] | None = None) -> None:
    """Sample without a controller, by the schedule alone and with gates, and compare."""
    parser = argparse.ArgumentParser(description="DQAR's controller in a loop that is driven by hand.")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = DiT().eval()
    noise = torch.randn(4, TOKENS, DIM)
    expected = sample(model, noise, args.steps)

    schedule = Schedule.always(args.steps)
    every_gate = {
        "the schedule alone": None,
        "at most 6 steps old": Gates(entropy=None, snr=None, max_age=6),
        "read at most twice": Gates(entropy=None, snr=None, max_reuse=2),
        "SNR of 0.1 or more": Gates(entropy=None, snr=SnrGate(low=0.1)),
        "entropy below 2.05 nats": Gates(entropy=EntropyGate(threshold=2.05), snr=None),
        "all of these": Gates(entropy=EntropyGate(threshold=2.05), snr=SnrGate(low=0.1), max_age=6, max_reuse=2),
    }
    rows = []
    for name, gates in every_gate.items():
        controller = Controller(schedule, DEPTH, gates=gates)
        result = sample(model, noise, args.steps, controller)
        stats = controller.stats
        blocked = ", ".join(f"{reason} {count}" for reason, count in stats.reasons.items() if reason != "reuse")
        error = float((result - expected).norm() / expected.norm())
        reused = f"{stats.reused} of {args.steps * DEPTH}"
        rows.append([name, reused, f"{error:.1e}", blocked])
    print(tabulate(rows, headers=["gates", "reused", "error", "computed because of"]))


if __name__ == "__main__":
    main()
