"""``dqar-fx sweep``: the reuse counts that DQAR published for its dummy, from a real run; and numbers that agree."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from dqar_fx import Schedule
from dqar_fx.cli import dummy, main, sweep

# (limit on the entropy, limit on the number of reuses) -> attentions reused, of 72; by the seeds and by hand
PUBLISHED = {
    **{(1.5, limit): 0 for limit in (2, 4, 6)},
    **{(threshold, limit): count for threshold in (3.0, 5.0) for limit, count in ((2, 44), (4, 52), (6, 56))},
}


class Sweep(NamedTuple):
    folder: Path
    output: str
    record: dict[str, Any]


def run_sweep(folder: Path, *options: str) -> Sweep:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        assert main(["--debug", "sweep", "--dummy", "--output", str(folder), *options]) == 0
    return Sweep(folder, output.getvalue(), json.loads((folder / "sweep.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return run_sweep(tmp_path_factory.mktemp("sweep") / "made" / "anew", "--runs", "2")


def test_the_published_counts(swept: Sweep) -> None:
    baseline, static, *gated = swept.record["rows"]
    assert (baseline["case"], baseline["reused"], static["case"], static["reused"]) == ("baseline", 0, "static", 62)
    assert {(row["threshold"], row["reuse_limit"]): row["reused"] for row in gated} == PUBLISHED
    assert {row["attentions"] for row in swept.record["rows"]} == {72}


def test_the_rule_by_hand() -> None:
    reuse = Schedule.custom(12, sweep.original_rule).plan(6).reuse
    assert reuse.sum(1).tolist() == [0, 4, 4, *[6] * 9]
    assert reuse[:, :4].all(1).tolist() == [False, *[True] * 11]
    # of a deep model, 4 layers before 20 % of the run and 12 before 60 %
    deep = Schedule.custom(50, sweep.original_rule).plan(28).reuse.sum(1)
    assert deep[[1, 9, 10, 29, 30]].tolist() == [4, 4, 12, 12, 28]


def test_why_it_computed(swept: Sweep) -> None:
    for row in swept.record["rows"][1:]:
        assert sum(row["reasons"].values()) == 72
        assert row["reasons"].get("reuse", 0) == row["reused"]
        assert row["reasons"]["warmup"] == 6
        assert row["reasons"]["schedule"] == 4  # two layers at steps 1 and 2
        if row["threshold"] == 1.5:
            assert row["reasons"]["entropy"] == 62


def test_the_numbers_are_those_of_the_run(swept: Sweep) -> None:
    baseline, static, *gated = swept.record["rows"]
    assert baseline["cache_kib"] == baseline["rel_l2_error"] == 0  # nothing of DQAR is in its loop
    assert baseline["reasons"] == {}
    scales = dummy.BATCH * dummy.TOKENS * 4
    for row in (static, *gated):
        assert row["cache_kib"] == dummy.LAYERS * (dummy.BATCH * dummy.TOKENS * dummy.WIDTH + scales) / 1024
        assert row["peak_mib"] > baseline["peak_mib"] > 0.1
        assert (row["rel_l2_error"] > 0) is (row["reused"] > 0)
        assert row["rel_l2_error"] < 0.05
        assert row["speedup"] == pytest.approx(baseline["median_ms"] / row["median_ms"])
        assert row["cpu_speedup"] == pytest.approx(baseline["cpu_ms"] / row["cpu_ms"])
        assert len(row["milliseconds"]) == row["runs"] == 2
        assert min(row["milliseconds"]) <= row["median_ms"] <= max(row["milliseconds"])
    assert static["entropy_min"] is None
    for row in gated:
        assert 1.5 < row["entropy_min"] <= row["entropy_max"] < np.log(dummy.TOKENS)
    errors = [row["rel_l2_error"] for row in gated if row["threshold"] == 3.0]
    assert errors == sorted(errors)  # the more is reused, the larger


def test_what_is_printed_and_drawn(swept: Sweep) -> None:
    lines = swept.output.splitlines()
    assert len(swept.record["rows"]) == 11
    for row, line in zip(swept.record["rows"], lines[2:], strict=False):
        assert line.startswith(row["label"])
        assert f" {row['reused']} of 72 " in line
    assert "sweep.json" in lines[-1]
    with Image.open(swept.folder / "sweep.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 1500
    for colour in sweep.COLOURS.values():  # every kind of configuration has its bars
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(-1).sum() > 1000


def test_every_option_changes_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []  # only noted: on a busy machine a second one costs ten times the work
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    options = ("--thresholds", "1.93", "--reuse-limits", "3,3", "--max-gap", "1", "--runs", "1", "--seed", "1")
    record = run_sweep(tmp_path, *options, "--threads", "2").record
    *_, row = record["rows"]
    assert len(record["rows"]) == 3
    assert (row["threshold"], row["reuse_limit"], row["max_gap"], row["runs"], record["threads"]) == (1.93, 3, 1, 1, 2)
    assert row["reasons"]["stale"] > 0
    assert 0 < row["reused"] <= 34  # every second step at most
    assert row["iqr_ms"] == 0
    assert threads == [2, torch.get_num_threads()]  # and back
    noises = [dummy.make_dummy(seed)[1] for seed in (0, 1, 1)]
    assert torch.equal(noises[1], noises[2])
    assert not torch.equal(noises[0], noises[1])


def test_the_random_state_of_the_caller_stays() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    dummy.make_dummy(0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give --model digits.*or --dummy.*dqar_fx.Controller.*minimal_loop.py"),
        (["--dummy", "--runs", "0"], "--runs 0: give at least 1"),
        (["--dummy", "--threads", "0"], "--threads 0: give at least 1"),
        (["--dummy", "--thresholds", "1.5,x"], "--thresholds 1.5,x: give numbers separated by commas, as in 1.5"),
        (["--dummy", "--thresholds", "nan"], "--thresholds nan: give numbers of at least 0"),
        (["--dummy", "--reuse-limits", "2.5"], "--reuse-limits 2.5: give numbers separated by commas, as in 2,4,6"),
        (["--dummy", "--reuse-limits=-2"], "--reuse-limits -2: give numbers of at least 0"),
        (["--dummy", "--max-gap=-1"], "max_age is -1"),
    ],
)
def test_refused_with_a_message_that_helps(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *options, "--output", str(tmp_path / "made")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dqar-fx: error: ")
    for part in message.split(".*"):
        assert part in error
    assert not (tmp_path / "made").exists()
