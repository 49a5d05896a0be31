"""Shared models and the eager oracle: hooks around attention modules, which is what the compiled graphs must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import dqar_fx

NUM_STEPS = 6


def make_dit(layers: int = 3, seed: int = 0) -> DiTTransformer2DModel:
    """A small random DiT in eval mode."""
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=layers, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip


def timestep(step: int, num_steps: int = NUM_STEPS, batch: int = 2) -> Tensor:
    return torch.full((batch,), 900 - (800 * step) // num_steps)


def sample(
    model: nn.Module, *, seed: int = 0, steps: int = NUM_STEPS, batch: int = 2, start: Tensor | None = None
) -> Tensor:
    """One generation by a plain loop: every prediction, ``[steps, batch, 4, 8, 8]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator) if start is None else start
    labels = torch.arange(batch) % 10
    predictions = []
    with torch.no_grad():
        for step in range(steps):
            noise = model(x, timestep=timestep(step, steps, batch), class_labels=labels).sample
            x = x - 0.2 * noise
            predictions.append(noise)
    return torch.stack(predictions)


@contextlib.contextmanager
def replaying(model: nn.Module, plan: dqar_fx.Plan, *, quantized: bool = False) -> Iterator[None]:
    """The oracle: each attention module returns its stored output wherever the plan reuses; a step is a model call."""
    modules = [m for m in model.modules() if type(m).__name__ == "Attention"]
    stored: dict[int, tuple[Tensor, ...]] = {}
    step = [-1]

    def replaced(site: int, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*args: object, **kwargs: object) -> Tensor:
            if plan.reuse[step[0], site]:
                return dqar_fx.dequantize(*stored[site]) if quantized else stored[site][0]
            output = original(*args, **kwargs)
            stored[site] = dqar_fx.quantize(output) if quantized else (output.clone(),)
            return output

        return forward

    handle = model.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    for site, module in enumerate(modules):
        module.forward = replaced(site, module.forward)
    try:
        yield
    finally:
        handle.remove()
        for module in modules:
            del module.forward
