"""``dqar-fx calibrate`` from end to end, and what it refuses before it begins."""

import json
from pathlib import Path

import pytest

from dqar_fx import Plan
from dqar_fx.cli import main

FAST = ("--steps", "5", "--seeds", "2", "--images", "6", "--backend", "eager", "--points", "2")


@pytest.mark.filterwarnings("ignore:the estimate rests on")
def test_it_writes_a_plan_that_keeps_to_the_budget_and_what_else_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--budget", "reuse=0.4", "--output", str(tmp_path), *FAST]) == 0
    out = capsys.readouterr().out
    plan = Plan.load(tmp_path / "plan.json")
    assert 0.4 <= plan.reuse_ratio < 0.7
    assert plan.calibration is not None
    assert plan.calibration["budget"] == "reuse=0.4"
    assert f"{plan.calibration['verified']['psnr']:.1f}" in out
    written = json.loads((tmp_path / "calibration.json").read_text())
    names = [row["plan"] for row in written["pareto"]]
    assert names.count("calibrated") == 2
    assert {"interval:every=3,warmup=0.1", "linear:warmup=0.2,fraction=1.0", "taper"} < set(names)
    assert all(name in out for name in names)
    ratios = [row["reuse_ratio"] for row in written["pareto"]]
    assert ratios == sorted(ratios)
    for name in ("plan.png", "pareto.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert len(list((tmp_path / "sweeps").glob("seed-*.npz"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "fid=3"], "give psnr=30"),
        (["--seeds", "1"], "--seeds 1: give at least 2"),
        (["--steps", "1"], "--steps 1: give at least 2"),
        (["--cache", "int7"], "int7"),
        (["--model", "nowhere/at-all", "--call", "{"], "not JSON"),
    ],
)
def test_it_refuses_what_has_no_meaning(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["calibrate", "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "plan.json").exists()
