"""A plan by measurement, for a pipeline of diffusers: how much may be reused for a given loss, and when.

    python examples/calibrate.py                                       # a small random DiT, nothing downloaded
    python examples/calibrate.py --model facebook/DiT-XL-2-256         # the real one

``dqar_fx.calibrate`` samples a few seeds forwards and backwards, searches, and verifies what it finds on other seeds.
The plan is a file: give it to ``optimize`` wherever the same model runs with the same sampler and number of steps.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import dqar_fx
from dqar_fx import Plan


def make_pipeline() -> Any:
    """A DiT pipeline with random weights: it draws nothing, but it runs as the real one does."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    return DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(clip_sample=False))


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrate, save the plan, load it, and sample with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a DiT pipeline on the hub, or a folder; by default a small random one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--budget", default="reuse=0.5", help="psnr=30, rel_error=0.05, speedup=1.3 or reuse=0.5")
    parser.add_argument("--backend", default="inductor", help='"eager" needs no compiler')
    parser.add_argument("--output", type=Path, default=Path("plan.json"))
    args = parser.parse_args(argv)
    pipe = DiTPipeline.from_pretrained(args.model) if args.model else make_pipeline()
    pipe.set_progress_bar_config(disable=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the estimate rests on")  # few seeds will do for an example
        plan = dqar_fx.calibrate(
            pipe, {"class_labels": [1, 2, 3, 4]}, budget=args.budget, num_steps=args.steps, seeds=range(args.seeds),
            backend=args.backend,
        )  # fmt: skip
    plan.save(args.output)
    print(plan)
    print("on unseen seeds:", plan.calibration["verified"] if plan.calibration else "")

    dqar_fx.optimize(pipe.transformer, Plan.load(args.output), scheduler=pipe.scheduler, backend=args.backend)
    pipe(class_labels=[1], num_inference_steps=args.steps, output_type="np")
    print(f"reused {dqar_fx.runtime(pipe.transformer).stats.reuse_ratio:.0%}")


if __name__ == "__main__":
    main()
