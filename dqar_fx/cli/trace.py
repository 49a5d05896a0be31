"""``dqar-fx trace``: measure what single reuses do to a model's samples, for ``dqar-fx train-policy`` to learn from."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "measure what single reuses do to a model's samples, for train-policy to learn from"
#: Every candidate that gates could ever be asked about: all steps but those whose features are not known yet.
SCHEDULE = "always:warmup=2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw, which reads are candidates, and where to write."""
    from dqar_fx.cli.models import add_model_arguments

    add_model_arguments(parser, schedule=SCHEDULE, seeds="0,1,2,3")
    parser.add_argument(
        "--runs",
        type=int,
        default=100,
        metavar="N",
        help="candidates of each seed, chosen at random, whose harm to the final sample is measured; each costs a "
        "generation (default: 100)",
    )
    parser.add_argument(
        "--max-age",
        type=int,
        default=1,
        metavar="K",
        help="measure values of up to K steps too; each costs N more generations (default: 1)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("traces.jsonl"),
        metavar="FILE",
        help="appended to: with the same settings, it goes on where it stopped (default: traces.jsonl)",
    )


def run(args: argparse.Namespace) -> int:
    """Trace every seed."""
    import numpy as np
    from torch import Tensor

    import dqar_fx
    from dqar_fx import traces
    from dqar_fx.cli import models, terminal

    models.check_numbers(args)
    if args.runs < 0:
        raise models.CommandError(f"--runs {args.runs}: give at least 0 (0 measures no final error).")
    seeds = models.parse_seeds(args.seeds)
    schedule, cache = models.parse_schedule(args.schedule, args.steps), dqar_fx.CacheConfig.parse(args.cache)
    painter = models.load(args.model, models.pick_device(args.device))
    classes = models.parse_classes(args.classes, painter)
    guidance = painter.guidance if args.guidance is None else args.guidance
    settings = {
        "model": args.model, "classes": classes, "guidance": guidance, "schedule": str(schedule), "cache": str(cache),
        "num_steps": schedule.num_steps, "max_age": args.max_age,
    }  # fmt: skip
    file = traces.TraceFile(args.output, settings)

    def draw(seed: int) -> Tensor:
        return painter.draw(
            classes, seed=seed, num_steps=schedule.num_steps, guidance=guidance, on_step=progress.advance
        )

    tracer = traces.Tracer(
        painter.denoiser, draw, schedule,
        scheduler=painter.scheduler, cache=cache, max_age=args.max_age, backend=args.backend,
    )  # fmt: skip
    generations = len(seeds) * (1 + args.runs * args.max_age)
    with terminal.bar(generations * schedule.num_steps) as progress, tracer:
        for number, seed in enumerate(seeds, 1):
            progress.tell(f"seed {seed} ({number} of {len(seeds)})")
            found, reference = tracer.candidates(seed)
            file.append(trace for trace in found if (seed, trace.step, trace.site, 1) not in file.known)
            for index in np.random.default_rng(seed).permutation(len(found))[: args.runs]:
                known = file.known[seed, found[index].step, found[index].site, 1]
                if known.final_error != known.final_error:  # NaN: not measured by a run before this one
                    file.append(tracer.measure(found[index], reference))
    measured = sum(trace.final_error == trace.final_error for trace in file.known.values())
    terminal.say(f"{args.output}: {len(file.known)} candidates, of {measured} the harm to the final sample")
    return 0
