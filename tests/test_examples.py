"""Every example has a ``main`` and runs on a CPU; those that need a compiler take ``--backend eager``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINING = "train_digits", "train_digits_classifier"  # have tests of their own


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    """Dynamo counts the compilations of a function over the whole process; each test begins at zero."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_every_example_has_a_main_and_says_what_it_shows(name: str) -> None:
    module = load(name)
    assert callable(module.main)
    assert f"python examples/{name}.py" in (module.__doc__ or "")


def test_no_example_is_left_out() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "calibrate",
        "compile_backend",
        "dit",
        "gates",
        "keys_values",
        "minimal_loop",
        "own_model",
        "policy",
        "run_exported",
        *TRAINING,
    }


def test_dit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("dit").main(["--random", "--backend", "eager", "--steps", "6", "--output", str(tmp_path)])
    output = capsys.readouterr().out
    assert "reused 12 of 24 (50.0%)" in output
    assert "graph breaks 0" in output
    assert {path.name for path in tmp_path.iterdir()} == {"207.png", "387.png"}


# diffusers' sigma-based schedulers hand tensors to numpy 2 in a way that torch does not support yet.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_dit_with_another_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    load("dit").main(["--backend", "eager", "--steps", "6", "--sampler", "dpm"])
    assert "reused 12 of 24 (50.0%)" in capsys.readouterr().out


def test_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    load("own_model").main(["--backend", "eager"])
    *_, last = capsys.readouterr().out.splitlines()
    assert 0 < float(last.rpartition(" ")[2]) < 0.01


def test_own_model_needs_no_diffusers() -> None:
    assert "diffusers" not in (EXAMPLES / "own_model.py").read_text(encoding="utf-8").partition('"""\n\nfrom')[2]


def test_compile_backend(capsys: pytest.CaptureFixture[str]) -> None:
    load("compile_backend").main(["--backend", "eager", "--steps", "6"])
    output = capsys.readouterr().out
    assert "6 steps: computed 18 attentions, reused 18 (50.0%)" in output
    assert "1 graphs, 0 graph breaks" in output


def test_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("gates").main(["--backend", "eager", "--steps", "20", "--output", str(tmp_path)])
    rows = [line.rsplit(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()[-3:]]
    (alone, alone_db), (gated, gated_db), (keys_values, _) = ((int(r.rstrip("%")), float(db)) for r, db in rows)
    assert 0 < gated < alone == keys_values
    assert gated_db > alone_db
    assert (tmp_path / "decisions.png").stat().st_size > 5000


def test_minimal_loop(capsys: pytest.CaptureFixture[str]) -> None:
    load("minimal_loop").main([])
    lines = capsys.readouterr().out.splitlines()[2:]
    reused = {line.split("  ")[0]: int(line.partition(" of 72")[0].split()[-1]) for line in lines}
    errors = [float(line.partition(" of 72")[2].split()[0]) for line in lines]
    assert reused.pop("the schedule alone") == 66  # all but the first step of 12
    assert reused["at most 6 steps old"] == 60  # one refresh of each of the 6 layers, at step 7
    assert reused["read at most twice"] == 48  # two reads after each of the computes at steps 0, 3, 6 and 9
    assert all(0 < count < 66 for count in reused.values())
    assert reused["all of these"] == min(reused.values())
    assert errors[0] == max(errors)


def test_minimal_loop_compiles_nothing() -> None:
    text = (EXAMPLES / "minimal_loop.py").read_text(encoding="utf-8").partition('"""\n\nfrom')[2]
    assert "diffusers" not in text
    assert "compile" not in text


def test_calibrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    load("calibrate").main(["--backend", "eager", "--steps", "5", "--seeds", "2", "--output", str(path)])
    output = capsys.readouterr().out
    assert "53.3% reused" in output
    assert "reused 53%" in output
    assert '"calibration"' in path.read_text()


def test_keys_values(capsys: pytest.CaptureFixture[str]) -> None:
    load("keys_values").main(["--backend", "eager", "--steps", "6"])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows["int8"][:2] == ["6", "0"]
    assert rows["kv:int8"][:2] == rows["kv:native"][:2] == ["6", "3"]  # cross-attention on the prompt
    assert float(rows["kv:native"][3]) > float(rows["kv:native/int8"][3]) > float(rows["kv:int8"][3])
    assert 0 < float(rows["kv:native"][4]) < 0.1


def test_policy(capsys: pytest.CaptureFixture[str]) -> None:
    load("policy").main(["--backend", "eager", "--steps", "6", "--seeds", "3", "--runs", "6", "--images", "2"])
    output = capsys.readouterr().out
    assert "18 reads measured" in output
    assert " dB" in output
