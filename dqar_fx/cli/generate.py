"""``dqar-fx generate``: draw images with reuse."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "draw images with attention reuse and save them as one PNG"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw, and where to."""
    from dqar_fx.cli.models import add_model_arguments

    add_model_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("dqar.png"), metavar="FILE", help="default: dqar.png")
    parser.add_argument("--report", action="store_true", help="print what was captured, compiled, computed and reused")


def run(args: argparse.Namespace) -> int:
    """Draw and save."""
    import dqar_fx
    from dqar_fx.cli import models, pictures, terminal

    models.check_numbers(args)
    if args.output.suffix.lower() != ".png":
        raise models.CommandError(f"--output {args.output}: the picture is a PNG, so give a name that ends in .png.")
    schedule, cache = models.parse_schedule(args.schedule, args.steps), dqar_fx.CacheConfig.parse(args.cache)
    painter = models.load(args.model, models.pick_device(args.device))
    classes = models.parse_classes(args.classes, painter)
    guidance = painter.guidance if args.guidance is None else args.guidance
    dqar_fx.optimize(painter.denoiser, schedule, cache=cache, scheduler=painter.scheduler, backend=args.backend)
    with terminal.bar(schedule.num_steps) as bar:
        bar.tell("sampling (and compiling, on the way)")
        images = painter.draw(
            classes, seed=args.seed, num_steps=schedule.num_steps, guidance=guidance, on_step=bar.advance
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_grid(images, args.output, grey=painter.grey)
    runtime = dqar_fx.runtime(painter.denoiser)
    terminal.say(f"{args.output}: {len(images)} images, {runtime.stats.reuse_ratio:.1%} of the attentions reused")
    if args.report:
        terminal.say(str(runtime.report()))
    return 0
