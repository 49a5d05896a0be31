"""``dqar-fx sweep --model MODEL``: many schedules, caches and gates on the same seeds, one line of JSON for each.

A line is written as soon as it is measured. A sweep that was interrupted goes on where it stopped, and several
processes can share a folder: each claims a configuration before it draws.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqar_fx.cli.sweep_rows import IMAGES, PAIRS, file_name, image_file

if TYPE_CHECKING:
    from torch import Tensor

    from dqar_fx.cli.evaluation_runs import Configuration, Real, Task
    from dqar_fx.cli.models import Painter
    from dqar_fx.cli.terminal import Bar
    from dqar_fx.config import CacheConfig
    from dqar_fx.gates import Gates
    from dqar_fx.runtime.runtime import Runtime
    from dqar_fx.schedule import Schedule

RECORDS, SETTINGS, ATTENTION = "sweep.jsonl", "sweep.json", "attention.json"
#: What is swept over unless told otherwise: DQAR's own table (warm-up by fraction), the same refreshed, and our rules;
SCHEDULES = (
    "linear:warmup={0.1,0.2,0.3,0.4,0.5,0.6},fraction={0.33,0.5,0.66,0.75,1.0}",
    "linear:warmup={0.2,0.4},fraction=1.0,refresh={2,3,5}",
    "linear_reverse:warmup=0.2,fraction={0.33,0.66}",
    "interval:every={2,3,4,6},warmup={0.1,0.4}",
    "taper:first={4.0,6.0,8.0,10.0},last={0.5,1.0,1.5}",
)
#: ... ways to store values, with three of these;
STORED = ("interval:every=3,warmup=0.1", "taper:first=8.0,last=1.0", "linear:warmup=0.2,fraction=1.0")
CACHES = ("native", "int8:{channel,head,tensor}", "int4", "kv:int8")
#: ... and gates, which alone decide.
GATED = ("always:warmup=2",)
GATES = ("change={0.05,0.1,0.2}", "entropy={2.0,2.3},max_reuse={1,4}")
#: Images of each that are kept for the picture.
KEPT = 10
DRAWN, BATCH = 100, 20
#: A claim that old was left by a process that died.
STALE_CLAIM = 3600.0
_BRACES = re.compile(r"\{([^{}]*)\}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to sweep over; lists in braces stand for all their values."""
    parser.add_argument("--model", metavar="MODEL", help="'digits', or a DiT pipeline: a hub id or a folder")
    parser.add_argument(
        "--schedule", action="append", metavar="TEXT",
        help="as text, with {a,b,...} for several values, as in 'interval:every={2,3},warmup=0.1'; repeatable "
        "(default: DQAR's table of warm-up by fraction, refreshed ones, intervals and tapers; without any of these "
        "three options some caches and gates as well)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", action="append", metavar="TEXT", help="int8, native, int8:{token,channel}, ...; repeatable"
    )
    parser.add_argument(
        "--gates", action="append", metavar="TEXT",
        help="none, or some of entropy=, change=, snr=, max_age=, max_reuse= with commas, as in "
        "'change={0.1,0.2},max_reuse=4'; repeatable (default: none)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="sampling steps (default: 50)")
    parser.add_argument("--guidance", type=float, metavar="W", help="scale of classifier-free guidance")
    parser.add_argument("--images", type=int, default=DRAWN, metavar="N", help=f"of each (default: {DRAWN})")
    parser.add_argument("--batch", type=int, default=BATCH, metavar="N", help=f"images of a seed (default: {BATCH})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")


def expand(text: str) -> list[str]:
    """``"a={1,2},b={3,4}"`` -> the four texts that it stands for, in order; each once."""
    parts = _BRACES.split(text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return list(dict.fromkeys("".join(chosen) for chosen in itertools.product(*choices)))


def parse_gates(text: str) -> Gates | None:
    """``"none"``, or ``"entropy=2,change=0.1,snr=0.1,max_age=6,max_reuse=4"``, any of these.

    Raises:
        DqarError: an unknown name, or a value without a meaning.
    """
    from dqar_fx.cli.models import CommandError
    from dqar_fx.gates import ChangeGate, EntropyGate, Gates, SnrGate

    if text == "none":
        return None
    found: dict[str, Any] = {"entropy": None, "snr": None}
    for item in text.split(","):
        name, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError as error:
            raise CommandError(f"--gates {text}: {item!r} is not NAME=NUMBER.") from error
        if name in ("max_age", "max_reuse"):
            found[name] = int(number)
        elif name in ("entropy", "change", "snr"):
            found[name] = {"entropy": EntropyGate, "change": ChangeGate, "snr": SnrGate}[name](number)
        else:
            raise CommandError(f"--gates {text}: there is no {name!r}. Use entropy, change, snr, max_age, max_reuse.")
    return Gates(**found)


@dataclass(frozen=True)
class Point:
    """One configuration of the sweep."""

    schedule: Schedule
    cache: CacheConfig
    gates: Gates | None
    gates_text: str

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return f"{self.schedule} | {self.cache} | {self.gates_text}"


def points(args: argparse.Namespace) -> list[Point]:
    """All configurations that were asked for, those first that can share a captured model.

    Raises:
        DqarError: a text that cannot be understood.
    """
    from dqar_fx.config import CacheConfig
    from dqar_fx.schedule import Schedule

    def texts(given: Sequence[str]) -> list[str]:
        return [text for each in given for text in expand(each)]

    grids = [(args.schedule or SCHEDULES, args.cache or ["int8"], args.gates or ["none"])]
    if not (args.schedule or args.cache or args.gates):
        grids += [(STORED, CACHES, ["none"]), (GATED, ["int8"], GATES)]
    found = [
        Point(Schedule.parse(schedule).with_steps(args.steps), CacheConfig.parse(cache), parse_gates(gates), gates)
        for all_schedules, all_caches, all_gates in grids
        for gates in texts(all_gates)
        for cache in texts(all_caches)
        for schedule in texts(all_schedules)
    ]
    return list({point.key: point for point in found}.values())


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, and write table, pictures and report of all there is.

    Raises:
        DqarError: an argument has no meaning, or the folder holds a sweep with other settings.
    """
    from dqar_fx.cli import evaluation_runs as runs
    from dqar_fx.cli import models, sweep_report
    from dqar_fx.cli.measuring import machine, versions
    from dqar_fx.cli.terminal import bar, say
    from dqar_fx.evaluation.features import digits_features

    wanted = points(args)
    if args.images % args.batch or args.batch < 1 or args.images // args.batch < 2:
        raise models.CommandError(
            f"--images {args.images} --batch {args.batch}: give a multiple of the batch, at least twice."
        )
    device = models.pick_device(args.device)
    painter = models.load(args.model, device)
    asked = list(painter.classes)
    task = runs.Task(
        classes=[asked[i % len(asked)] for i in range(args.batch)],
        seeds=list(range(args.images // args.batch)),
        steps=args.steps,
        guidance=painter.guidance if args.guidance is None else args.guidance,
        device=device,
        features=digits_features() if painter.grey else None,
    )
    real = runs.real_features(task.features, painter, None, [])
    settings = {
        "model": args.model, "images": args.images, "batch": args.batch, "steps": args.steps,
        "guidance": task.guidance, "backend": args.backend,
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    _check_settings(args.output / SETTINGS, settings, {"machine": machine(device), "versions": versions()})
    missing = [point for point in wanted if point.key not in read(args.output)]
    say(f"{len(wanted)} configurations, {len(wanted) - len(missing)} of them measured before")
    if missing:
        pairs = min(PAIRS, len(task.seeds) - 1)
        with bar(task.steps * (len(task.seeds) * (len(missing) + 1) + pairs * len(missing))) as progress:
            _measure(task, missing, painter, args, real, progress)
    rows = list(read(args.output).values())
    attention = _attention(task, painter, args.output)
    say(sweep_report.make_table(rows))
    say()
    say(str(sweep_report.write_report(rows, {**settings, "machine": machine(device)}, args.output, attention)))
    return 0


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured so far, by key; a line that was cut short by a crash is left out."""
    found = {}
    path = folder / RECORDS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["key"]] = row
    return found


def _attention(task: Task, painter: Painter, folder: Path) -> dict[str, Any]:
    """What the attentions do without reuse: as it was measured before, or measured now."""
    from dqar_fx.calibration.records import write
    from dqar_fx.cli import sweep_attention

    path = folder / ATTENTION
    if not path.exists():
        few = replace(task, classes=task.classes[:KEPT], features=None)
        text = json.dumps(sweep_attention.measure(few, painter)) + "\n"
        write(path, lambda file: file.write_text(text, encoding="utf-8"))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _check_settings(path: Path, settings: dict[str, Any], origin: dict[str, Any]) -> None:
    from dqar_fx.calibration.records import write
    from dqar_fx.cli.models import CommandError

    if not path.exists():
        text = json.dumps({"settings": settings, **origin}, indent=2) + "\n"
        write(path, lambda file: file.write_text(text, encoding="utf-8"))
        return
    known = json.loads(path.read_text(encoding="utf-8"))["settings"]
    if known != settings:
        raise CommandError(
            f"{path.parent} holds a sweep with other settings ({known}, now {settings}): its rows cannot be compared "
            f"with new ones. Give another --output."
        )


@contextmanager
def _claimed(folder: Path, key: str) -> Iterator[bool]:
    """True if nobody else is at work on ``key``; it is ours until the end of the block."""
    path = folder / f".{file_name(key)}.claim"
    if path.exists() and time.time() - path.stat().st_mtime > STALE_CLAIM:
        path.unlink(missing_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        yield False
        return
    try:
        yield key not in read(folder)  # somebody may have been faster
    finally:
        path.unlink(missing_ok=True)


def _measure(
    task: Task, missing: Sequence[Point], painter: Painter, args: argparse.Namespace, real: Real | None, progress: Bar
) -> None:
    """Draw with the baseline, then with each configuration that nobody else has claimed."""
    from dqar_fx.cli import evaluation_runs as runs
    from dqar_fx.cli.pictures import save_strip

    baseline, *_ = runs.prepare([], painter, args.backend)
    assert baseline.painter is not None
    references: list[Tensor] = []
    progress.tell(f"{baseline.name}: drawing")
    for seed in task.seeds:
        references.append(task.draw(baseline.painter, seed, progress.advance)[0])
        runs.judge(task, baseline, references[-1], references[-1])
        baseline.reuse.append(0.0)
    save_strip(references[0][:KEPT], args.output / IMAGES / "baseline.png", grey=painter.grey)
    for settings, group in itertools.groupby(missing, lambda point: (point.cache, point.gates_text)):
        del settings
        runtime: Runtime | None = None
        drawer: Painter | None = None
        for point in group:
            with _claimed(args.output, point.key) as ours:
                if not ours:
                    continue
                if runtime is None or drawer is None or point.gates is not None:
                    drawer, runtime = _optimized(point, painter, args.backend)
                else:
                    runtime.follow(point.schedule)  # the model stays captured, its pieces compiled
                progress.tell(point.key)
                row, images = _row(task, point, drawer, runtime, baseline, references, real, progress)
                save_strip(images[:KEPT], image_file(args.output, point.key), grey=painter.grey)
                with (args.output / RECORDS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")  # in one piece: others append too


def _optimized(point: Point, painter: Painter, backend: str) -> tuple[Painter, Runtime]:
    import dqar_fx

    drawer = painter.twin()
    dqar_fx.optimize(
        drawer.denoiser, point.schedule, cache=point.cache, gates=point.gates, scheduler=drawer.scheduler,
        backend=backend,
    )  # fmt: skip
    return drawer, dqar_fx.runtime(drawer.denoiser)


def _row(
    task: Task,
    point: Point,
    drawer: Painter,
    runtime: Runtime,
    baseline: Configuration,
    references: Sequence[Tensor],
    real: Real | None,
    progress: Bar,
) -> tuple[dict[str, Any], Tensor]:
    """Draw every seed, and judge it; some are timed, the baseline right after each. The images are the first seed's."""
    from dqar_fx.cli import evaluation_runs as runs
    from dqar_fx.cli.evaluation_output import make_rows

    each = runs.Configuration(point.key, {"schedule": point.schedule}, drawer)
    first: Tensor | None = None
    seconds: list[float] = []
    pairs: list[tuple[list[float], list[float]]] = []  # of one seed, each step's time: the baseline's, and its own
    assert baseline.painter is not None
    timed = range(1, len(task.seeds))[:PAIRS]  # the first compiles
    for number, seed in enumerate(task.seeds):
        images, seconds = task.draw(drawer, seed, progress.advance)
        first = images if first is None else first
        runs.judge(task, each, images, references[number])
        each.reuse.append(runtime.stats.reuse_ratio)
        if number in timed:
            plain = task.draw(baseline.painter, seed, progress.advance)[1]
            pairs.append((plain, seconds))
    _, row = make_rows(task, [baseline, each], real)
    schedule = point.schedule
    record = {
        "key": point.key,
        "rule": schedule.name,
        "schedule": str(schedule),
        "cache": str(point.cache),
        "gates": point.gates_text,
        **{name: getattr(schedule, name) for name in ("warmup", "fraction", "refresh", "deep_first", "first", "last")},
        "flop_speedup": flop_speedup(runtime),
        "reuse_by_step": [statistics.fmean(step) for step in _reused(runtime)],
        "ms_per_step": 1e3 * statistics.fmean(seconds),
        "measured_speedup": typical(plain for plain, _ in pairs) / typical(own for _, own in pairs),
        "measured_speedups": [sum(plain) / sum(own) for plain, own in pairs],
        **{name: row[name] for name in ("reuse_ratio", "psnr_db", "ssim", "relative_l2", "agreement", "frechet")},
    }
    assert first is not None
    return record, first


def typical(runs: Iterable[Sequence[float]]) -> float:
    """Seconds of a generation of which every step takes its median over the runs: what interrupts a run is left out."""
    return math.fsum(statistics.median(step) for step in zip(*runs, strict=True))


def _reused(runtime: Runtime) -> list[list[bool]]:
    """For each step of the last run which sites were read, in its first branch."""
    found: dict[int, dict[int, bool]] = {}
    for decision in runtime.stats.decisions:
        found.setdefault(decision.step, {}).setdefault(decision.site, decision.action == "reuse")
    return [[found[step][site] for site in sorted(found[step])] for step in sorted(found)]


def flop_speedup(runtime: Runtime) -> float:
    """What the last run saved, counted in FLOP: as many times faster, if nothing but arithmetic took time."""
    from dqar_fx.graph.flops import Work

    work = Work([g.captured for g in runtime.graphs], [g.regions for g in runtime.graphs], runtime.cache)
    steps = _reused(runtime)
    return len(steps) * work.total / sum(work.of(step) for step in steps)
