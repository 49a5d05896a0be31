"""Train the small diffusion transformer that ships with ``dqar_fx`` on scikit-learn's 8 x 8 digits.

    python examples/train_digits.py --out dqar_fx/assets             # the shipped weights: about 40 minutes on 2 cores
    python examples/train_digits.py --out runs/digits --steps 20     # a smoke run
    python examples/train_digits.py --out runs/digits --resume       # go on where an interrupted run stopped

The model is a class-conditional DiT (Peebles & Xie 2023, arXiv:2212.09748) on pixels, trained to predict the noise
(Ho et al. 2020, arXiv:2006.11239) with 10 % of the labels dropped for classifier-free guidance (Ho & Salimans 2022,
arXiv:2207.12598). Written to ``--out``: the averaged weights in float16 (``digits_dit.safetensors``), how they were
made (``digits_dit.json``), one line per report (``log.jsonl``) and, until training is over, ``checkpoint.pt``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dqar_fx import digits
from dqar_fx.evaluation import frechet_distance

MODEL_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,  # noise only; no learned variance
    "num_layers": 6,
    "sample_size": digits.SIZE,
    "patch_size": 2,  # 16 tokens
    "num_embeds_ada_norm": digits.NUM_CLASSES,  # the null class has this index
}
LABEL_DROPOUT = 0.1  # as in DiT and in classifier-free guidance
EMA_DECAY = 0.999
WARMUP_STEPS = 200
MAX_GRADIENT_NORM = 1.0
# One standard deviation is well inside the spread of the handwriting, so an augmented 6 still looks like a 6.
MAX_ROTATION = math.radians(8)
MAX_SHIFT = 0.4  # pixels
MAX_ZOOM = 0.06


def new_model() -> DiTTransformer2DModel:
    """The untrained model, with the adaLN-Zero start of DiT (section 3.2) that diffusers leaves out.

    Every block starts as the identity and the first prediction is zero.

    The model is put in eval mode for good. In train mode diffusers drops labels by itself, but draws anew at each of
    the 7 places that embed them: hardly an image goes without its label in all of them at once, which is what guidance
    asks of the null class later. ``train`` drops them once per image instead; nothing else here depends on the mode.
    """
    model = DiTTransformer2DModel(**MODEL_CONFIG).eval()
    for linear in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, shift and zoom each image a little: ``[N, 1, H, W]`` in [-1, 1] to the same, with background -1.

    1797 images are few enough to be learned by heart in 900 epochs.
    """
    size = images.shape[-1]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, zoom = uniform(MAX_ROTATION), 1 + uniform(MAX_ZOOM)
    dx, dy = uniform(2 * MAX_SHIFT / size), uniform(2 * MAX_SHIFT / size)  # grid_sample's image is 2 wide
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, dx], dim=1), torch.stack([sin, cos, dy], dim=1)], dim=1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, mode="bicubic", padding_mode="zeros", align_corners=False) - 1
    return moved.clamp(-1, 1)


