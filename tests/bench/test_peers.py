from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from contest import child, contenders, models, race

import dqar_fx

CPU = torch.device("cpu")
#: Every column of the record of a contender that was measured.
COLUMNS = {
    "case", "model", "title", "cache", "compiled", "steps", "schedule", "dtype", "small", "runs", "cold_s", "second_s",
    "compute_ms", "reuse_ms", "generation_s", "iqr_s", "speedup", "speedup_rounds", "captures", "breaks", "recompiles",
    "cache_mib", "peak_mib", "rel_error", "psnr_db", "reuse", "bound", "of_bound", "host_ms", "to_pab", "bitwise_pab",
    "note", "reference", "device", "machine", "torch", "commit", "date",
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], Path]:
    """A small comparison through real processes, in one of which cache-dit cannot be imported."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "cache_dit.py").write_text("raise ImportError('no cache_dit here')\n")
    output = folder / "peers.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        peers.main(
            f"--models dit-256 --small --steps 8 --rounds 1 --threads 1 --baseline none --no-second --output {output} "
            "--contenders dqar-native pab dbcache".split()
        )
    return {row["case"]: row for row in map(json.loads, output.read_text().splitlines())}, output


def test_each_contender_that_ran_has_every_column(outcome: tuple[dict[str, dict[str, Any]], Path]) -> None:
    rows, output = outcome
    assert list(rows) == ["none", "dqar-native", "pab", "dbcache"]
    for name in ("none", "dqar-native", "pab"):
        assert set(rows[name]) == COLUMNS
    assert rows["none"]["reuse"] == 0
    assert rows["none"]["bound"] == 1
    assert rows["none"]["reuse_ms"] is None
    assert rows["dqar-native"]["captures"] == 1
    assert rows["dqar-native"]["rel_error"] > 0
    assert rows["dqar-native"]["generation_s"] > 0
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_pab_and_dqar_agree_bit_for_bit_in_processes_of_their_own(
    outcome: tuple[dict[str, dict[str, Any]], Path],
) -> None:
    rows, output = outcome
    ours, theirs = rows["dqar-native"], rows["pab"]
    assert ours["bitwise_pab"] is True
    assert ours["to_pab"] == 0
    for column in ("reuse", "bound", "cache_mib", "rel_error"):
        assert ours[column] == theirs[column]
    assert ours["reuse"] == dqar_fx.Schedule.parse(ours["schedule"]).plan(1).reuse_ratio
    assert "dqar-native agrees with pab bit for bit" in output.with_suffix(".txt").read_text()


def test_what_cannot_run_is_a_row_with_its_reason(outcome: tuple[dict[str, dict[str, Any]], Path]) -> None:
    rows, output = outcome
    assert "no cache_dit here" in rows["dbcache"]["note"]
    assert "speedup" not in rows["dbcache"]
    assert "no cache_dit here" in output.with_suffix(".txt").read_text()


def attentions_of(name: str, case: str, schedule: str, steps: int) -> tuple[list[int], torch.Tensor]:
    """How many attentions an eager contender computes at each step, and its sample."""
    sampler = models.Sampler(models.find(case, small=True), steps, CPU, torch.float32)
    kind, way = contenders.split(name)
    contender = kind(sampler, dqar_fx.Schedule.parse(schedule), way)
    counts = [0]
    contender.draw()  # what compiles does so now, without the counter
    with child.Work() as work:
        sample = contender.draw(lambda _: counts.append(work.attentions))
    return [after - before for before, after in itertools.pairwise(counts)], sample


@pytest.mark.parametrize(
    ("case", "every", "warmup", "steps"),
    [("dit-256", 3, 0.1, 10), ("pixart-4096", 2, 3, 6), ("flux", 3, 0.1, 6), ("wan", 4, 1, 6)],
)
def test_pab_follows_the_plan_and_gives_the_same_sample(case: str, every: int, warmup: float, steps: int) -> None:
    schedule = f"interval:steps={steps},every={every},warmup={warmup}"
    plan = dqar_fx.Schedule.parse(schedule).plan(1)
    counts, sample = attentions_of("pab", case, schedule, steps)
    ours, own_sample = attentions_of("dqar-native", case, schedule, steps)
    assert [count == 0 for count in counts] == plan.reuse[:, 0].tolist()
    assert ours == counts
    assert torch.equal(sample, own_sample)


def test_a_cast_model_is_one_that_dynamo_can_capture() -> None:  # a buffer that is a view kept the dtype of its base
    sampler = models.Sampler(models.find("pixart-4096", small=True), 2, CPU, torch.bfloat16)
    sampler.model.compile(backend="eager", fullgraph=True)
    assert sampler.draw(sampler.model).isfinite().all()


def test_firstblocks_threshold_gives_the_share_asked_for() -> None:
    residuals = [torch.full((4,), 1.1**step) for step in range(40)]  # each a tenth more than the one before
    threshold = contenders.threshold_for(0.5, residuals)
    assert 0.1 < threshold < 0.21  # one step is read, the next one is not
    assert contenders.threshold_for(0.0, residuals) < 0.1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pab", ("none", "none@whole")),
        ("pab@whole", ("none@whole", "none")),
        ("dbcache@blocks", ("none@blocks", "none@whole", "none")),
        ("dqar-kv@own", ("dqar-none@own", "none@whole", "none")),
    ],
)
def test_errors_are_measured_against_the_same_without_its_cache(name: str, expected: tuple[str, ...]) -> None:
    assert contenders.references(name) == expected


@pytest.mark.parametrize("name", ["nobody", "pab@sideways"])
def test_an_unknown_contender_is_refused_before_anything_runs(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Callable[..., Any] = pytest.fail
    monkeypatch.setattr(race.Race, "run", run)
    with pytest.raises(SystemExit):
        peers.main(["--contenders", name])
    assert name.partition("@")[0] in capsys.readouterr().err
