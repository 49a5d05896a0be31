"""``dqar-fx sweep --dummy``: DQAR's benchmark of its gates, measured anew: time, memory and reuse of a dummy model.

With ``--model``, schedules, caches and gates of a real one: see ``sweep_grid``.

Every configuration of DQAR's controller (limit on the entropy, limit on the number of reuses) draws the same samples as
a loop without it. The loop is driven by hand and nothing is compiled: this shows what gates decide and what asking
them costs. What reuse gains on top of ``torch.compile`` is shown by ``dqar-fx demo``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

if TYPE_CHECKING:
    from torch import Tensor

    from dqar_fx.cli.dummy import DummyDiT
    from dqar_fx.cli.terminal import Bar
    from dqar_fx.controller import Controller

HELP = "sweep schedules, caches and gates over a model, and draw what each costs; or DQAR's gates over a dummy model"

BASELINE, STATIC, DQAR = "baseline", "static", "dqar"
UNTIMED = 2  # generations of each configuration before the timed ones: one to warm up, one to measure memory
# A load average by so much above the sweep's own threads means that somebody else was at work.
OTHERS = 1.5
DARK = "#222222"
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
COLOURS = {BASELINE: "#999999", STATIC: "#E69F00", DQAR: "#0072B2"}  # Okabe and Ito's, told apart by all eyes


def original_rule(step: int, site: int, num_steps: int, num_sites: int) -> bool:
    """Which layers may reuse, as in DQAR's first code: the first 4 before 20 % of the run, 12 before 60 %, then all.

    Of 6 layers and 12 steps: 4 at steps 1 and 2, all from step 3 on, 62 of 72 in all.
    """
    progress = step / max(num_steps - 1, 1)
    return site < (4 if progress < 0.2 else 12 if progress < 0.6 else num_sites)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to sweep over, and where the results go."""
    from dqar_fx.cli import sweep_grid

    sweep_grid.add_arguments(parser)
    parser.add_argument("--dummy", action="store_true", help="sweep DQAR's gates over the dummy model instead; for it:")
    parser.add_argument(
        "--thresholds",
        default="1.5,3.0,5.0",
        metavar="TAU,...",
        help="limits on the entropy, in nats (default: 1.5,3.0,5.0)",
    )
    parser.add_argument(
        "--reuse-limits",
        default="2,4,6",
        metavar="N,...",
        help="how often a stored value is read before it is computed anew (default: 2,4,6)",
    )
    parser.add_argument(
        "--max-gap", type=int, default=6, metavar="N", help="largest age of a value that is read, in steps (default: 6)"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="timed generations of each (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and noise (default: 0)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads (default: 1; the model is so small that more would mostly wait for one another)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("dqar-sweep"),
        metavar="FOLDER",
        help="for the results (default: dqar-sweep)",
    )


@dataclass
class Configuration:
    """One way to drive the loop, and what was measured of it.

    Attributes:
        name: ``baseline``, ``static`` or ``dqar``.
        controller: None for the baseline.
        threshold: limit on the entropy in nats, None without a gate on it.
        reuse_limit: how often a stored value is read.
        seconds: of each timed generation.
        cpu_seconds: of the processor that they took, which others on the machine change less.
        sample: the result; every generation gives the same.
        entropies: ``[B]`` for every attention that was measured.
        cache_bytes: the most that was stored at once.
        peak_bytes: the most that tensors took at once, above what there was before.
        resident_bytes: of the whole process after a generation, None where the system does not tell.
    """

    name: str
    controller: Controller | None = None
    threshold: float | None = None
    reuse_limit: int | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    sample: Tensor | None = None
    entropies: list[Tensor] = field(default_factory=list)
    cache_bytes: int = 0
    peak_bytes: int = 0
    resident_bytes: int | None = None

    @property
    def label(self) -> str:
        """As it is called in the table and the picture."""
        if self.threshold is None:
            return self.name
        return f"{self.name}, entropy < {self.threshold:g}, {self.reuse_limit} reuses"


