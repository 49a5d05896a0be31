"""``dqar-fx evaluate``: the numbers it writes are those of the images, and it says what they are of."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

import dqar_fx
from dqar_fx import digits
from dqar_fx.cli import main
from dqar_fx.evaluation import features, frechet_distance, squared_error, ssim
from dqar_fx.presets import PRESETS

STEPS, BATCH, SEEDS = 8, 8, (3, 4)
INTERVAL = "interval:every=2,warmup=1"


@pytest.fixture(autouse=True, scope="module")
def forget_compiled() -> Iterator[None]:
    """Dynamo counts the compilations of a function over the whole process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Evaluation(NamedTuple):
    folder: Path
    output: str
    record: dict[str, Any]

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.record["rows"] if row["name"] == name)


def run(folder: Path, *options: str) -> Evaluation:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        assert main(["--debug", "evaluate", "--backend", "eager", "--output", str(folder), *options]) == 0
    return Evaluation(folder, output.getvalue(), json.loads((folder / "evaluate.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def ablations(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("evaluate") / "made" / "anew"
    sizes = ("--steps", str(STEPS), "--images", "16", "--batch", str(BATCH), "--seed", "3")
    return run(folder, *sizes, "--ablations", "all", "--schedule", INTERVAL, "--no-timing")


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("timed")
    sizes = ("--steps", "3", "--images", "128", "--batch", "64", "--guidance", "1")
    return run(folder, *sizes, "--schedule", "always", "--cache", "native", "--rounds", "2", "--format", "markdown")


def batches(schedule: dqar_fx.Schedule | None) -> list[torch.Tensor]:
    model, scheduler = digits.load(), digits.make_scheduler()
    if schedule is not None:
        dqar_fx.optimize(model, schedule, scheduler=scheduler, backend="eager")
    classes = [i % 10 for i in range(BATCH)]
    drawn = [digits.sample(model, classes=classes, seed=seed, num_steps=STEPS, scheduler=scheduler) for seed in SEEDS]
    return [(images + 1) / 2 for images in drawn]


def test_the_numbers_are_those_of_the_images(ablations: Evaluation) -> None:
    plain, reused = batches(None), batches(dqar_fx.Schedule.parse(INTERVAL).with_steps(STEPS))
    row = ablations.row(f"{INTERVAL} int8:token")
    pairs = list(zip(reused, plain, strict=True))
    psnrs = [-10 * math.log10(float((a - b).double().square().mean())) for a, b in pairs]
    assert row["psnr_db"]["value"] == pytest.approx(sum(psnrs) / 2, rel=1e-6)
    # Student's t for two values: 12.706 times half their difference
    assert row["psnr_db"]["high"] - row["psnr_db"]["value"] == pytest.approx(
        12.706 * abs(psnrs[0] - psnrs[1]) / 2, rel=1e-3
    )
    assert row["ssim"]["value"] == pytest.approx(float(torch.cat([ssim(a, b) for a, b in pairs]).mean()), rel=1e-6)
    worst = max(float(squared_error(a, b).max()) for a, b in pairs)
    assert row["worst_image_psnr_db"] == pytest.approx(-10 * math.log10(worst), rel=1e-6)
    found, measure = row["frechet"], features.digits_features()
    drawn, references = measure(torch.cat(reused)), measure(torch.cat(plain))
    assert found["to_baseline"]["value"] == pytest.approx(frechet_distance(drawn, references), rel=1e-4)
    real = measure((digits.real_digits()[0] + 1) / 2)
    assert found["to_real"]["value"] == pytest.approx(frechet_distance(drawn, real), rel=1e-4)
    assert (found["images"], found["real_images"], found["dimension"]) == (16, 1797, 32)
    assert ablations.record["seeds"] == list(SEEDS)


def test_the_baseline_is_a_model_that_nothing_was_done_to(ablations: Evaluation) -> None:
    baseline = ablations.record["rows"][0]
    assert (baseline["name"], baseline["baseline"], baseline["identical"]) == ("eager", True, True)
    assert (baseline["schedule"], baseline["cache"], baseline["gates"]) == (None, None, None)
    assert baseline["reuse_ratio"] == {"value": 0, "low": 0, "high": 0}
    assert baseline["cache_mib"] == 0
    assert baseline["psnr_db"] is None
    assert baseline["relative_l2"]["value"] == 0
    assert baseline["ssim"]["value"] == pytest.approx(1)
    assert baseline["frechet"]["to_baseline"] is None
    assert baseline["frechet"]["to_real"]["value"] > 0


def test_the_ablations_differ(ablations: Evaluation) -> None:
    assert [row["name"] for row in ablations.record["rows"]] == ["eager", f"{INTERVAL} int8:token", *PRESETS[1:]]
    found = {name: ablations.row(name) for name in PRESETS[1:]}
    reuse = {name: row["reuse_ratio"]["value"] for name, row in found.items()}
    assert reuse["quant_cache_only"] == pytest.approx(7 / 8)
    assert len({round(value, 3) for value in reuse.values()}) == len(reuse)
    assert reuse["scheduling_only"] == pytest.approx(dqar_fx.Schedule.linear(STEPS).plan(6).reuse_ratio)
    assert [name for name, row in found.items() if row["gates"]] == ["entropy_gate_only", "full_dqar"]
    assert {name: row["cache"].partition(":")[0] for name, row in found.items()} == {
        "scheduling_only": "native",
        "entropy_gate_only": "native",
        "quant_cache_only": "int8",
        "full_dqar": "int8",
    }
    assert len({row["relative_l2"]["value"] for row in found.values()}) == len(found)
    # 6 attentions of 16 tokens and 128 channels, for the two halves of guidance
    assert found["quant_cache_only"]["cache_mib"] == pytest.approx(6 * 2 * BATCH * 16 * (128 + 4) / 2**20)
    assert all(row["peak_mib"] > row["cache_mib"] for row in found.values())


def test_what_is_printed(ablations: Evaluation, timed: Evaluation) -> None:
    rows = ablations.record["rows"]
    lines = ablations.output.splitlines()
    for row, line in zip(rows, lines[4:], strict=False):
        assert line.startswith(row["name"])
        assert f"{row['reuse_ratio']['value']:.1%}" in line
        assert "(too few)" in line  # 16 images of 32 features
    text = "\n".join(ablations.record["notes"])
    assert "TOO FEW IMAGES for 32 features" in text
    assert "FD: Fréchet distance of 16 images, features of a small classifier of digits (32)" in text
    assert "to the baseline's 16 and to 1797 real ones (scikit-learn's digits" in text
    assert "LPIPS cannot be measured" in text
    assert "window is 7 x 7" in text
    assert "95 % confidence over 2 seeds of 8 images" in text
    assert all(f"- {note}" in lines for note in ablations.record["notes"])
    assert "ms/step" not in ablations.output
    assert "| always native" in timed.output
    assert "too few" not in timed.output.lower()
    assert "no compiled baseline with --backend eager" in timed.output
    assert "Between 64 of the baseline's own images and 64 others it is " in timed.output


def test_times(ablations: Evaluation, timed: Evaluation) -> None:
    assert {row["ms_per_step"] for row in ablations.record["rows"]} == {None}
    eager, reusing = timed.record["rows"]
    assert eager["speedup_over_eager"] == 1
    assert reusing["speedup_over_eager"] == pytest.approx(eager["ms_per_step"] / reusing["ms_per_step"])
    assert eager["ms_per_step"] > 0
    assert reusing["speedup_over_compiled"] is None
    assert timed.record["machine"]["threads"] == torch.get_num_threads()


def test_the_files(ablations: Evaluation) -> None:
    names = {path.name for path in ablations.folder.iterdir()}
    assert {"evaluate.json", "evaluate.csv", "evaluate.png", "images-baseline.png"} < names
    assert "images-1-interval-every=2-warmup=1-int8-token.png" in names
    assert len(names) == 4 + 5
    with (ablations.folder / "evaluate.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for flat, row in zip(rows, ablations.record["rows"], strict=True):
        assert flat["name"] == row["name"]
        assert float(flat["reuse_ratio.value"]) == row["reuse_ratio"]["value"]
        assert float(flat["frechet.to_real.high"]) == row["frechet"]["to_real"]["high"]
        assert "psnr_db" not in flat
    assert rows[0]["psnr_db.value"] == ""
    with Image.open(ablations.folder / "evaluate.png") as image:
        assert image.width > 1500


def test_csv_json_and_real_images(tmp_path: Path) -> None:
    images, _ = digits.real_digits()
    (tmp_path / "real").mkdir()
    for number, image in enumerate(images[:3]):
        pixels = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "real" / f"{number}.png")
    options = ("--steps", "2", "--images", "4", "--batch", "4", "--no-timing", "--schedule", "always")
    found = run(tmp_path / "out", *options, "--format", "csv", "--real", str(tmp_path / "real"))
    assert found.output.strip() == (tmp_path / "out" / "evaluate.csv").read_text(encoding="utf-8").strip()
    row = found.record["rows"][1]
    assert row["frechet"]["real_images"] == 3
    assert row["psnr_db"]["low"] is None
    assert "One seed: no confidence interval" in "\n".join(found.record["notes"])
    drawn = (tmp_path / "out" / "images-baseline.png").stat().st_size
    assert drawn > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ablations", "all,ful"], "there is no 'all'.*baseline, scheduling_only"),
        (["--ablations", "baselin"], "there is no 'baselin'. Give 'all' or some of baseline"),
        (["--schedule", "sometimes"], "sometimes"),
        (["--cache", "int7"], "int7"),
        (["--images", "0"], "--images 0: give at least 1"),
        (["--images", "30", "--batch", "20"], "--images 30 is no multiple of --batch 20"),
        (["--clip", "x"], "--clip without --prompt"),
        (["--real", "/nowhere"], "--real /nowhere: there is no such folder"),
        (["--schedule", "PLAN", "--steps", "7"], "The plan is for 6 sites and 5 steps, but the run has"),
        (["--prompt", "digit {}", "--clip", "/nowhere"], "the CLIP score cannot be measured"),
        (["--features", "inception"], "InceptionV3's features cannot be measured"),
    ],
)
def test_refused_with_a_message_that_helps(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.fid", None)
    plan = tmp_path / "plan.json"
    dqar_fx.Schedule.always(5).plan(6).save(plan)
    options = [option.replace("PLAN", str(plan)) for option in options]
    assert main(["evaluate", *options, "--output", str(tmp_path / "made")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dqar-fx: error: ")
    for part in message.split(".*"):
        assert part in error
    assert not (tmp_path / "made").exists()


def test_a_plan_brings_its_number_of_steps(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    dqar_fx.Schedule.always(3).plan(6).save(plan)
    options = ("--images", "2", "--batch", "2", "--no-timing", "--features", "none", "--format", "json")
    found = run(tmp_path / "out", *options, "--schedule", str(plan), "--ablations", "baseline")
    assert json.loads(found.output) == found.record
    assert found.record["steps"] == 3
    baseline, reusing = found.record["rows"]
    assert reusing["name"] == "plan.json int8:token"
    assert reusing["reuse_ratio"]["value"] == pytest.approx(2 / 3)
    assert baseline["frechet"] is None
