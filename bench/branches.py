"""What sharing between the branches of guidance does to the trade of reuse against error, on the shipped digits model.

Guidance runs in two calls a step, as in pipelines for large models. Each row is one schedule, with or without sharing:
the share of attentions reused (of these, how many the unconditional branch took from the conditional one at the same
step), and the PSNR of the images against those that the same model draws without reuse, from the same noise. Errors
only, so nothing is compiled by default.

    python bench/branches.py                       # two minutes on two cores
    python bench/branches.py --images 50 --seeds 0 1 2 3
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
import torch

import dqar_fx
from dqar_fx import CrossBranch, Gates, Schedule, digits

COLUMNS = ("schedule", "gates", "reuse_ratio", "shared_ratio", "psnr_db", "rel_l2_error", "median_difference")
#: Images go from -1 to 1.
RANGE = 2.0
#: Without reuse over time, with it, and with as much of it as sharing adds.
SCHEDULES = (
    "none:steps={}", "interval:steps={},every=2,warmup=0.1", "interval:steps={},every=3,warmup=0.1",
    "interval:steps={},every=4,warmup=0.1", "interval:steps={},every=5,warmup=0.1",
)  # fmt: skip


def cases(steps: int, thresholds: Sequence[float]) -> Iterator[tuple[str, Gates | None]]:
    """Schedules alone, and with sharing behind them."""
    for schedule in SCHEDULES:
        yield schedule.format(steps), None
        for threshold in thresholds:
            yield schedule.format(steps), Gates(entropy=None, snr=None, cross_branch=CrossBranch(threshold))


@torch.no_grad()
def sample_in_two_calls(
    model: torch.nn.Module, scheduler: Any, classes: Sequence[int], seed: int, steps: int, guidance: float
) -> torch.Tensor:
    """As ``digits.sample``, with a call of the model for each branch of guidance: float32 ``[N, 1, 8, 8]``."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(classes), 1, digits.SIZE, digits.SIZE, generator=generator).to(device)
    labels = {
        "cond": torch.tensor(list(classes), device=device),
        "uncond": torch.full((len(classes),), digits.NUM_CLASSES, device=device),
    }
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.to(device)
    optimised = model._compiled_call_impl is not None
    for step, timestep in enumerate(scheduler.timesteps):
        noise = {}
        for name, label in labels.items():
            with dqar_fx.runtime(model).branch(name) if optimised else nullcontext():
                noise[name] = model(images, timestep=timesteps[step].repeat(len(images)), class_labels=label).sample
        eps = noise["uncond"] + guidance * (noise["cond"] - noise["uncond"])
        images = scheduler.step(eps, timestep, images).prev_sample
    return images.clamp(-1, 1).cpu()


def main(argv: list[str] | None = None) -> None:
    """Sample with each schedule, write the records, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=10, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--guidance", type=float, default=digits.GUIDANCE)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "branches.jsonl")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model, scheduler = digits.load(args.device), digits.make_scheduler()
    classes = [i % 10 for i in range(args.images)]

    def draw() -> tuple[torch.Tensor, list[Any]]:
        images, stats = [], []
        for seed in args.seeds:
            images.append(sample_in_two_calls(model, scheduler, classes, seed, args.steps, args.guidance))
            if model._compiled_call_impl is not None:
                stats.append(dqar_fx.runtime(model).stats)
        return torch.stack(images), stats

    reference, _ = draw()
    rows: list[dict[str, Any]] = []
    for text, gates in cases(args.steps, args.thresholds):
        dqar_fx.optimize(model, Schedule.parse(text), gates=gates, scheduler=scheduler, backend=args.backend)
        images, stats = draw()
        shown = dqar_fx.runtime(model).report().to_dict()["gates"]
        dqar_fx.restore(model)
        error = float((images - reference).square().mean())
        differences = [m.difference for s in stats for m in s.measurements if not math.isnan(m.difference)]
        decisions = sum(len(s.decisions) for s in stats)
        rows.append(
            {
                "case": text, "schedule": text, "gates": shown, "model": "digits", "steps": args.steps,
                "guidance": args.guidance, "images": len(classes) * len(args.seeds),
                "reuse_ratio": sum(s.reused for s in stats) / decisions,
                "shared_ratio": sum(s.shared for s in stats) / decisions,
                "psnr_db": 10 * math.log10(RANGE**2 / error) if error else math.inf,
                "rel_l2_error": common.relative_error(images, reference),
                "median_difference": statistics.median(differences) if differences else None,
            }
        )  # fmt: skip
    common.finish(rows, COLUMNS, device, args.output)


if __name__ == "__main__":
    main()
