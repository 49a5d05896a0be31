"""The README's Python runs as it stands, in order, with a small random pipeline in place of the one from the hub."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import matplotlib as mpl
import pytest
import torch
from diffusers import DDIMScheduler

import dqar_fx
from dqar_fx.calibration.budget import Budget
from dqar_fx.calibration.calibrate import calibrate
from dqar_fx.calibration.sampling import sampler_of
from dqar_fx.tune import tune
from tests.models import make_dit, timestep

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def calibrated(*args: Any, **kwargs: Any) -> dqar_fx.Plan:
    """What ``calibrate`` takes, without the minutes that it takes (it has tests of its own)."""
    given = inspect.signature(calibrate).bind(*args, **kwargs)
    given.apply_defaults()
    sampler_of(given.arguments["model"], given.arguments["sample"], given.arguments["scheduler"], 50)
    assert isinstance(Budget.parse(given.arguments["budget"]), Budget)
    return dqar_fx.Schedule.interval(given.arguments["num_steps"]).plan(3)


def tuned(*args: Any, **kwargs: Any) -> dqar_fx.Tuning:
    """What ``tune`` finds, without the compilation."""
    return tune(*args, **kwargs, backend="eager", rounds=3)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    pipe = SimpleNamespace(transformer=make_dit(), scheduler=scheduler)
    hub = SimpleNamespace(from_pretrained=lambda _name: pipe)
    monkeypatch.setattr(diffusers, "DiTPipeline", hub)
    monkeypatch.setattr(dqar_fx, "calibrate", calibrated)
    monkeypatch.setattr(dqar_fx, "tune", tuned)
    names = {
        "model": pipe.transformer,
        "timesteps": scheduler.timesteps,
        "torch": torch,
        "scheduler": scheduler,
        "inputs": {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": timestep(0), "class_labels": torch.arange(2)},
        "sample": lambda _model, _seed: torch.zeros(1),
    }
    assert len(BLOCKS) == 10
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["plan"], dqar_fx.Plan)
    assert (tmp_path / "plan.png").stat().st_size > 1000
    # The last block optimises it anew, which it refuses unless the last but three has restored it.
    assert dqar_fx.runtime(pipe.transformer).stats.captures == 0
    assert (tmp_path / "dit.capture").exists()


def test_the_commands_of_the_readme_are_those_of_ci() -> None:
    ci = (Path(__file__).parent.parent / ".ci" / "run").read_text(encoding="utf-8")
    for part in ("-c .ci/constraints.txt .", "dqar-fx demo", "-c .ci/constraints.txt -e '.[dev]'", "pytest"):
        assert part in README
        assert part in ci


def test_every_file_the_readme_shows_exists() -> None:
    root = Path(__file__).parent.parent
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (root / path).is_file(), path
