"""``dqar-fx trace`` and ``train-policy``: from real runs of the shipped model to a policy that gates it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import dqar_fx
from dqar_fx import Gates, Plan, Policy, Schedule, digits
from dqar_fx.cli import main
from dqar_fx.policy import ALL_FEATURES
from dqar_fx.traces import load

STEPS, SITES, WARMUP = 8, 6, 2
CLASSES = "3,8"
SETTINGS = ("--backend", "eager", "--steps", str(STEPS), "--classes", CLASSES, "--max-age", "2")


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    """Dynamo counts the compilations of a function over the whole process; each test begins at zero."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def command(*argv: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        assert main(["--debug", *argv]) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "made" / "t.jsonl"
    command("trace", *SETTINGS, "--seeds", "0,1", "--runs", "4", "--output", str(path))
    return path


def test_every_candidate_is_there_and_as_many_as_asked_for_are_measured(traced: Path) -> None:
    traces = load(traced)
    first = traces.column("age") == 1
    assert first.sum() == 2 * SITES * (STEPS - WARMUP)
    assert np.isfinite(traces.final_error[first]).sum() == 2 * 4
    assert np.isfinite(traces.final_error[~first]).all()
    assert 1 <= (~first).sum() <= 2 * 4  # a value of two steps wherever the run had another step
    assert (traces.column("reuses") == traces.column("age") - 1).all()
    # At the last step nothing computes that could be compared with what is stored.
    assert (np.isfinite(traces.site_error[first]) == (traces.column("step")[first] < STEPS - 1)).all()
    features = traces.features[:, [ALL_FEATURES.index(name) for name in dqar_fx.policy.FEATURES]]
    assert np.isfinite(features).all()
    assert (traces.header["model"], traces.header["classes"], traces.header["num_steps"]) == ("digits", [3, 8], STEPS)


def test_the_harm_is_that_of_a_run_with_that_read_alone(traced: Path) -> None:
    traces = load(traced)
    for age in (1, 2):
        measured = np.isfinite(traces.final_error) & (traces.column("age") == age)
        index = int(np.flatnonzero(measured)[0])
        seed, step, site = (
            int(traces.generation[index]), int(traces.column("step")[index]), int(traces.column("site")[index]),
        )  # fmt: skip
        samples = []
        for reads in (age - 1, age):
            reuse = np.zeros((STEPS, SITES), dtype=bool)
            reuse[step - age + 1 : step - age + 1 + reads, site] = True
            model, scheduler = digits.load(), digits.make_scheduler()
            dqar_fx.optimize(model, Plan(reuse), scheduler=scheduler, backend="eager")
            sample = digits.sample(model, classes=[3, 8], seed=seed, num_steps=STEPS, scheduler=scheduler)
            samples.append((sample.double() + 1) / 2)
        without, with_it = samples
        expected = float((with_it - without).norm() / without.norm())
        assert traces.final_error[index] == pytest.approx(expected, rel=1e-3)


def test_it_goes_on_where_it_stopped(traced: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = traced.read_text().splitlines(keepends=True)
    seeds = [json.loads(line).get("seed") for line in lines]
    path.write_text("".join(line for line, seed in zip(lines, seeds, strict=True) if seed != 1))  # the second is to do
    whole = path.read_text()
    command("trace", *SETTINGS, "--seeds", "0,1", "--runs", "4", "--output", str(path))
    assert path.read_text().startswith(whole)
    again, first = load(path), load(traced)
    assert np.array_equal(again.features, first.features, equal_nan=True)
    assert np.array_equal(again.final_error, first.final_error, equal_nan=True)


def test_other_settings_do_not_go_into_the_same_file(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["trace", *SETTINGS, "--cache", "native", "--output", str(traced)]
    assert main(argv) == 2
    assert "was begun with other settings (cache: 'int8:token')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trace", "--seeds", "a"], "--seeds a: give numbers"),
        (["trace", "--seeds", "-1"], "at least 0"),
        (["trace", "--runs", "-1"], "--runs -1"),
        (["train-policy", "none.jsonl"], "none.jsonl"),
        (["train-policy", "none.jsonl", "--hidden", "x"], "--hidden x"),
        (["train-policy", "none.jsonl", "--output", "policy.pt"], "ends in .safetensors"),
    ],
)
def test_mistakes_are_explained(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_schedule_without_reuse_has_nothing_to_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["trace", *SETTINGS, "--schedule", "none", "--output", str(tmp_path / "t.jsonl")]
    assert main(argv) == 2
    assert "never reuses in this run" in capsys.readouterr().err


def test_from_traces_to_a_gated_run(traced: Path, tmp_path: Path) -> None:
    output = command(
        "train-policy", str(traced), "--harm", "site", "--epochs", "40", "--output", str(tmp_path / "p.safetensors")
    )
    assert "1281 parameters" in output
    assert "harmful reads allowed" in output
    assert {path.name for path in tmp_path.iterdir()} == {"p.safetensors", "p.json", "p.png"}
    policy = Policy.load(tmp_path / "p.safetensors")
    assert math.isfinite(policy.training["held_out_loss"])
    assert policy.training["traces"]["model"] == "digits"
    model, scheduler = digits.load(), digits.make_scheduler()
    reused = []
    for limit in (1.0, 0.5, 1e-9):
        gates = Gates(entropy=None, snr=None, policy=dataclasses.replace(policy, min_probability=limit))
        dqar_fx.optimize(model, Schedule.always(STEPS, warmup=2), gates=gates, scheduler=scheduler, backend="eager")
        digits.sample(model, classes=[3, 8], seed=9, num_steps=STEPS, scheduler=scheduler)
        reused.append(dqar_fx.runtime(model).stats.reused)
        reasons = {d.reason for d in dqar_fx.runtime(model).stats.decisions}
        assert ("policy" in reasons) is (limit > 0.1)
        dqar_fx.restore(model)
    assert reused[0] <= reused[1] <= reused[2] == SITES * (STEPS - WARMUP)
    assert reused[0] < reused[2]
