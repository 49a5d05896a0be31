"""``dqar-fx evaluate``: the numbers it writes are those of the images, and it says what they are of."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

import dqar_fx
from dqar_fx import digits
from dqar_fx.cli import evaluate, main, models
from dqar_fx.evaluation import features, frechet_distance, squared_error, ssim
from dqar_fx.presets import PRESETS

STEPS, BATCH, SEEDS = 8, 8, (3, 4)
INTERVAL = "interval:every=2,warmup=1"
SOME = "baseline,scheduling_only,quant_cache_only"  # each is captured, which takes seconds; 'all' is planned below


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
    return run(folder, *sizes, "--ablations", SOME, "--schedule", INTERVAL, "--no-timing")


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("timed")
    dqar_fx.Schedule.always(3).plan(6).save(folder / "plan.json")
    sizes = ("--images", "64", "--batch", "32", "--guidance", "1", "--rounds", "2")
    return run(folder, *sizes, "--schedule", str(folder / "plan.json"), "--cache", "native", "--format", "markdown")


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
    change = found["to_real"]["value"] - frechet_distance(references, real)
    assert found["change_to_real"]["value"] == pytest.approx(change, rel=1e-3)
    width = {name: found[name]["high"] - found[name]["value"] for name in ("to_real", "change_to_real")}
    assert width["change_to_real"] != pytest.approx(width["to_real"])  # of the same seeds, not of two independent sets
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
    names = [row["name"] for row in ablations.record["rows"]]
    assert names == ["eager", f"{INTERVAL} int8:token", "scheduling_only", "quant_cache_only"]
    linear, always = ablations.row("scheduling_only"), ablations.row("quant_cache_only")
    assert linear["reuse_ratio"]["value"] == pytest.approx(dqar_fx.Schedule.linear(STEPS).plan(6).reuse_ratio)
    assert always["reuse_ratio"]["value"] == pytest.approx(7 / 8)
    assert (linear["cache"], always["cache"]) == ("native", "int8:token")
    assert always["relative_l2"]["value"] > linear["relative_l2"]["value"] > 0
    # 6 attentions of 16 tokens and 128 channels, for the two halves of guidance
    assert always["cache_mib"] == pytest.approx(6 * 2 * BATCH * 16 * (128 + 4) / 2**20)
    assert all(row["peak_mib"] > row["cache_mib"] for row in (linear, always))


def test_all_ablations_are_the_presets() -> None:
    args = argparse.Namespace(ablations="all", schedule=None, cache=None, steps=20)
    configurations, steps = evaluate._configurations(args)
    assert steps == 20
    assert [each.name for each in configurations] == list(PRESETS[1:])  # the baseline is no configuration of the pass
    for each in configurations:
        assert each.arguments == dqar_fx.preset(each.name, 20)
    args.ablations, args.schedule, args.cache = None, ["always", INTERVAL, "always"], ["int8", "native"]
    assert [each.name for each in evaluate._configurations(args)[0]] == [
        f"{schedule} {cache}" for schedule in ("always", INTERVAL) for cache in ("int8:token", "native")
    ]


def test_plans_of_one_name_in_two_folders(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "plan.json" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        dqar_fx.Schedule.always(5).plan(6).save(path)
    args = argparse.Namespace(ablations=None, schedule=[str(path) for path in paths], cache=["native"], steps=None)
    configurations, steps = evaluate._configurations(args)
    assert [each.name for each in configurations] == [f"{path} native" for path in paths]
    assert steps == 5


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
    assert "| plan.json native" in timed.output
    assert "too few" not in timed.output.lower()
    assert "no compiled baseline with --backend eager" in timed.output


def test_times(ablations: Evaluation, timed: Evaluation) -> None:
    assert {row["ms_per_step"] for row in ablations.record["rows"]} == {None}
    eager, reusing = timed.record["rows"]
    assert eager["speedup_over_eager"] == 1
    assert reusing["speedup_over_eager"] == pytest.approx(eager["ms_per_step"] / reusing["ms_per_step"])
    assert eager["ms_per_step"] > 0
    assert reusing["speedup_over_compiled"] is None
    assert timed.record["steps"] == 3  # the plan's
    assert reusing["reuse_ratio"]["value"] == pytest.approx(2 / 3)
    assert timed.record["machine"]["threads"] == torch.get_num_threads()


def test_the_files(ablations: Evaluation) -> None:
    names = {path.name for path in ablations.folder.iterdir()}
    assert {"evaluate.json", "evaluate.csv", "evaluate.png", "images-baseline.png"} < names
    assert "images-1-interval-every=2-warmup=1-int8-token.png" in names
    assert len(names) == 4 + 3
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


def test_csv_and_real_images(tmp_path: Path) -> None:
    images, _ = digits.real_digits()
    (tmp_path / "real").mkdir()
    for number, image in enumerate(images[:3]):
        pixels = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).resize((24, 16)).save(tmp_path / "real" / f"{number}.png")
    options = ("--ablations", "baseline", "--steps", "1", "--images", "64", "--batch", "64", "--no-timing")
    found = run(tmp_path / "out", *options, "--format", "csv", "--real", str(tmp_path / "real"))
    assert found.output.strip() == (tmp_path / "out" / "evaluate.csv").read_text(encoding="utf-8").strip()
    (row,) = found.record["rows"]
    assert row["frechet"]["real_images"] == 3
    assert row["ssim"] == {"value": pytest.approx(1), "low": None, "high": None}
    assert row["frechet"]["to_real"]["high"] is None
    assert "One seed: no confidence interval" in "\n".join(found.record["notes"])


def test_two_halves_of_the_baseline_are_some_way_apart(tmp_path: Path) -> None:
    options = ("--ablations", "baseline", "--steps", "1", "--images", "128", "--batch", "64", "--no-timing")
    found = run(tmp_path, *options)
    model, measure = digits.load(), features.digits_features()
    classes = [i % 10 for i in range(64)]
    halves = [measure((digits.sample(model, classes=classes, seed=s, num_steps=1) + 1) / 2) for s in (0, 1)]
    distance = frechet_distance(*halves)
    assert f"Between 64 of the baseline's own images and 64 others it is {distance:.3g}." in found.output


def test_two_images_of_two_seeds_leave_no_interval_of_a_distance(tmp_path: Path) -> None:
    options = ("--ablations", "baseline", "--steps", "1", "--images", "2", "--batch", "1", "--no-timing")
    found = run(tmp_path / "out", *options)
    (row,) = found.record["rows"]
    assert row["frechet"]["to_real"]["value"] > 0
    assert "of the baseline's own images" not in found.output  # too few for that
    assert row["frechet"]["to_real"]["high"] is None
    assert row["relative_l2"]["high"] == 0


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small DiT pipeline of 16 x 16 images in a folder."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline")
    DiTPipeline(model, vae, DDIMScheduler()).save_pretrained(folder)
    return str(folder)


def test_a_pipeline(pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    options = ("--model", pipeline, "--steps", "3", "--images", "4", "--batch", "2", "--no-timing", "--classes", "1,2")
    found = run(tmp_path / "out", *options, "--schedule", "always", "--format", "json")
    assert json.loads(found.output) == found.record
    _, row = found.record["rows"]
    assert row["reuse_ratio"]["value"] == pytest.approx(2 / 3)
    assert 0 < row["ssim"]["value"] < 1
    assert (row["agreement"], row["frechet"], row["lpips"]) == (None, None, None)
    notes = "\n".join(found.record["notes"])
    assert "No Fréchet distance: InceptionV3's features cannot be measured" in notes
    assert "LPIPS cannot be measured: its network wants" in notes
    assert "the images have 16 x 16" in notes


def test_names_of_classes_for_prompts() -> None:
    labels = {"cat": 1, "dog": 2}
    transformer = SimpleNamespace(config=SimpleNamespace(sample_size=8))
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(8, 8, 8, 8)))
    painter = models.Pipeline(SimpleNamespace(labels=labels, transformer=transformer, vae=vae), "x")
    assert (painter.size, painter.class_name(2)) == (64, "dog")
    with pytest.raises(models.CommandError, match=r"no name for class 3\. Write it out"):
        painter.class_name(3)
    assert models.Digits(torch.device("cpu")).class_name(7) == "7"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ablations", "all,ful"], "there is no 'all'.*baseline, scheduling_only"),
        (["--ablations", "baselin"], "there is no 'baselin'. Give 'all' or some of baseline"),
        (["--schedule", "sometimes"], "sometimes"),
        (["--cache", "int7"], "int7"),
        (["--images", "0"], "--images 0: give at least 1"),
        (["--images", "30", "--batch", "20"], "--images 30 is no multiple of --batch 20"),
        (["--images", "1", "--batch", "1"], "--images 1: a Fréchet distance wants at least 2"),
        (["--real", ".", "--features", "none"], "--real with --features none"),
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
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    plan = tmp_path / "plan.json"
    dqar_fx.Schedule.always(5).plan(6).save(plan)
    options = [option.replace("PLAN", str(plan)) for option in options]
    assert main(["evaluate", *options, "--output", str(tmp_path / "made")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dqar-fx: error: ")
    for part in message.split(".*"):
        assert part in error
    assert not (tmp_path / "made").exists()
