"""DQAR's dummy: a diffusion transformer of 6 layers and 8 tokens with random weights, driven by hand for 12 steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dqar_fx.controller import Controller
from dqar_fx.metrics import attention_entropy

STEPS, LAYERS, TOKENS = 12, 6, 8
# Wide enough that arithmetic takes the time, and not Python.
WIDTH, HEADS, BATCH = 192, 6, 16
# Of the weights, times 1 / sqrt(width): it makes the scores spread so far that entropies lie clearly below ln(8).
GAIN = 0.8


class Block(nn.Module):
    """A block of DiT, attention and MLP, whose attention asks a controller whether it has to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(
        self, x: Tensor, condition: Tensor, site: int, controller: Controller | None, measured: list[Tensor]
    ) -> Tensor:
        """``x [B, N, D]`` and ``condition [B, D]`` to ``[B, N, D]``; without a controller, a block like any other."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        if controller is not None and controller.should_reuse(site, like=x):
            attended: Tensor = controller.reuse(site)
        else:
            attended = self._attend(self.norm(x) * (1 + scale) + shift, site, controller, measured)
        x = x + gate * attended
        changed: Tensor = x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)
        return changed

    def _attend(self, x: Tensor, site: int, controller: Controller | None, measured: list[Tensor]) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attended: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        def entropy() -> Tensor:
            measured.append(attention_entropy(q, k))
            return measured[-1]

        return attended if controller is None else controller.commit(site, attended, entropy=entropy)


class DummyDiT(nn.Module):
    """Predicts the velocity of a rectified flow for ``x [B, N, D]`` at the noise level ``t``, from 1 to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor, t: float, controller: Controller | None, measured: list[Tensor]) -> Tensor:
        """The velocity, shaped as ``x``; entropies ``[B]`` are added to ``measured``."""
        angles = t * torch.logspace(0, 3, WIDTH // 2, device=x.device).expand(len(x), -1)
        condition = self.embed(torch.cat([angles.cos(), angles.sin()], -1))
        for site, block in enumerate(self.blocks):
            x = block(x, condition, site, controller, measured)
        return x


def make_dummy(seed: int) -> tuple[DummyDiT, Tensor]:
    """The model and the noise ``[B, N, D]`` to begin with; the random state of the caller stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DummyDiT().eval()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=GAIN * module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        return model, torch.randn(BATCH, TOKENS, WIDTH)


@torch.inference_mode()
def sample(
    model: DummyDiT, noise: Tensor, controller: Controller | None, on_step: Callable[[], object] = lambda: None
) -> tuple[Tensor, list[Tensor]]:
    """Euler steps from noise (t = 1) to data (t = 0), and every entropy ``[B]`` that was measured on the way.

    Without a controller there is nothing of DQAR in the loop: a baseline that neither stores nor asks.
    """
    x, measured = noise, list[Tensor]()
    for step in range(STEPS):
        if controller is not None:
            controller.begin_step(step)
        x = x - model(x, 1 - step / STEPS, controller, measured) / STEPS
        on_step()
    return x, measured
