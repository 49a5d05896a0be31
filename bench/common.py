"""What every benchmark shares: alternating timed calls, peak memory, one JSON record per row, one table."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from dqar_fx.evaluation.memory import peak_mib

__all__ = [
    "RESULTS", "alternate", "commit", "finish", "interquartile", "machine", "median", "peak_mib", "relative_error",
    "synchronise", "timed",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was queued; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, the device drained before and after."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return (time.perf_counter() - started) * 1e3


def alternate(calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time the calls in turn, A B C A B C ..., so that a drift of the machine hits all alike; milliseconds per call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, device))
    return times


def median(times: Sequence[float]) -> float:
    """The middle of the times, in their unit."""
    return statistics.median(times)


def interquartile(times: Sequence[float]) -> float:
    """From the first quartile of the times to the third, in their unit; 0 for a single one."""
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [0.0, 0.0, 0.0]
    return quartiles[2] - quartiles[0]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """``|value - reference| / |reference|`` in the L2 norm, summed in float64."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def commit() -> str:
    """The commit measured, with a ``+`` where the tree had changes."""
    try:
        run = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device) -> str:
    """The name of the GPU, or the architecture and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def where(device: torch.device) -> dict[str, str]:
    """On what, of what, and when something was measured."""
    return {
        "device": str(device),
        "machine": machine(device),
        "torch": torch.__version__,
        "commit": commit(),
        "date": str(date.today()),
    }


def finish(rows: list[dict[str, Any]], columns: Sequence[str], device: torch.device, output: Path) -> None:
    """Write one JSON record per row and print the same rows as a table."""
    origin = where(device)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps({**row, **origin}) + "\n" for row in rows))
    print(tabulate([[row.get(c) for c in columns] for row in rows], headers=columns, floatfmt=".4g"))
    print(f"{origin['machine']}, torch {origin['torch']}, {origin['date']}, commit {origin['commit']} -> {output}")
