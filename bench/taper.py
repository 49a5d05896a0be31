"""Does it pay to compute seldom at first and often at the end? ``Schedule.taper`` against other rules, on two models.

The shipped digits and the shapes of ``bench/shapes.py``, which are trained first (16 minutes) unless ``--work`` has
them. Each row is one schedule: the share of attentions reused, and the PSNR of the images against those that the same
model draws without reuse, from the same noise. ``gain`` is by how many dB that is above intervals with a warm-up of
10 % (below the share of ``every=2``: a longer one) at the same share, interpolated between them; ``gain_cold`` the same
with intervals that have no warm-up, as a taper has none. Either is empty beyond what was measured.

The taper turned round, from 1 to 8, tells whether it matters where the computing steps are.

    OMP_NUM_THREADS=1 python bench/taper.py --work /tmp/shapes        # 20 minutes, of which 16 train
    OMP_NUM_THREADS=1 python bench/taper.py --work /tmp/shapes --calibrate
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import common
import numpy as np
import shapes
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from tabulate import tabulate

import dqar_fx
from dqar_fx import CacheConfig, Plan, Schedule, digits

COLUMNS = ("model", "sampler", "guidance", "schedule", "cache", "reuse_ratio", "psnr_db", "gain_db", "gain_cold_db")
#: Images go from -1 to 1.
RANGE = 2.0
SAMPLERS = (("DDIM 50", 50, 1.0), ("DDIM 50", 50, 2.0), ("DPM-Solver++ 20", 20, 1.5))
GAPS = ((4, 0.5), (6, 0.5), (8, 1), (10, 1), (8, 1.5), (10, 1.5))


def cases(steps: int) -> Iterator[tuple[str, Schedule, str]]:
    """The name of a rule, the schedule and the cache's type."""
    for every in (2, 3, 4, 5):
        yield "interval", Schedule.interval(steps, every=every, warmup=0.1), "int8"
    yield "interval, longer warm-up", Schedule.interval(steps, every=2, warmup=0.4), "int8"
    for every in (2, 3, 4):
        yield "interval, no warm-up", Schedule.interval(steps, every=every, warmup=1), "int8"
    yield "linear", Schedule.linear(steps, warmup=0.2, fraction=1.0), "int8"
    for first, last in GAPS:
        yield "taper", Schedule.taper(steps, first=first, last=last), "int8"
    yield "taper, turned round", Schedule.taper(steps, first=1, last=8), "int8"
    yield "taper, native cache", Schedule.taper(steps), "native"


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """dB, of the mean square over all images; infinite where they are equal."""
    error = float((images.double() - reference.double()).square().mean())
    return 10 * math.log10(RANGE**2 / error) if error else math.inf


def gain(row: dict[str, Any], intervals: list[dict[str, Any]]) -> float | None:
    """dB above the intervals, which are straight lines between their reuse ratios; None beyond the outermost."""
    known = sorted((other["reuse_ratio"], other["psnr_db"]) for other in intervals)
    ratios, decibels = zip(*known, strict=True)
    if not ratios[0] <= row["reuse_ratio"] <= ratios[-1]:
        return None
    return float(row["psnr_db"] - np.interp(row["reuse_ratio"], ratios, decibels))


