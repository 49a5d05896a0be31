"""What the commands measure alike: the time of each step, and the machine that took it."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dqar_fx.cli.models import Painter


def timed_draw(
    painter: Painter,
    classes: Sequence[int],
    device: torch.device,
    *,
    seed: int,
    num_steps: int,
    guidance: float,
    on_step: Callable[[], None],
) -> tuple[Tensor, list[float]]:
    """The images of one generation, and the seconds of each of its steps; ``on_step`` is called after each."""
    from dqar_fx.tuning.timing import synchronize

    times = [time.perf_counter()]

    def tick() -> None:
        synchronize(device)
        times.append(time.perf_counter())
        on_step()

    images = painter.draw(classes, seed=seed, num_steps=num_steps, guidance=guidance, on_step=tick)
    return images, [after - before for before, after in itertools.pairwise(times)]


def step_seconds(rounds: Sequence[Sequence[float]]) -> float:
    """Mean over the steps of a generation of the median over the generations timed.

    Not a median over the steps: computing and reusing steps differ, and it would pick one of them.
    """
    return statistics.fmean(statistics.median(step) for step in zip(*rounds, strict=True))


def machine(device: torch.device) -> dict[str, Any]:
    """Everything about the machine without which a speed means nothing."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "device_name": name if device.type != "mps" else f"{name} (mps)",
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Much above the threads: others were at work, and the times, if not their ratios, mean little.
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of what takes part in a run."""
    import diffusers
    import torch

    import dqar_fx

    return {
        "dqar_fx": dqar_fx.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
