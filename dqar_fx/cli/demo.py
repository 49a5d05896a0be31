"""``dqar-fx demo``: the same images drawn three ways, side by side: eager, ``torch.compile``, and with reuse."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from dqar_fx.cli.measuring import step_seconds

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dqar_fx.cli.models import Painter
    from dqar_fx.cli.terminal import Bar
    from dqar_fx.runtime.runtime import Runtime

HELP = "draw digits eagerly, with torch.compile and with reuse, and compare speed and images (no download)"

EAGER, COMPILED, REUSING = "eager", "torch.compile", "dqar_fx"
# Images of each class. Enough digits that arithmetic, not the host, takes the time; a DiT image is enough by itself.
PER_CLASS_DIGITS, PER_CLASS_DIT = 5, 1
ROUNDS = 3  # a median wants three
# On a slow or busy machine no further round begins after so many seconds, so that the demo ends within minutes.
TIMING_BUDGET = 75.0
# What two runs of the same program differ by on a machine with nothing else to do: less is no gain.
NOISE = 0.03
# A load average by so much above the demo's own threads means that somebody else was at work.
OTHERS = 1.5
# Below it a difference of two images is plain to see.
VISIBLE_PSNR = 25.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw and how often, and where the results go."""
    from dqar_fx.cli.models import add_model_arguments

    add_model_arguments(parser)
    parser.add_argument(
        "--per-class",
        type=int,
        metavar="N",
        help=f"images of each class, all in one batch (default: {PER_CLASS_DIGITS}; {PER_CLASS_DIT} of a DiT pipeline)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        metavar="N",
        help=f"generations to time, of each contender in turn (default: {ROUNDS}; fewer where they take long)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: torch's own choice; give fewer on a machine that others use too)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("dqar-demo"), metavar="FOLDER", help="for the results (default: dqar-demo)"
    )


@dataclass
class Contender:
    """One way to draw, and what was measured of it.

    Attributes:
        first: seconds of the first generation, which compiles.
        rounds: for each timed generation, the seconds of its steps.
        images: of the first generation; every later one draws the same.
    """

    name: str
    painter: Painter
    first: float = 0.0
    rounds: list[list[float]] = field(default_factory=list)
    images: Tensor | None = None

    @property
    def step_seconds(self) -> float:
        """See ``measuring.step_seconds``."""
        return step_seconds(self.rounds)

    @property
    def compile_seconds(self) -> float:
        """What the first generation took longer than a later one; nothing was compiled on the disk."""
        return max(0.0, self.first - self.step_seconds * len(self.rounds[0]))


def run(args: argparse.Namespace) -> int:
    """Draw, time, compare; print the table and write ``images.png``, ``plan.png`` and ``demo.json``."""
    import torch

    import dqar_fx
    from dqar_fx.cli import models
    from dqar_fx.cli.measuring import machine, timed_draw, versions
    from dqar_fx.cli.terminal import bar, say

    models.check_numbers(args)
    for name in ("rounds", "per_class", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise models.CommandError(f"--{name.replace('_', '-')} {value}: give at least 1.")
    schedule, cache = models.parse_schedule(args.schedule, args.steps), dqar_fx.CacheConfig.parse(args.cache)
    device = models.pick_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)  # before the minutes that the rest takes

    painter = models.load(args.model, device)
    asked = models.parse_classes(args.classes, painter)
    per_class = args.per_class or (PER_CLASS_DIGITS if painter.grey else PER_CLASS_DIT)
    classes = [label for label in asked for _ in range(per_class)]
    guidance = painter.guidance if args.guidance is None else args.guidance
    steps = schedule.num_steps

    contenders = [Contender(EAGER, painter), *(Contender(name, painter.twin()) for name in (COMPILED, REUSING))]
    contenders[1].painter.denoiser.compile(backend=args.backend)
    reusing = contenders[2].painter
    dqar_fx.optimize(reusing.denoiser, schedule, cache=cache, scheduler=reusing.scheduler, backend=args.backend)

    def draw(contender: Contender, on_step: Callable[[], None]) -> tuple[Tensor, list[float]]:
        return timed_draw(
            contender.painter, classes, device, seed=args.seed, num_steps=steps, guidance=guidance, on_step=on_step
        )

    # Neither contender may find on the disk what an earlier run has compiled: it would look quick to compile.
    steps_in_all = steps * len(contenders) * (1 + args.rounds)
    with bar(steps_in_all) as progress, _empty_compile_cache(args.backend, device, progress):
        _measure(contenders, draw, progress, args.rounds)

    runtime = dqar_fx.runtime(reusing.denoiser)
    rows = _compare(contenders, runtime, classes if painter.grey else None)
    bound = flop_bound(runtime)
    record: dict[str, Any] = {
        "model": args.model,
        "classes": asked,
        "images": len(classes),
        "steps": steps,
        "seed": args.seed,
        "guidance": guidance,
        "schedule": str(schedule if isinstance(schedule, dqar_fx.Schedule) else schedule.schedule or args.schedule),
        "cache": str(cache),
        "backend": args.backend,
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(),
        "contenders": rows,
        "speedup_by_flop": bound,
        "report": runtime.report().to_dict(),
    }
    pictures = _draw_pictures(args.output, contenders, runtime, asked, rows, painter)
    path = args.output / "demo.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    say(f"{len(classes)} images, {steps} steps, guidance {guidance:g}, on {record['machine']['device_name']}")
    say(f"schedule {record['schedule']}, cache {cache}\n")
    say(_table(rows))
    say()
    for line in _verdict(record, runtime):
        say(line)
    say(
        f"Look at {pictures[0]} (the images of torch.compile above those with reuse: they should look the same) and "
        f"{pictures[1]} (which attention reused when). All numbers: {path}."
    )
    return 0