def measure(name: str, model: Any, sampler: tuple[str, int, float], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per schedule, for one model and sampler."""
    title, steps, guidance = sampler
    kind = DDIMScheduler if title.startswith("DDIM") else DPMSolverMultistepScheduler
    scheduler = kind.from_config(digits.make_scheduler().config)
    source, count = (digits, digits.NUM_CLASSES) if name == "digits" else (shapes, len(shapes.CLASSES))

    def draw(seed: int, of_each: int = args.images) -> torch.Tensor:
        return source.sample(
            model, classes=[*range(count)] * of_each, seed=seed, num_steps=steps, guidance=guidance, scheduler=scheduler
        )

    reference = draw(args.seed)
    todo: list[tuple[str, Schedule | Plan, str]] = list(cases(steps))
    if args.calibrate and title == "DDIM 50":
        plan = dqar_fx.calibrate(
            model, lambda _, seed: draw(seed, 1), budget=args.budget, num_steps=steps, seeds=range(4),
            scheduler=scheduler, backend="eager", progress=False,
        )  # fmt: skip
        todo.append((f"calibrated, {args.budget}", plan, "int8"))
    rows = []
    for dtype, group in itertools.groupby(todo, key=lambda case: case[2]):
        # captured once per cache: the runtime follows one schedule after the other
        dqar_fx.optimize(
            model, Schedule.none(steps), cache=CacheConfig(dtype=dtype), scheduler=scheduler, backend="eager"
        )
        runtime = dqar_fx.runtime(model)
        for rule, schedule, _ in group:
            runtime.follow(schedule)
            with runtime.generation(steps):
                images = draw(args.seed)
            rows.append(
                {
                    "model": name, "sampler": title, "guidance": guidance, "rule": rule,
                    "schedule": rule if isinstance(schedule, Plan) else str(schedule), "cache": dtype,
                    "images": len(images), "reuse_ratio": runtime.stats.reuse_ratio, "psnr_db": psnr(images, reference),
                    "psnr_median_db": statistics.median(map(psnr, images, reference)),
                }
            )  # fmt: skip
            print(f"{title}, guidance {guidance}: {schedule}, {rows[-1]['psnr_db']:.1f} dB", flush=True)
        dqar_fx.restore(model)
    warm = [row for row in rows if row["rule"] in ("interval", "interval, longer warm-up")]
    cold = [row for row in rows if row["rule"] == "interval, no warm-up"]
    return [row | {"gain_db": gain(row, warm), "gain_cold_db": gain(row, cold)} for row in rows]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR over the reuse ratio, one panel per model and sampler."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(12, 3.6 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(SAMPLERS), squeeze=False)
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    for name, line in zip(names, panels, strict=True):
        for (title, _, guidance), axes in zip(SAMPLERS, line, strict=True):
            here = [r for r in rows if (r["model"], r["sampler"], r["guidance"]) == (name, title, guidance)]
            for number, rule in enumerate(rules):
                points = sorted((r["reuse_ratio"], r["psnr_db"]) for r in here if r["rule"] == rule)
                if points:
                    style = "o-" if len(points) > 1 else "sD^vP*X"[number % 7]
                    axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=rule)
            axes.set(title=f"{name}, {title}, guidance {guidance:g}", xlabel="attentions reused", ylabel="PSNR, dB")
            axes.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Train if need be, sample with each schedule, write the record and the picture, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the shapes model is, or is put")
    parser.add_argument("--images", type=int, default=3, help="of each class")
    parser.add_argument("--seed", type=int, default=101)
    parser.add_argument("--models", nargs="+", choices=("digits", "shapes"), default=["digits", "shapes"])
    parser.add_argument(
        "--calibrate", action="store_true", help="measure a calibrated plan too, where there are 50 steps"
    )
    parser.add_argument("--budget", default="reuse=0.6", help="of the calibrated plan")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "taper.json")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        model = digits.load() if name == "digits" else shapes.load(args.work)
        for sampler in SAMPLERS:
            rows += measure(name, model, sampler, args)
    if "shapes" in args.models:
        labels = [i % len(shapes.CLASSES) for i in range(64)]
        images = shapes.sample(
            model, classes=labels, seed=0, num_steps=50, guidance=2.0, scheduler=digits.make_scheduler()
        )
        shapes.picture(images, args.work / "shapes.png", columns=len(shapes.CLASSES))
    cpu = torch.device("cpu")
    record: dict[str, Any] = {
        "machine": common.machine(cpu),
        "torch": torch.__version__,
        "commit": common.commit(),
        "date": str(date.today()),
        "shapes": shapes.recipe(args.work) if "shapes" in args.models else None,
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, args.output.with_suffix(".png"))
    print(tabulate([[row[c] for c in COLUMNS] for row in rows], headers=COLUMNS, floatfmt=".4g"))


if __name__ == "__main__":
    main()
