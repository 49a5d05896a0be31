"""``dqar-fx calibrate``: the plan that saves most within a budget, and what else could be had."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dqar_fx.calibration.calibrate import Calibration

HELP = "find the plan that saves most within a budget, by measurement, and show what else could be had"
#: How much of a Pareto table is measured, unless told otherwise.
POINTS = 8
#: Rules to compare with.
RULES = ("linear:warmup=0.2,fraction=1.0", "interval:every=2,warmup=0.2", "interval:every=3,warmup=0.1", "taper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is sampled, what it may cost, and where the results go."""
    from dqar_fx.cli.models import DIGITS

    parser.add_argument(
        "--model", default=DIGITS, metavar="MODEL",
        help=f"{DIGITS!r} (ships with the package; the default), or a diffusers pipeline: a hub id or a folder",
    )  # fmt: skip
    parser.add_argument(
        "--call", metavar="JSON",
        help="arguments of the pipeline's call, as in '{\"prompt\": \"a red panda\", \"guidance_scale\": 4.5}'",
    )  # fmt: skip
    parser.add_argument(
        "--budget", default="psnr=30", metavar="TEXT",
        help="psnr=30 (dB, at least), rel_error=0.05 (at most), speedup=1.3 (in FLOP) or reuse=0.6 (default: psnr=30)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="sampling steps (default: 50)")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="seeds to learn from (default: 8)")
    parser.add_argument("--images", type=int, default=10, metavar="N", help="digits per seed (default: 10)")
    parser.add_argument("--guidance", type=float, metavar="W", help="of the digits; 1 is without (default: 1.5)")
    parser.add_argument("--cache", default="int8", metavar="TEXT", help="how values are stored (default: int8)")
    parser.add_argument(
        "--rules", action="store_true", help="choose among rules (taper, interval, ...) only; 2 seeds will do"
    )
    parser.add_argument("--max-age", type=int, default=12, metavar="N", help="oldest value that is read (default: 12)")
    parser.add_argument(
        "--points", type=int, default=POINTS, metavar="N", help=f"plans in the Pareto table (default: {POINTS})"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor", help="of the real runs")
    parser.add_argument(
        "--output", type=Path, default=Path("dqar-calibration"), metavar="FOLDER",
        help="for plan.json, plan.png, pareto.png and calibration.json; an interrupted run goes on from what is there "
        "(default: dqar-calibration)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Calibrate, measure the Pareto table, choose, and write everything down.

    Raises:
        DqarError: an argument has no meaning, or nothing keeps to the budget.
    """
    from tabulate import tabulate

    from dqar_fx.calibration.budget import Budget
    from dqar_fx.calibration.calibrate import Calibration
    from dqar_fx.calibration.records import write
    from dqar_fx.cli.models import CommandError
    from dqar_fx.cli.terminal import say
    from dqar_fx.config import CacheConfig

    budget = Budget.parse(args.budget)  # refused before the minutes that the rest takes
    for name in ("steps", "seeds", "images"):
        if (value := getattr(args, name)) < 2 - (name == "images"):
            raise CommandError(f"--{name} {value}: give at least {2 - (name == 'images')}.")
    model, sample, scheduler = _load(args)
    with Calibration(
        model, sample, num_steps=args.steps, seeds=range(args.seeds), cache=CacheConfig.parse(args.cache),
        scheduler=scheduler, max_age=args.max_age, rules_only=args.rules,
        backend=args.backend, folder=args.output / "sweeps",
    ) as calibration:  # fmt: skip
        rows = pareto(calibration, args.points)
        say(tabulate([_cells(row) for row in rows], headers=_HEADERS, disable_numparse=True, stralign="right"))
        say()
        plan = calibration.choose(budget)
    record = dict(plan.calibration or {})
    args.output.mkdir(parents=True, exist_ok=True)
    plan.save(args.output / "plan.json")
    plan.plot(args.output / "plan.png")
    document = {"chosen": {"reuse_ratio": plan.reuse_ratio, **record}, "pareto": rows}
    text = json.dumps(document, indent=2) + "\n"
    write(args.output / "calibration.json", lambda file: file.write_text(text, encoding="utf-8"))
    draw(rows, record, plan.reuse_ratio, args.output / "pareto.png")
    verified = record["verified"]
    say(str(plan))
    say(
        f"budget {budget}: {plan.reuse_ratio:.1%} reused, {record['speedup_in_flop']:.2f}x in FLOP; on "
        f"{verified['seeds']} unseen seeds {verified['psnr']:.1f} +- {verified['psnr_error']:.1f} dB, relative error "
        f"{verified['rel_error']:.4f}"
    )
    say(f"{args.output / 'plan.json'}: dqar_fx.optimize(model, dqar_fx.Plan.load(...), scheduler=pipe.scheduler)")
    return 0


def pareto(calibration: Calibration, points: int) -> list[dict[str, Any]]:
    """Plans from little to much reused, and rules to compare with, measured on the first four seeds."""
    from dqar_fx.plan import Plan
    from dqar_fx.schedule import Schedule

    seeds = calibration.seeds[:4]
    found = calibration.candidates()["all"]
    chosen = [found[round(i * (len(found) - 1) / max(points - 1, 1))] for i in range(points)] if points > 0 else []
    rows = []
    for candidate in dict.fromkeys(chosen):
        loss = calibration.measure(candidate, seeds)
        rows.append(_row(calibration, "calibrated", candidate.reuse, loss, calibration.first_order_psnr(candidate)))
    for text in RULES:
        rule = Schedule.parse(text).with_steps(calibration.num_steps)
        plan = rule.plan(len(calibration.sites))
        loss = calibration.measure_plan(Plan(plan.reuse), seeds)
        rows.append(_row(calibration, text, plan.reuse, loss, None))
    return sorted(rows, key=lambda row: float(row["reuse_ratio"]))


def _row(calibration: Calibration, name: str, reuse: Any, loss: Any, expected: float | None) -> dict[str, Any]:
    return {
        "plan": name,
        "reuse_ratio": float(reuse.mean()),
        "speedup_in_flop": calibration.bound(reuse),
        "first_order_psnr": expected,
        **loss.to_dict(),
    }


_HEADERS = ("plan", "reused", "speed-up in FLOP", "PSNR dB", "first order", "relative error")


def _cells(row: Mapping[str, Any]) -> list[str]:
    expected = row["first_order_psnr"]
    return [
        row["plan"],
        f"{row['reuse_ratio']:.0%}",
        f"{row['speedup_in_flop']:.2f}x",
        f"{row['psnr']:.1f} +- {row['psnr_error']:.1f}",
        "" if expected is None else f"{expected:.1f}",
        f"{row['rel_error']:.4f}",
    ]


def _load(args: argparse.Namespace) -> tuple[Any, Callable[[nn.Module, int], Tensor] | dict[str, Any], Any]:
    """The model or pipeline, how it samples, and its scheduler."""
    from dqar_fx.cli.models import DIGITS, CommandError, pick_device

    device = pick_device(args.device)
    if args.model == DIGITS:
        from dqar_fx import digits

        scheduler = digits.make_scheduler()
        guidance = digits.GUIDANCE if args.guidance is None else args.guidance
        classes = [i % digits.NUM_CLASSES for i in range(args.images)]

        def sample(model: nn.Module, seed: int) -> Tensor:
            return digits.sample(
                model, classes=classes, seed=seed, num_steps=args.steps, guidance=guidance, scheduler=scheduler
            )

        return digits.load(device), sample, scheduler
    import torch
    from diffusers import DiffusionPipeline

    from dqar_fx.cli.models import IMAGENET_CLASSES, load_pipeline

    try:
        call = json.loads(args.call) if args.call else {}
    except ValueError as error:
        raise CommandError(f"--call {args.call}: not JSON ({error}).") from error
    if not isinstance(call, dict):
        raise CommandError(f"--call {args.call}: give the arguments as an object, {{...}}.")
    # Gradients overflow in float16.
    pipe = load_pipeline(args.model, device, DiffusionPipeline, torch.bfloat16)
    if type(pipe).__name__ == "DiTPipeline":
        call.setdefault("class_labels", list(IMAGENET_CLASSES))
    return pipe, call, pipe.scheduler


def draw(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], reuse_ratio: float, path: Path) -> None:
    """PSNR over the share that is reused: calibrated plans as a line, rules and the chosen plan as points."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout=ConstrainedLayoutEngine())
    axes = figure.add_subplot()
    line = [row for row in rows if row["plan"] == "calibrated"]
    x = [100 * row["reuse_ratio"] for row in line]
    axes.plot(x, [row["psnr"] for row in line], "o-", color="#0072B2", label="calibrated, measured")
    axes.plot(x, [row["first_order_psnr"] for row in line], ":", color="#0072B2", label="calibrated, first order")
    for marker, row in zip("sD^v", (row for row in rows if row["plan"] != "calibrated"), strict=False):
        axes.plot(100 * row["reuse_ratio"], row["psnr"], marker, color="#D55E00", label=row["plan"])
    axes.plot(
        100 * reuse_ratio, chosen["verified"]["psnr"], "*", color="#000000", markersize=13,
        label=f"chosen for {chosen['budget']}, unseen seeds",
    )  # fmt: skip
    axes.set(xlabel="attentions reused, %", ylabel="PSNR against the samples without reuse, dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
