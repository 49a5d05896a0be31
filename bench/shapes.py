"""A second model and data set for benchmarks: a small class-conditional DiT of coloured shapes and gratings.

It differs from the shipped digits in all that is easily changed: 12 x 12 RGB instead of 8 x 8 grey, 36 tokens instead
of 16, 8 narrower blocks instead of 6, endless procedural images instead of 1797. The recipe is that of
``examples/train_digits.py``, shortened to minutes on one thread; the weights are kept in a folder and not shipped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from train_digits import LABEL_DROPOUT, MAX_GRADIENT_NORM, WARMUP_STEPS, learning_rate, stratified_timesteps

from dqar_fx import digits

SIZE = 12  # height and width, in pixels
CLASSES = ("disc", "ring", "square", "plus", "saltire", "rows", "columns", "chequers")
MODEL_CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 8,
    "sample_size": SIZE,
    "patch_size": 2,
    "num_embeds_ada_norm": len(CLASSES),  # the null class has this index
}


#: What training goes through: how far shapes stray, in pixels, and the peak of the learning rate. Shapes that lie
#: anywhere are learned as blobs in the minutes there are; then nearer to the middle, they get their outlines.
STAGES = ((1.5, 2e-3), (0.5, 1.5e-3))


def images_of(labels: Tensor, generator: torch.Generator, stray: float = STAGES[-1][0]) -> Tensor:
    """One image per label, float32 ``[N, 3, 12, 12]`` in [-1, 1], of random colour, size and place.

    A shape has a bright colour of any hue on a dark grey, and edges a pixel soft, so that places between pixels can be
    told apart. Its middle is up to ``stray`` pixels beside that of the image, in both directions.
    """

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(len(labels), generator=generator))[:, None, None]

    at = torch.arange(SIZE) - (SIZE - 1) / 2
    x, y = at[None, None, :] - uniform(-stray, stray), at[None, :, None] - uniform(-stray, stray)
    r, phase = uniform(3.2, 4.2), uniform(0, stray / 1.5)
    radius, square = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs())
    u, v = (x + y) / 2**0.5, (x - y) / 2**0.5
    # Distances in pixels, positive inside; gratings and chequers have periods of 4 and 6 pixels.
    inside = [
        r - radius,
        1.2 - (radius - r).abs(),
        0.85 * r - square,
        torch.minimum(1.2 - torch.minimum(x.abs(), y.abs()), r - square),
        torch.minimum(1.2 - torch.minimum(u.abs(), v.abs()), 1.2 * r - radius),
        1.3 * torch.cos(torch.pi * (y / 2 + 2 * phase)) + 0 * x,
        1.3 * torch.cos(torch.pi * (x / 2 + 2 * phase)) + 0 * y,
        2 * torch.cos(torch.pi / 3 * x) * torch.cos(torch.pi / 3 * y),
    ]
    mask = torch.stack(inside, dim=1)[torch.arange(len(labels)), labels].add(0.5).clamp(0, 1)
    hue, dark = uniform(0, 1)[:, None], uniform(-1, -0.5)[:, None]
    thirds = torch.tensor([0.0, 1 / 3, 2 / 3])[None, :, None, None]
    colour = (1.5 * torch.cos(2 * torch.pi * (hue - thirds)) + 0.3).clamp(-1, 1)
    return dark + (colour - dark) * mask[:, None]


def new_model() -> Any:
    """The untrained model, which starts with blocks that are the identity (adaLN-Zero) and a prediction of zero."""
    model = DiTTransformer2DModel(**MODEL_CONFIG).eval()  # train mode drops labels otherwise than guidance asks
    for linear in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def train(model: Any, stage: int, minutes: float, batch: int = 48) -> dict[str, Any]:
    """Train for one of ``STAGES``, at the end of which the learning rate is zero; returns how it was done."""
    stray, peak = STAGES[stage]
    generator = torch.Generator().manual_seed(stage)
    scheduler = digits.make_scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0, fused=True)
    losses: list[float] = []
    started = time.monotonic()
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            warm = WARMUP_STEPS if stage else 0  # only the first stage starts from nothing
            group["lr"] = learning_rate(peak, warm + len(losses), progress)
        labels = torch.randint(len(CLASSES), (batch,), generator=generator)
        clean = images_of(labels, generator, stray)
        labels = labels.where(torch.rand(batch, generator=generator) >= LABEL_DROPOUT, len(CLASSES))
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = stratified_timesteps(batch, scheduler.config.num_train_timesteps, generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        loss = F.mse_loss(model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0], noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            elapsed = (time.monotonic() - started) / 60
            print(
                f"stage {stage}, step {len(losses)}: loss {sum(losses[-50:]) / 50:.4f}, {elapsed:.1f} min", flush=True
            )
    last = losses[-100:]
    return {"stray": stray, "steps": len(losses), "batch": batch, "minutes": minutes, "loss": sum(last) / len(last)}


def load(folder: Path, *, minutes: float = 8.0) -> Any:
    """The model in ``folder``, in eval mode, gradients off; stages that are not there are trained first.

    Args:
        folder: has, or gets, ``shapes0.safetensors`` and ``shapes1.safetensors``, one for each stage, and how they
            were trained.
        minutes: to train a stage for; the learning rate ends with it, so weights depend on the machine.

    Returns:
        A ``DiTTransformer2DModel`` from ``x [N, 3, 12, 12]``, ``timestep`` and ``class_labels`` (8: no class) to the
        predicted noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = new_model()
    for stage in range(len(STAGES)):
        weights = folder / f"shapes{stage}.safetensors"
        if weights.exists():
            model.load_state_dict(load_file(weights))
            continue
        recipe = train(model, stage, minutes)
        weights.with_suffix(".json").write_text(json.dumps(recipe) + "\n")
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    return model.requires_grad_(False)


def recipe(folder: Path) -> dict[str, Any]:
    """The model's config and how each stage of it was trained."""
    stages = [json.loads((folder / f"shapes{stage}.json").read_text()) for stage in range(len(STAGES))]
    return {"model": MODEL_CONFIG, "stages": stages}


@torch.no_grad()
def sample(model: Any, *, classes: Sequence[int], seed: int, num_steps: int, guidance: float, scheduler: Any) -> Tensor:
    """Draw one image per class, as ``dqar_fx.digits.sample`` does: float32 ``[N, 3, 12, 12]`` in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(num_steps)
    images = torch.randn(len(classes), 3, SIZE, SIZE, generator=generator) * scheduler.init_noise_sigma
    guided = guidance != 1
    labels = torch.tensor([*classes, *([len(CLASSES)] * len(classes) if guided else [])])
    for timestep in scheduler.timesteps:
        x = scheduler.scale_model_input(images, timestep)
        x = torch.cat([x, x]) if guided else x
        eps = model(x, timestep=timestep.repeat(len(x)), class_labels=labels).sample
        if guided:
            conditional, null = eps.chunk(2)
            eps = null + guidance * (conditional - null)
        images = scheduler.step(eps, timestep, images).prev_sample
    return images.clamp(-1, 1)


def picture(images: Tensor, path: Path, columns: int) -> None:
    """Write ``[N, 3, H, W]`` in [-1, 1] as one PNG, ``columns`` images wide, each pixel 8 x 8."""
    from matplotlib import image

    N, _, H, W = images.shape
    grid = images.reshape(N // columns, columns, 3, H, W).permute(0, 3, 1, 4, 2).reshape(-1, columns * W, 3)
    large = ((grid + 1) / 2).clamp(0, 1).repeat_interleave(8, 0).repeat_interleave(8, 1)
    image.imsave(path, large.numpy())
