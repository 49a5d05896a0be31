"""The other process of ``test_saved.py``: builds the models anew, loads their captures, and says what happened."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import dqar_fx
from dqar_fx import Schedule
from tests.families import DIT, FLUX, Family

FAMILIES = {"dit": DIT, "flux": FLUX}
SCHEDULE = Schedule.interval(5, every=2, warmup=1)


def generation(family: Family, path: Path | None) -> dict[str, Any]:
    """One generation of a fresh model with a loaded capture (None: with its own), and what was captured and decided."""
    model = family.optimized(SCHEDULE)
    if path is not None:
        dqar_fx.load_compiled(model, path)
    counters.clear()
    with torch.no_grad():
        samples = family.sample(model, steps=range(5))
    stats = dqar_fx.runtime(model).stats
    actions = [(d.step, d.site, d.action) for d in stats.decisions]
    traced = counters["stats"]["unique_graphs"]
    # Of another size, and so traced in any process: beside a loaded capture, too.
    other = family.call(model, 0, batch=3)
    return {"samples": samples, "traced": traced, "actions": actions, "other": other}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    torch.save({name: generation(family, folder / name) for name, family in FAMILIES.items()}, folder / "result.pt")