def flop_bound(runtime: Runtime) -> float | None:
    """How much faster the plan makes a generation if time goes by FLOP; None if there is nothing to count.

    A guide rather than a limit: what reuse saves besides matrix products (softmax, copies) can bring a little more.
    """
    from dqar_fx.graph.flops import Work, speedup_bound

    graphs, plan = runtime.graphs, runtime.plan
    if plan is None:
        return None
    work = Work([graph.captured for graph in graphs], [graph.regions for graph in graphs], runtime.cache)
    if not work.total:
        return None
    return speedup_bound(work.total, [work.total - work.of(row.tolist()) for row in plan.reuse])


def _measure(
    contenders: list[Contender],
    draw: Callable[[Contender, Callable[[], None]], tuple[Tensor, list[float]]],
    progress: Bar,
    rounds: int,
) -> None:
    """A first generation of each, then the timed ones, in turn: what the machine does besides then hits all alike."""
    for contender in contenders:
        progress.tell(f"{contender.name}: {'warming up' if contender.name == EAGER else 'compiling'}")
        started = time.perf_counter()
        contender.images, _ = draw(contender, progress.advance)
        contender.first = time.perf_counter() - started
    started = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - started > TIMING_BUDGET:
            break
        for contender in contenders:
            progress.tell(f"{contender.name}: round {number + 1} of {rounds}")
            contender.rounds.append(draw(contender, progress.advance)[1])


@contextlib.contextmanager
def _empty_compile_cache(backend: str, device: torch.device, progress: Bar) -> Iterator[None]:
    """Inside, Inductor starts with an empty cache on the disk, but is up: workers, precompiled headers, CPU features.

    Otherwise whoever compiles first would pay for that.
    """
    import torch

    if backend != "inductor":
        yield
        return
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        progress.tell("starting the compiler")
        torch.compile(torch.sin)(torch.ones(64, device=device))
        yield


def _compare(contenders: list[Contender], runtime: Runtime, classes: list[int] | None) -> list[dict[str, Any]]:
    """One record for each contender, against the second; ``classes`` of digits, if they are digits."""
    from dqar_fx import digits

    baseline = contenders[1]
    rows = []
    for contender in contenders:
        assert contender.images is not None
        assert baseline.images is not None
        reuses = contender.name == REUSING
        each = (contender.images - baseline.images).square().flatten(1).mean(1)  # mean squared error per image
        rows.append(
            {
                "name": contender.name,
                "ms_per_step": 1e3 * contender.step_seconds,
                "speedup": baseline.step_seconds / contender.step_seconds,
                "speedup_of_each_round": [
                    sum(theirs) / sum(own) for theirs, own in zip(baseline.rounds, contender.rounds, strict=True)
                ],
                "reuse_ratio": runtime.stats.reuse_ratio if reuses else 0.0,
                "cache_kib": runtime.stats.cache_bytes / 1024 if reuses else 0.0,
                # Null where the images are identical: JSON has no infinity.
                "psnr_db": _psnr(float(each.mean())),
                "worst_image_psnr_db": _psnr(float(each.max())),
                "identical_images": float(each.max()) == 0,
                "agreement": None if classes is None else digits.agreement(contender.images * 2 - 1, classes),
                "compile_seconds": None if contender.name == EAGER else contender.compile_seconds,
                "seconds_of_each_round": [sum(times) for times in contender.rounds],
            }
        )
    return rows


def _psnr(squared_error: float) -> float | None:
    """Peak signal to noise ratio in dB of images in [0, 1]; None where they are identical."""
    return None if squared_error == 0 else -10 * math.log10(squared_error)