def run(args: argparse.Namespace) -> int:
    """Measure every configuration, print the table, and write ``sweep.json`` and ``sweep.png``."""
    import torch

    from dqar_fx.cli import dummy, sweep_grid
    from dqar_fx.cli.models import CommandError
    from dqar_fx.cli.terminal import bar, say

    if args.dummy == (args.model is not None):
        raise CommandError(
            "sweep over which model? Give --model digits (or a DiT pipeline), or --dummy. For a loop of your own, "
            "drive it with dqar_fx.Controller (examples/minimal_loop.py shows how)."
        )
    if not args.dummy:
        return sweep_grid.run(args)
    for name in ("runs", "threads"):
        if (value := getattr(args, name)) < 1:
            raise CommandError(f"--{name} {value}: give at least 1.")
    thresholds = _numbers("--thresholds", args.thresholds, float, "1.5,3.0,5.0")
    reuse_limits = _numbers("--reuse-limits", args.reuse_limits, int, "2,4,6")
    configurations = make_configurations(thresholds, reuse_limits, args.max_gap)
    args.output.mkdir(parents=True, exist_ok=True)  # before the seconds that the rest takes

    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        with bar(len(configurations) * (UNTIMED + args.runs) * dummy.STEPS) as progress:
            measure(configurations, runs=args.runs, seed=args.seed, progress=progress)
        rows = [make_row(configuration, configurations[0], args.max_gap) for configuration in configurations]
        record: dict[str, Any] = {
            "benchmark": "sweep of DQAR's gates, eager, driven by hand",
            "seed": args.seed,
            "max_gap": args.max_gap,
            "machine": platform.machine(),
            "threads": args.threads,
            # Much above the threads: others were at work, and the times, if not their ratios, mean little.
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
            "rows": rows,
        }
    finally:
        torch.set_num_threads(threads)
    picture, numbers = args.output / "sweep.png", args.output / "sweep.json"
    numbers.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draw(rows, picture)
    say(make_table(rows))
    say()
    load = record["load_average"]
    if load is not None and load[0] > args.threads + OTHERS:
        say(f"The machine was busy (load {load[0]:.1f}, the sweep {args.threads}): go by the CPU times.")
    say(f"{picture}: time, memory and reuse; {numbers}: every number.")
    return 0


def make_configurations(
    thresholds: Sequence[float], reuse_limits: Sequence[int], max_gap: int | None
) -> list[Configuration]:
    """The baseline, the schedule alone, and the gates with every pair of limits.

    Raises:
        GateError: a limit has no meaning.
    """
    from dqar_fx.cli.dummy import LAYERS, STEPS
    from dqar_fx.controller import Controller
    from dqar_fx.gates import EntropyGate, Gates
    from dqar_fx.schedule import Schedule

    schedule = Schedule.custom(STEPS, original_rule)
    found = [Configuration(BASELINE), Configuration(STATIC, Controller(schedule, LAYERS))]
    for threshold in thresholds:
        for limit in reuse_limits:
            # The dummy has no noise schedule worth the name: its SNR would say nothing.
            gates = Gates(entropy=EntropyGate(threshold), snr=None, max_age=max_gap, max_reuse=limit)
            found.append(Configuration(DQAR, Controller(schedule, LAYERS, gates=gates), threshold, limit))
    return found


def measure(configurations: Sequence[Configuration], *, runs: int, seed: int, progress: Bar | None = None) -> None:
    """Draw with every configuration: once to warm up, once for the memory, and ``runs`` times against the clock."""
    from dqar_fx.cli import dummy

    model, noise = dummy.make_dummy(seed)

    def tell(text: str) -> None:
        if progress is not None:
            progress.tell(text)

    def advance() -> None:
        for _ in range(dummy.STEPS if progress is not None else 0):
            progress.advance()  # type: ignore[union-attr]  # none, none of these

    for untimed, text in enumerate(("warming up", "measuring memory")):
        tell(text)
        for configuration in configurations:
            if untimed == 0:
                dummy.sample(model, noise, configuration.controller)
            else:
                _measure_memory(configuration, model, noise)
            advance()
    for number in range(runs):
        tell(f"timing, round {number + 1} of {runs}")
        for configuration in configurations:  # in turn, so that a drift of the machine hits all alike
            started, cpu_started = time.perf_counter(), time.process_time()
            configuration.sample, configuration.entropies = dummy.sample(model, noise, configuration.controller)
            configuration.seconds.append(time.perf_counter() - started)
            configuration.cpu_seconds.append(time.process_time() - cpu_started)
            advance()


