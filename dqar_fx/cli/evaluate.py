"""``dqar-fx evaluate``: how good the images are that are drawn with reuse, from the same seeds as without it."""

from __future__ import annotations

import argparse
import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dqar_fx.cli.evaluation_runs import Configuration, Task
    from dqar_fx.cli.models import Painter
    from dqar_fx.evaluation.features import Features

HELP = "measure images drawn with reuse against those of the same seeds without it, and against real ones"

# Enough digits for a Fréchet distance of 32 features. Images of a large model take minutes each on a CPU.
IMAGES_DIGITS, BATCH_DIGITS = 500, 50
IMAGES_DIT, BATCH_DIT = 32, 4
ROUNDS = 3  # a median wants three
FORMATS = ("table", "markdown", "csv", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw in which ways, what to measure of it, and where the results go."""
    from dqar_fx.cli.models import add_model_arguments
    from dqar_fx.presets import PRESETS

    add_model_arguments(parser, several=True)
    parser.add_argument(
        "--ablations",
        metavar="NAME,...",
        help=f"DQAR's ablations beside or instead of schedules: 'all', or some of {', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help=f"of each configuration (default: {IMAGES_DIGITS}; {IMAGES_DIT} of a DiT pipeline)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help=f"images drawn at once; each batch has a seed of its own, from --seed on, and intervals are over these "
        f"seeds (default: {BATCH_DIGITS}; {BATCH_DIT} of a DiT pipeline)",
    )
    parser.add_argument(
        "--features",
        choices=("auto", "digits", "inception", "none"),
        default="auto",
        help="of the Fréchet distance: of the small classifier that ships with the digits, or of InceptionV3, which "
        "needs the extra 'evaluate' and its weights (default: what suits the model and is there)",
    )
    parser.add_argument(
        "--real",
        type=Path,
        metavar="FOLDER",
        help="with real images, for the Fréchet distance to them (the digits have theirs)",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="measures the CLIP score against it, {} standing for the class, as in 'a photo of a {}'",
    )
    parser.add_argument("--clip", metavar="MODEL", help="CLIP model on the hub or in a folder (default: ViT-B/16)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        metavar="N",
        help=f"generations to time, of each configuration in turn (default: {ROUNDS})",
    )
    parser.add_argument("--no-timing", action="store_true", help="measure no times: the images are drawn once only")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    parser.add_argument(
        "--format", choices=FORMATS, default="table", help="what is printed; the folder has all (default: table)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("dqar-evaluate"), metavar="FOLDER", help="default: dqar-evaluate"
    )


def run(args: argparse.Namespace) -> int:
    """Draw, measure, print, and write ``evaluate.json``, ``.csv`` and ``.png`` and a grid of each configuration."""
    import torch

    from dqar_fx.cli import evaluation_runs as runs
    from dqar_fx.cli import models
    from dqar_fx.cli.evaluation_output import csv_text, draw_bars, draw_grids, make_notes, make_rows, make_table
    from dqar_fx.cli.measuring import machine, versions
    from dqar_fx.cli.terminal import bar, say

    _check_numbers(args)
    configurations, steps = _configurations(args)
    device = models.pick_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    painter = models.load(args.model, device)
    asked = models.parse_classes(args.classes, painter)
    batch = args.batch or (BATCH_DIGITS if painter.grey else BATCH_DIT)
    images = args.images or (IMAGES_DIGITS if painter.grey else IMAGES_DIT)
    if images % batch:
        raise models.CommandError(f"--images {images} is no multiple of --batch {batch}: every seed draws one batch.")
    if images < 2 and args.features != "none":
        raise models.CommandError(
            f"--images {images}: a Fréchet distance wants at least 2. Give more, or --features none."
        )
    notes: list[str] = []
    task = runs.Task(
        classes=[asked[i % len(asked)] for i in range(batch)],
        seeds=list(range(args.seed, args.seed + images // batch)),
        steps=steps,
        guidance=painter.guidance if args.guidance is None else args.guidance,
        device=device,
        features=_pick_features(args.features, painter, device, notes),
    )
    _add_prompts(task, args, painter)
    real = runs.real_features(task.features, painter, args.real, notes)
    args.output.mkdir(parents=True, exist_ok=True)  # before the minutes that the rest takes

    contenders = runs.prepare(configurations, painter, args.backend)
    rounds = 0 if args.no_timing else args.rounds
    with bar(runs.count_steps(task, contenders, rounds)) as progress:
        runs.measure(task, contenders, progress, notes)
        runs.time_steps(task, contenders, rounds, progress)

    rows = make_rows(task, contenders, real)
    record: dict[str, Any] = {
        "model": args.model,
        "classes": asked,
        "images": images,
        "seeds": task.seeds,
        "batch": batch,
        "steps": steps,
        "guidance": task.guidance,
        "backend": args.backend,
        "prompt": args.prompt,
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(),
        "notes": [*make_notes(task, contenders, real, rows, rounds), *notes],
        "rows": rows,
    }
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    (args.output / "evaluate.json").write_text(text, encoding="utf-8")
    (args.output / "evaluate.csv").write_text(csv_text(rows), encoding="utf-8")
    title = f"{args.model}: {images} images of each, {steps} steps, guidance {task.guidance:g}; bars: 95 % confidence"
    draw_bars(rows, title, args.output / "evaluate.png")
    draw_grids(contenders, rows, asked, painter, args.output)

    if args.format == "json":
        say(text.rstrip())
    elif args.format == "csv":
        say(csv_text(rows).rstrip())
    else:
        where = record["machine"]["device_name"]
        say(
            f"{images} images of each, {len(task.seeds)} seeds, {steps} steps, guidance {task.guidance:g}, on {where}\n"
        )
        say(make_table(rows, "github" if args.format == "markdown" else "simple"))
        say()
        for note in record["notes"]:
            say(f"- {note}")
        say(f"- All numbers, a picture of them and a grid of images of each configuration: {args.output}")
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    from dqar_fx.cli import models

    models.check_numbers(args)
    for name in ("images", "batch", "rounds", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise models.CommandError(f"--{name} {value}: give at least 1.")
    if args.real is not None and not args.real.is_dir():
        raise models.CommandError(f"--real {args.real}: there is no such folder. Give one with PNG or JPEG images.")
    if args.real is not None and args.features == "none":
        raise models.CommandError("--real with --features none: real images are there for the Fréchet distance only.")
    if args.clip is not None and args.prompt is None:
        raise models.CommandError("--clip without --prompt: the CLIP score is of images and a prompt. Give both.")


def _configurations(args: argparse.Namespace) -> tuple[list[Configuration], int]:
    """What is drawn besides the baseline, and in how many steps.

    Raises:
        DqarError: an unknown name, a text that cannot be understood, a plan for another number of steps.
        OSError: a plan cannot be opened.
    """
    import dqar_fx
    from dqar_fx.cli import models
    from dqar_fx.cli.evaluation_runs import Configuration
    from dqar_fx.presets import PRESETS
    from dqar_fx.schedule import Schedule

    names = _names(args.ablations, PRESETS)
    texts = args.schedule or ([] if names else [models.SCHEDULE])
    caches = [dqar_fx.CacheConfig.parse(text) for text in dict.fromkeys(args.cache or ["int8"])]
    given = [models.parse_schedule(text, args.steps) for text in texts]
    # A plan is for one number of steps, and has a say in it; so does a rule that names one.
    plans = [schedule.num_steps for schedule in given if not isinstance(schedule, Schedule)]
    steps = args.steps or next(iter(plans), None) or next((schedule.num_steps for schedule in given), 50)
    found = []
    short = [Path(text).name for text in texts]
    for text in dict.fromkeys(texts):
        schedule = models.parse_schedule(text, steps)
        label = Path(text).name if text.endswith(".json") and short.count(Path(text).name) == 1 else text
        found += [Configuration(f"{label} {cache}", {"schedule": schedule, "cache": cache}) for cache in caches]
    for name in names:
        if name != "baseline":  # that is what is always there: the model that nothing was done to
            found.append(Configuration(name, dqar_fx.preset(name, steps)))
    return found, steps


def _names(text: str | None, known: Sequence[str]) -> list[str]:
    from dqar_fx.cli.models import CommandError

    if text is None:
        return []
    names = list(known) if text == "all" else list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise CommandError(f"--ablations {text}: there is no {name!r}. Give 'all' or some of {', '.join(known)}.")
    return names


def _pick_features(name: str, painter: Painter, device: torch.device, notes: list[str]) -> Features | None:
    """Those asked for; of ``auto``, those that suit the model, and a note where they cannot be had."""
    from dqar_fx.cli.models import CommandError
    from dqar_fx.errors import MetricError
    from dqar_fx.evaluation.features import digits_features, inception_features

    if name == "none":
        return None
    if name == "digits" and not painter.grey:
        raise CommandError(f"--features digits: their classifier knows digits only, and the model is {painter.name}.")
    if name == "digits" or (name == "auto" and painter.grey):
        return digits_features()
    try:
        return inception_features(device)
    except MetricError as error:
        if name == "inception":
            raise
        notes.append(f"No Fréchet distance: {error}")
        return None


def _add_prompts(task: Task, args: argparse.Namespace, painter: Painter) -> None:
    from dqar_fx.evaluation import perceptual

    if args.prompt is None:
        return
    named = "{}" in args.prompt
    task.prompts = [
        args.prompt.replace("{}", painter.class_name(label)) if named else args.prompt for label in task.classes
    ]
    task.clip = perceptual.clip_score(task.device, args.clip or perceptual.CLIP)