def _table(rows: list[dict[str, Any]]) -> str:
    headers = ["", "ms/step", "speed-up", "reused", "cache KiB", "PSNR dB", "classes right", "cold compile s"]
    lines = []
    for row in rows:
        psnr, agreement, compiling = row["psnr_db"], row["agreement"], row["compile_seconds"]
        lines.append(
            [
                row["name"],
                f"{row['ms_per_step']:.1f}",
                f"{row['speedup']:.2f}x",
                f"{row['reuse_ratio']:.1%}",
                f"{row['cache_kib']:.0f}",
                "reference" if row["name"] == COMPILED else "identical" if psnr is None else f"{psnr:.1f}",
                "" if agreement is None else f"{agreement:.1%}",
                "" if compiling is None else f"{compiling:.1f}",
            ]
        )
    if all(row["agreement"] is None for row in rows):
        headers.remove("classes right")
        lines = [line[:6] + line[7:] for line in lines]
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))


def _verdict(record: dict[str, Any], runtime: Runtime) -> list[str]:
    """What the numbers mean, also where they are bad."""
    row, bound = record["contenders"][2], record["speedup_by_flop"]
    speedup, rounds = row["speedup"], row["speedup_of_each_round"]
    spread = f" (single rounds: {min(rounds):.2f} to {max(rounds):.2f}x)" if len(rounds) > 1 else ""
    lines = [f"With reuse: {speedup:.2f}x the speed of torch.compile{spread}."]
    if bound is not None:
        lines.append(
            f"By FLOP (matrix products only), one would expect up to {bound:.2f}x of this schedule on this model."
        )
    if row["reuse_ratio"] == 0:
        lines.append("Nothing was reused: the schedule computes at every step. Try more --steps or another --schedule.")
    elif speedup < 1 + NOISE:
        why = ["a busy machine", "a batch so small that the host takes the time"]
        if record["backend"] == "eager":
            why.insert(0, "--backend eager, which fuses nothing")
        if bound is not None and bound < 1.1:
            why.insert(0, "attention is too small a part of this model, or the schedule reuses too little")
        lines.append(f"That is no gain. Likely reasons: {'; '.join(why)}.")
    load, threads = record["machine"]["load_average"], record["machine"]["threads"]
    if load is not None and load[0] > threads + OTHERS:
        lines.append(
            f"The machine was busy (load {load[0]:.1f}, this demo about {threads}): try again when it is idle, "
            f"or with --threads 1."
        )
    if row["psnr_db"] is not None and row["psnr_db"] < VISIBLE_PSNR:
        lines.append(
            "The images are visibly others: compute more often (a smaller every=, a longer warmup=, more --steps)."
        )
    data = runtime.report().to_dict()
    if data["left_computing"] or data["graph_breaks"]:
        lines.append(
            f"{len(data['left_computing'])} attentions were left computing, "
            f"{len(data['graph_breaks'])} graph breaks were met: see the report in demo.json."
        )
    return lines


def _draw_pictures(
    folder: Path,
    contenders: list[Contender],
    runtime: Runtime,
    asked: list[int],
    rows: list[dict[str, Any]],
    painter: Painter,
) -> tuple[Path, Path]:
    """``images.png`` shows, of each class, the image that reuse has changed most."""
    import torch

    from dqar_fx.cli.pictures import save_comparison

    baseline, reusing = contenders[1].images, contenders[2].images
    assert baseline is not None
    assert reusing is not None
    per_class = len(baseline) // len(asked)
    errors = (reusing - baseline).square().flatten(1).mean(1).view(len(asked), per_class)
    shown = torch.arange(len(asked)) * per_class + errors.argmax(1)
    row = rows[2]
    psnr = "identical images" if row["psnr_db"] is None else f"PSNR {row['psnr_db']:.1f} dB"
    which = f"of each class, the one of {per_class} that changed most" if per_class > 1 else "each class once"
    images = folder / "images.png"
    save_comparison(
        baseline[shown],
        reusing[shown],
        images,
        labels=(
            f"torch.compile\n{rows[1]['ms_per_step']:.1f} ms per step",
            f"dqar_fx\n{row['ms_per_step']:.1f} ms per step\n{row['reuse_ratio']:.0%} reused",
        ),
        columns=[f"{'' if painter.grey else 'class '}{label}" for label in asked],
        title="What attention reuse changes in the images",
        subtitle=f"Shown: {which}. All {len(baseline)} images: {psnr}, {row['speedup']:.2f}x the speed.",
        grey=painter.grey,
    )
    plan = folder / "plan.png"
    assert runtime.plan is not None
    runtime.plan.plot(plan)
    return images, plan