def _measure_memory(configuration: Configuration, model: DummyDiT, noise: Tensor) -> None:
    from dqar_fx.cli import dummy

    controller = configuration.controller
    if controller is not None:
        controller.reset()  # or what the warm-up has stored would be there before

    def on_step() -> None:
        stored = 0 if controller is None else controller.stats.cache_bytes
        configuration.cache_bytes = max(configuration.cache_bytes, stored)

    with _peak_memory() as peak:
        dummy.sample(model, noise, controller, on_step)
    configuration.peak_bytes = peak()
    configuration.resident_bytes = _resident_bytes()


@contextmanager
def _peak_memory() -> Iterator[Callable[[], int]]:
    """How many bytes the tensors made inside take at most at once; what an operation needs within itself is not seen.

    Not the profiler: it writes to standard error, and grows by more than it measures here.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    held = highest = 0
    known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def storages(values: Any) -> list[torch.UntypedStorage]:
        return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]

    def count(size: int) -> None:
        nonlocal held, highest
        held += size
        highest = max(highest, held)

    class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            known.update(storages((args, kwargs)))  # what is not known yet was there before: weights, the noise
            result = func(*args, **(kwargs or {}))
            for storage in storages(result):
                if storage not in known:
                    known.add(storage)
                    count(storage.nbytes())
                    weakref.finalize(storage, count, -storage.nbytes())
            return result

    with Tracker():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        yield lambda: highest


def _resident_bytes() -> int | None:
    """Memory of this process that is not swapped out; None where there is no ``/proc``."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def make_row(configuration: Configuration, baseline: Configuration, max_gap: int) -> dict[str, Any]:
    """One record: what was run, how fast, in how much memory, and how far the sample is from the baseline's."""
    import torch

    from dqar_fx.cli import dummy

    assert configuration.sample is not None
    assert baseline.sample is not None
    milliseconds = [1e3 * seconds for seconds in configuration.seconds]
    quartiles = statistics.quantiles(milliseconds, n=4) if len(milliseconds) > 1 else milliseconds * 3
    median = statistics.median(milliseconds)
    stats = None if configuration.controller is None else configuration.controller.stats
    means = [float(entropy.mean()) for entropy in configuration.entropies]  # what the gate compares
    difference = (configuration.sample.double() - baseline.sample.double()).norm() / baseline.sample.double().norm()
    resident = configuration.resident_bytes
    return {
        "case": configuration.name,
        "label": configuration.label,
        "threshold": configuration.threshold,
        "reuse_limit": configuration.reuse_limit,
        "max_gap": None if configuration.threshold is None else max_gap,
        "model": "dummy DiT",
        "shape": list(configuration.sample.shape),
        "layers": dummy.LAYERS,
        "dtype": str(configuration.sample.dtype).removeprefix("torch."),
        "cache": None if configuration.controller is None else str(configuration.controller.cache),
        "steps": dummy.STEPS,
        "reused": 0 if stats is None else stats.reused,
        "attentions": dummy.STEPS * dummy.LAYERS,
        "reasons": {} if stats is None else stats.reasons,
        "median_ms": median,
        "iqr_ms": quartiles[2] - quartiles[0],
        "quartiles_ms": [quartiles[0], quartiles[2]],
        "runs": len(milliseconds),
        "milliseconds": milliseconds,
        "cpu_ms": 1e3 * statistics.median(configuration.cpu_seconds),
        "speedup": 1e3 * statistics.median(baseline.seconds) / median,
        "cpu_speedup": statistics.median(baseline.cpu_seconds) / statistics.median(configuration.cpu_seconds),
        "cache_kib": configuration.cache_bytes / 2**10,
        "peak_mib": configuration.peak_bytes / 2**20,
        "resident_mib": None if resident is None else resident / 2**20,
        "rel_l2_error": float(difference),
        "entropy_min": min(means, default=None),
        "entropy_max": max(means, default=None),
        "device": str(configuration.sample.device),
        "torch": torch.__version__,
    }


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as they are printed."""
    headers = ["", "reused", "ms", "iqr", "CPU ms", "speed-up", "by CPU", "cache KiB", "peak MiB", "RSS MiB"]
    headers += ["rel. error", "entropy, nats"]
    lines = []
    for row in rows:
        resident, lowest = row["resident_mib"], row["entropy_min"]
        lines.append(
            [
                row["label"],
                f"{row['reused']} of {row['attentions']}",
                f"{row['median_ms']:.0f}",
                f"{row['iqr_ms']:.0f}",
                f"{row['cpu_ms']:.0f}",
                f"{row['speedup']:.2f}x",
                f"{row['cpu_speedup']:.2f}x",
                f"{row['cache_kib']:.0f}",
                f"{row['peak_mib']:.2f}",
                "" if resident is None else f"{resident:.0f}",
                "reference" if row["case"] == BASELINE else f"{row['rel_l2_error']:.1e}",
                "" if lowest is None else f"{lowest:.2f} to {row['entropy_max']:.2f}",
            ]
        )
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1)))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Three panels side by side, a bar for each row: time, memory and reuse."""
    # Figure, not pyplot: no display, no global state, no figure left open.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 1.7 + 0.32 * len(rows)), dpi=150, facecolor="white", layout="constrained")
    times, memory, reuse = figure.subplots(1, 3, sharey=True)
    places = list(range(len(rows)))
    colours = [COLOURS[row["case"]] for row in rows]
    first = rows[0]

    medians = [row["median_ms"] for row in rows]
    ends = [row["quartiles_ms"][1] for row in rows]
    spread = [
        [row["median_ms"] - row["quartiles_ms"][0] for row in rows],
        [row["quartiles_ms"][1] - row["median_ms"] for row in rows],
    ]
    times.barh(places, medians, xerr=spread, color=colours, error_kw={"ecolor": DARK, "capsize": 2})
    times.plot([row["cpu_ms"] for row in rows], places, "D", color="white", markeredgecolor=DARK, markersize=5)
    times.axvline(medians[0], color=DARK, linewidth=0.8, linestyle=":", zorder=0)
    _label(times, ends, [f"{row['speedup']:.2f}x" for row in rows])
    times.set(
        xlabel=f"ms per generation, median of {first['runs']}, and speed-up\n"
        f"(line: interquartile range; diamond: CPU time)",
    )
    times.set_yticks(places, [row["label"] for row in rows])
    times.invert_yaxis()

    peaks = [row["peak_mib"] for row in rows]
    memory.barh(places, peaks, color=colours)
    memory.barh(places, [row["cache_kib"] / 2**10 for row in rows], color=DARK, height=0.35)
    _label(memory, peaks, [f"{row['cache_kib']:.0f} KiB stored" for row in rows])
    memory.set(xlabel="MiB of tensors at the peak\n(black: the values stored)")

    reuse.barh(places, [row["reused"] for row in rows], color=colours)
    _label(reuse, [row["reused"] for row in rows], [str(row["reused"]) for row in rows])
    reuse.set_xlim(0, first["attentions"])
    reuse.set(xlabel=f"attentions read instead of computed,\nof {first['attentions']}")

    for axes, title in ((times, "Time"), (memory, "Memory"), (reuse, "Reuse")):
        axes.set_title(title, loc="left", weight="bold", fontsize=11)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    shape = " x ".join(map(str, first["shape"]))
    figure.suptitle(
        f"DQAR's gates on a dummy DiT: {first['layers']} layers, {first['steps']} steps, samples {shape}, not compiled",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    figure.savefig(path)


def _label(axes: Any, ends: Sequence[float], texts: Sequence[str]) -> None:
    room = max(ends, default=0.0) or 1.0
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.text(end + 0.015 * room, place, text, va="center", fontsize=8, color=DARK, bbox=PAPER)
    axes.set_xlim(0, 1.3 * room)


def _numbers(option: str, text: str, kind: type[float] | type[int], example: str) -> list[Any]:
    from dqar_fx.cli.models import CommandError

    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise CommandError(f"{option} {text}: give numbers separated by commas, as in {example}.") from error
    if any(math.isnan(number) or number < 0 for number in found):
        raise CommandError(f"{option} {text}: give numbers of at least 0, as in {example}.")
    return list(dict.fromkeys(found))  # each once
