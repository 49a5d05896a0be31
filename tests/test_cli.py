"""The command line: exit codes, messages that help, and numbers in ``demo.json`` that agree with one another."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import dqar_fx
from dqar_fx.cli import COMMANDS, main, models

ROOT = Path(__file__).parents[1]
FAST = ("--backend", "eager", "--steps", "6")


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    """Dynamo counts the compilations of a function over the whole process; each test begins at zero."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Demo(NamedTuple):
    folder: Path
    output: str
    record: dict[str, Any]


def run_demo(folder: Path, *options: str) -> Demo:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        assert main(["--debug", "demo", *FAST, "--rounds", "1", "--output", str(folder), *options]) == 0
    return Demo(folder, output.getvalue(), json.loads((folder / "demo.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run_demo(tmp_path_factory.mktemp("demo") / "made" / "anew", "--per-class", "2")


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ``DiTPipeline`` as ``save_pretrained`` writes it."""
    specification = importlib.util.spec_from_file_location("example_dit", ROOT / "examples" / "dit.py")
    assert specification is not None
    assert specification.loader is not None
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    folder = tmp_path_factory.mktemp("pipeline")
    example.random_pipeline().save_pretrained(folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that fails with exit code 2."""
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("dqar-fx: error: ")
    assert "Traceback" not in output.err
    return output.err


def decoded(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


class TestMain:
    def test_python_m_lists_the_commands(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "dqar_fx", "--help"], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        assert all(re.search(rf"^  +{command}$|^  +{command} ", done.stdout, re.MULTILINE) for command in COMMANDS)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            main(["--version"])
        assert left.value.code == 0
        assert capsys.readouterr().out == f"dqar-fx {dqar_fx.__version__}\n"

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_help(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        assert f"dqar-fx {command}" in capsys.readouterr().out

    @pytest.mark.parametrize("argv", [[], ["dance"], ["demo", "--dance"], ["demo", "--seed", "x"]])
    def test_a_mistake_in_the_arguments_exits_with_2(self, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 2
        assert "usage: dqar-fx" in capsys.readouterr().err

    @pytest.mark.parametrize("argv", [["--debug", "demo", "--steps", "0"], ["demo", "--steps", "0", "--debug"]])
    def test_debug_shows_the_traceback(self, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "Traceback" in error
        assert "dqar-fx: error: --steps 0" in error


class TestRefused:
    """What can be known to be wrong is said before anything is drawn."""

    @pytest.mark.parametrize("command", ["demo", "generate"])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--schedule", "intervall:every=3"], "there is no schedule 'intervall'.*interval"),
            (["--schedule", "interval:each=3"], "interval has no 'each'"),
            (["--schedule", "missing.json"], "missing.json"),
            (["--cache", "int9"], "CacheConfig.dtype is 'int9'"),
            (["--model", "nonsense"], "no such folder.*'digits'.*facebook/DiT-XL-2-256"),
            (["--classes", "3,x"], "--classes 3,x: give class numbers"),
            (["--classes", "3,10"], "10 is out of range. Classes go from 0 to 9"),
            (["--steps", "0"], "--steps 0: give at least 1"),
            (["--guidance", "nan"], "--guidance nan: give 0 or more"),
        ],
    )
    def test_with_a_message_that_helps(
        self, command: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        error = refused(capsys, command, "--output", str(tmp_path / "made.png"), *options)
        assert re.search(message, error), error

    @pytest.mark.skipif(torch.backends.mps.is_available(), reason="the device is there")
    def test_a_device_that_is_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        error = refused(capsys, "demo", "--device", "mps", "--output", str(tmp_path))
        assert "--device mps" in error
        assert "cpu" in error

    @pytest.mark.parametrize("option", ["--rounds", "--per-class", "--threads"])
    def test_counts_below_one(self, option: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert f"{option} 0: give at least 1" in refused(capsys, "demo", option, "0")

    def test_a_picture_that_is_no_png(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "ends in .png" in refused(capsys, "generate", "--output", "digits.gif")

    def test_a_folder_without_a_pipeline(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        error = refused(capsys, "generate", "--model", str(tmp_path))
        assert "model_index.json" in error
        assert "save_pretrained" in error

    def test_a_hub_that_cannot_be_reached(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import diffusers

        def unreachable(*args: object, **kwargs: object) -> None:
            raise ConnectionError("no route to host\nand so on")

        monkeypatch.setattr(diffusers.DiTPipeline, "from_pretrained", unreachable)
        error = refused(capsys, "generate", "--model", "someone/something")
        assert "no route to host" in error
        assert "hf download someone/something" in error

    def test_a_plan_for_another_number_of_steps(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        plan = dqar_fx.Schedule.interval(8).plan(6).save(tmp_path / "plan.json")
        assert "8 steps" in refused(capsys, "generate", "--schedule", str(plan), "--steps", "6")


class TestDemo:
    def test_numbers_agree_with_the_plan(self, demo: Demo) -> None:
        record, plan = demo.record, dqar_fx.Schedule.parse(models.SCHEDULE).plan(6, 6)
        eager, compiled, reusing = record["contenders"]
        assert [row["name"] for row in record["contenders"]] == ["eager", "torch.compile", "dqar_fx"]
        assert reusing["reuse_ratio"] == plan.reuse_ratio == record["report"]["planned_reuse_ratio"]
        assert record["report"]["reused"] == plan.reuse.sum()
        assert record["report"]["steps"] == record["steps"] == 6
        assert eager["reuse_ratio"] == compiled["reuse_ratio"] == 0
        # Six sites of 40 (two images of ten classes, guided) x 16 tokens x 128 channels: one byte each, and a scale.
        assert reusing["cache_kib"] == 6 * 40 * 16 * (128 + 4) / 1024
        assert record["images"] == 20

    def test_speed_is_against_the_compiled_baseline(self, demo: Demo) -> None:
        _, compiled, reusing = demo.record["contenders"]
        assert compiled["speedup"] == 1
        assert reusing["speedup"] == pytest.approx(compiled["ms_per_step"] / reusing["ms_per_step"])
        assert reusing["ms_per_step"] * 6 / 1e3 == pytest.approx(sum(reusing["seconds_of_each_round"]))  # one round
        assert demo.record["speedup_by_flop"] > 1

    def test_images_are_compared_with_the_compiled_baseline(self, demo: Demo) -> None:
        eager, compiled, reusing = demo.record["contenders"]
        assert eager["identical_images"]  # the backend "eager" changes no bit
        assert compiled["identical_images"]
        assert not reusing["identical_images"]
        assert 20 < reusing["psnr_db"] < 80
        assert reusing["worst_image_psnr_db"] <= reusing["psnr_db"]
        assert compiled["agreement"] > 0.5

    def test_machine_and_versions_are_told(self, demo: Demo) -> None:
        assert demo.record["versions"]["torch"] == torch.__version__
        assert demo.record["machine"]["device_name"]
        assert dqar_fx.Schedule.parse(demo.record["schedule"]) == dqar_fx.Schedule.taper(6)
        assert dqar_fx.CacheConfig.parse(demo.record["cache"]) == dqar_fx.CacheConfig()

    def test_pictures_can_be_opened_and_show_something(self, demo: Demo) -> None:
        for name in ("images.png", "plan.png"):
            pixels = decoded(demo.folder / name)
            assert min(pixels.shape[:2]) > 300
            assert pixels.std() > 10

    def test_says_what_to_look_at(self, demo: Demo) -> None:
        *_, last = demo.output.splitlines()
        assert last.startswith("Look at ")
        for name in ("images.png", "plan.png", "demo.json"):
            assert str(demo.folder / name) in last

    def test_a_plan_from_a_file_that_reuses_nothing_is_no_gain(self, tmp_path: Path) -> None:
        plan = dqar_fx.Schedule.none(6).plan(6).save(tmp_path / "plan.json")
        demo = run_demo(tmp_path, "--schedule", str(plan), "--classes", "7", "--per-class", "1", "--guidance", "1")
        assert demo.record["contenders"][2]["identical_images"]
        assert demo.record["speedup_by_flop"] == 1
        assert "Nothing was reused" in demo.output

    def test_a_pipeline_from_a_folder(self, pipeline_folder: Path, tmp_path: Path) -> None:
        demo = run_demo(tmp_path, "--model", str(pipeline_folder), "--classes", "207,387")
        reusing = demo.record["contenders"][2]
        assert reusing["reuse_ratio"] == dqar_fx.Schedule.parse(models.SCHEDULE).plan(4, 6).reuse_ratio
        assert reusing["agreement"] is None
        assert "classes right" not in demo.output
        assert not demo.record["report"]["left_computing"]


class TestGenerate:
    def test_a_grid_of_digits_and_a_report(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "new" / "digits.png"
        assert main(["generate", *FAST, "--classes", "3,1,4", "--report", "--output", str(path)]) == 0
        pixels = decoded(path)
        assert pixels.ndim == 2
        assert pixels.shape[1] > 3 * 128 > 3 * pixels.shape[0] / 2
        output = capsys.readouterr().out
        assert f"{path}: 3 images, 50.0% of the attentions reused" in output
        assert "transformer_blocks.5.attn1" in output

    def test_the_seed_and_the_cache_change_the_picture(self, tmp_path: Path) -> None:
        pictures = []
        for number, options in enumerate([[], ["--seed", "1"], ["--cache", "int8:tensor"]]):
            torch._dynamo.reset()
            path = tmp_path / f"{number}.png"
            assert main(["generate", *FAST, "--classes", "8,8", "--output", str(path), *options]) == 0
            pictures.append(path.read_bytes())
        assert len(set(pictures)) == 3

    def test_a_pipeline_from_a_folder(self, pipeline_folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "images.png"
        argv = ["generate", *FAST, "--model", str(pipeline_folder), "--classes", "1", "--output", str(path)]
        assert main(argv) == 0
        assert decoded(path).shape[2] == 3


def test_twins_share_their_weights_and_nothing_else() -> None:
    painter = models.load(models.DIGITS, torch.device("cpu"))
    twin = painter.twin()
    assert twin.denoiser is not painter.denoiser
    assert twin.scheduler is not painter.scheduler
    own, other = dict(painter.denoiser.named_parameters()), dict(twin.denoiser.named_parameters())
    assert own.keys() == other.keys()
    assert all(own[name] is other[name] for name in own)
