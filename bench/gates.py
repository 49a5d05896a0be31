"""What gates do to the trade of reuse against error, on the shipped digits model.

Each row is one schedule with its gates: the share of attentions reused, and the PSNR of the images against those that
the same model draws without reuse, from the same noise. Errors only, so nothing is compiled by default.

    python bench/gates.py                          # a minute on two cores
    python bench/gates.py --images 50 --seeds 0 1 2 3
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch

import dqar_fx
from dqar_fx import ChangeGate, EntropyGate, Gates, Schedule, digits

COLUMNS = ("schedule", "gates", "reuse_ratio", "psnr_db", "rel_l2_error", "blocked")
#: Images go from -1 to 1.
RANGE = 2.0


def cases(steps: int) -> Iterator[tuple[str, Gates | None]]:
    """Schedules, and the gates behind them."""
    for every, warmup in ((3, 0.1), (2, 0.1), (2, 0.4)):
        yield f"interval:steps={steps},every={every},warmup={warmup}", None
    for limit in (0.06, 0.1, 0.15):
        yield f"interval:steps={steps},every=2,warmup=2", Gates(entropy=None, snr=None, change=ChangeGate(limit))
    for limit in (0.1, 0.15):
        gates = Gates(entropy=None, snr=None, change=ChangeGate(limit), max_reuse=1)
        yield f"always:steps={steps},warmup=2", gates
    for limit, reads in ((1.5, 4), (2.3, 4), (2.3, 1), (2.6, 2)):
        yield f"always:steps={steps},warmup=2", Gates(entropy=EntropyGate(limit), snr=None, max_reuse=reads)


def main(argv: list[str] | None = None) -> None:
    """Sample with each schedule, write the records, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=10, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "gates.jsonl")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    model, scheduler = digits.load(args.device), digits.make_scheduler()
    classes = [i % 10 for i in range(args.images)]

    def draw() -> tuple[torch.Tensor, list[float]]:
        images, ratios = [], []
        for seed in args.seeds:
            sampled = digits.sample(model, classes=classes, seed=seed, num_steps=args.steps, scheduler=scheduler)
            images.append(sampled.cpu())
            if model._compiled_call_impl is not None:
                ratios.append(dqar_fx.runtime(model).stats.reuse_ratio)
        return torch.stack(images), ratios

    reference, _ = draw()
    rows: list[dict[str, Any]] = []
    for text, gates in cases(args.steps):
        dqar_fx.optimize(model, Schedule.parse(text), gates=gates, scheduler=scheduler, backend=args.backend)
        images, ratios = draw()
        report = dqar_fx.runtime(model).report().to_dict()
        dqar_fx.restore(model)
        error = float((images - reference).square().mean())
        rows.append(
            {
                "case": text, "schedule": text, "gates": report["gates"], "model": "digits", "steps": args.steps,
                "images": len(classes) * len(args.seeds), "reuse_ratio": sum(ratios) / len(ratios),
                "psnr_db": 10 * math.log10(RANGE**2 / error) if error else math.inf,
                "rel_l2_error": common.relative_error(images, reference),
                "blocked": ", ".join(f"{reason} {count}" for reason, count in report["blocked"].items()),
            }
        )  # fmt: skip
    common.finish(rows, COLUMNS, device, args.output)


if __name__ == "__main__":
    main()