def stratified_timesteps(count: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of ``count`` equal parts of the range, int64 ``[count]``; the loss then varies less.

    Kingma et al. 2021 (arXiv:2107.00630), appendix I.1, share one offset between the parts; each has its own here.
    """
    parts = torch.arange(count) + torch.rand(count, generator=generator)
    return (parts * (num_timesteps / count)).long().clamp(max=num_timesteps - 1)


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up over ``WARMUP_STEPS``, then a cosine down to zero as ``progress`` goes from 0 to 1."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Exponential moving average of the parameters, in place; shorter at first so that the start is forgotten."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def write_weights(model: torch.nn.Module, path: Path) -> None:
    """Float16 halves the file; no pixel moved by more than 0.02 of the data's 17 grey levels (80 images, 50 steps)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train as ``args`` says and write weights, log and checkpoints into ``args.out``; returns the recipe."""
    console = Console()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, classes = digits.real_digits()
    scheduler = digits.make_scheduler()
    num_timesteps = scheduler.config.num_train_timesteps
    model = new_model()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    step, elapsed, losses = 0, 0.0, []
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        step, elapsed = saved["step"], saved["elapsed"]
        console.print(f"resumed at step {step}")
    else:
        log.unlink(missing_ok=True)

    def save() -> None:
        write_weights(average, args.out / digits.WEIGHTS)
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"generator": generator.get_state(), "step": step, "elapsed": elapsed}
        partial = checkpoint.with_suffix(".partial")  # an interrupted write must not cost the last good checkpoint
        torch.save(state, partial)
        partial.replace(checkpoint)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("training", total=args.steps, completed=step)
        while step < args.steps and elapsed < args.minutes * 60:
            started = time.monotonic()
            for group in optimizer.param_groups:
                # Whichever runs out first, the steps or the minutes, the decay ends with it.
                group["lr"] = learning_rate(args.lr, step, max(step / args.steps, elapsed / (args.minutes * 60)))
            pick = torch.randint(len(images), (args.batch,), generator=generator)
            clean, labels = augment(images[pick], generator), classes[pick]
            labels = labels.where(torch.rand(args.batch, generator=generator) >= LABEL_DROPOUT, digits.NUM_CLASSES)
            noise = torch.randn(clean.shape, generator=generator)
            timesteps = stratified_timesteps(args.batch, num_timesteps, generator)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            predicted = model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0]
            loss = F.mse_loss(predicted, noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            step += 1
            update_average(average, model, step)
            elapsed += time.monotonic() - started
            losses.append(loss.item())
            bar.update(task, completed=step, description=f"loss {losses[-1]:.4f}")
            if step % args.log_every == 0:
                recent = losses[-args.log_every :]
                record = {"step": step, "minutes": round(elapsed / 60, 2), "loss": sum(recent) / len(recent)}
                with log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            if step % args.save_every == 0:
                save()
    save()
    return {
        "dataset": "scikit-learn load_digits: 1797 images of 8 x 8, the test set of UCI's Optical Recognition of "
        "Handwritten Digits (Alpaydin & Kaynak 1998), https://archive.ics.uci.edu/dataset/80",
        "steps": step,
        "batch": args.batch,
        "learning_rate": args.lr,
        "ema_decay": EMA_DECAY,
        "label_dropout": LABEL_DROPOUT,
        "seed": args.seed,
        "minutes": round(elapsed / 60, 1),
    }


def measure(model: DiTTransformer2DModel, guidances: Sequence[float], count: int) -> list[dict[str, float]]:
    """Agreement, distance to the real digits and spread of ``count`` images, for each guidance.

    ``frechet`` is the Fréchet distance between Gaussians fitted to the pixels, in [-1, 1], of the generated and of
    the real images (lower is better); ``spread`` the mean standard deviation within a class over that of the real
    digits (1 is as varied as they are).
    """
    images, classes = digits.real_digits()
    asked = torch.arange(count) % digits.NUM_CLASSES
    rows = []
    for guidance in guidances:
        made = digits.sample(model, classes=asked.tolist(), seed=0, guidance=guidance)
        rows.append(
            {
                "guidance": guidance,
                "agreement": round(digits.agreement(made, asked.tolist()), 4),
                "frechet": round(frechet_distance(made.flatten(1), images.flatten(1)), 3),
                "spread": round(spread(made, asked) / spread(images, classes), 3),
            }
        )
    return rows


def spread(images: Tensor, classes: Tensor) -> float:
    """Root of the pixels' variance within a class, mean over pixels and classes."""
    variances = [images[classes == label].var(dim=0, correction=0).mean() for label in range(digits.NUM_CLASSES)]
    return float(torch.stack(variances).mean().sqrt())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=8000, help="optimizer steps at most")
    parser.add_argument("--minutes", type=float, default=40.0, help="training time at most; the decay ends with it")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--evaluate", type=int, default=500, metavar="IMAGES", help="images per guidance; 0 for none")
    parser.add_argument("--guidances", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    args = parser.parse_args(argv)
    for name in ("steps", "minutes", "batch", "lr", "save_every", "log_every"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; give a number above 0")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train, write, measure and print what was measured."""
    args = parse(argv)
    recipe = train(args)
    config = {"model": MODEL_CONFIG, "guidance": digits.GUIDANCE, "training": recipe}
    config_path = args.out / digits.CONFIG
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    if args.evaluate:
        # Loaded from the file, so that what is measured is what ships, float16 round-off included.
        rows = measure(digits.load(directory=args.out), args.guidances, args.evaluate)
        config["measured"] = {"images": args.evaluate, "num_steps": 50, "scheduler": "DDIM", "seed": 0, "rows": rows}
        config_path.write_text(json.dumps(config, indent=2) + "\n")
        for row in rows:
            print(row)
    (args.out / "checkpoint.pt").unlink()  # 25 MB that nothing reads once training is over


if __name__ == "__main__":
    main()
