"""What every benchmark shares: timed calls, peak memory, one JSON record per row, one table."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from dqar_fx.evaluation.memory import peak_mib
from dqar_fx.tuning.timing import interquartile, timed

__all__ = [
    "RESULTS", "commit", "finish", "interquartile", "machine", "median", "peak_mib", "relative_error",
    "timed",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"


def median(times: Sequence[float]) -> float:
    """The middle of the times, in their unit."""
    return statistics.median(times)


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
