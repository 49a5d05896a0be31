"""Faster class-conditional images: attention reuse in a ``DiTPipeline`` of diffusers.

    python examples/dit.py                                      # a tiny random pipeline: nothing to download, or to see
    python examples/dit.py --model facebook/DiT-XL-2-256        # the real one, 2.7 GB from the Hugging Face hub
    python examples/dit.py --model FOLDER --classes 207 360     # one that is on the disk already

The three lines that matter are in ``main``: ``optimize`` before, the pipeline as always, the report after.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler

import dqar_fx


def random_pipeline() -> DiTPipeline:
    """A pipeline of the real classes in a small size, with random weights: it runs in a second and draws noise."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,  # noise and variance, as DiT-XL/2
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    return DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the classes that were asked for, and print what was reused."""
    parser = argparse.ArgumentParser(description="Draw ImageNet classes with attention reuse.")
    parser.add_argument("--model", help="name on the Hugging Face hub, or a folder")
    parser.add_argument("--random", action="store_true", help="a small random pipeline (the default without --model)")
    parser.add_argument("--classes", type=int, nargs="+", default=[207, 387], help="ImageNet classes, 0 to 999")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", choices=("ddim", "dpm"), default="ddim")
    parser.add_argument("--schedule", default="taper")
    parser.add_argument("--backend", default="inductor", help="inductor or eager")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for the images")
    args = parser.parse_args(argv)
    if args.model and args.random:
        parser.error("--random and --model exclude each other")

    pipe = DiTPipeline.from_pretrained(args.model) if args.model else random_pipeline()
    if args.sampler == "dpm":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.to(args.device, torch.float16 if args.device.startswith("cuda") else torch.float32)
    pipe.set_progress_bar_config(disable=True)

    # The scheduler that the pipeline will use: steps are told apart by it, and counted by it.
    schedule = dqar_fx.Schedule.parse(args.schedule)
    dqar_fx.optimize(pipe.transformer, schedule, scheduler=pipe.scheduler, backend=args.backend)

    for run in ("first run, which compiles", "second run"):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        images = pipe(args.classes, num_inference_steps=args.steps, generator=generator).images
        print(f"{run}: {time.perf_counter() - started:.2f} s")

    print(dqar_fx.runtime(pipe.transformer).report())
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        for label, image in zip(args.classes, images, strict=True):
            image.save(args.output / f"{label}.png")


if __name__ == "__main__":
    main()
