"""``dqar-fx bench``: a table and a file of what was measured, with and without a choice of sites."""

import json
from pathlib import Path

import pytest

from dqar_fx.cli import main

SMALL = json.dumps({"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8})
FAST = ("--config", SMALL, "--backend", "eager", "--rounds", "3", "--steps", "10")


@pytest.mark.parametrize("tuned", [True, False])
def test_it_prints_and_writes_what_it_measured(tuned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    arguments = ["bench", "DiTTransformer2DModel", *FAST, "--json", str(file), *(["--tune"] if tuned else [])]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert list(found["step_ms"]) == ["eager", "torch.compile", "nothing reused", "all reused"]
    assert all(name in out for name in found["step_ms"])
    assert f"{found['speedup']['median']:.3f}x as fast as torch.compile" in out
    assert (found["num_steps"], found["rounds"], found["dtype"]) == (10, 3, "float32")
    assert found["inputs"] == "hidden_states [1, 4, 8, 8], timestep [1], class_labels [1]"
    assert {"machine", "versions", "date", "parameters", "rounding_error"} <= set(found)
    assert len(found["costs"]) == (2 if tuned else 0)
    assert ("transformer_blocks.1.attn1" in out) == tuned
    if not tuned:  # all sites are kept, whatever they cost
        assert found["sites"] == {"num_sites": 2, "kept": [0, 1], "left": {}}
        assert found["reuse_ratio"] == 0.5
        assert 0 < found["rounding_error"] < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "2"], "rounds is 2. Give at least 3"),
        (["--threads", "0"], "--threads 0"),
        (["--schedule", "every=3"], "every=3"),
    ],
)
def test_what_has_no_meaning_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", "DiTTransformer2DModel", *FAST, *arguments, "--json", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert not file.exists()
