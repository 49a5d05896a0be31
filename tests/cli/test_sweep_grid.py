"""``dqar-fx sweep --model``: what the texts stand for, what is written, and how an interrupted sweep goes on."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.container import BarContainer
from torch.nn.functional import scaled_dot_product_attention

from dqar_fx.cli import main, models, sweep_attention, sweep_grid, sweep_pictures, sweep_report, sweep_rows
from dqar_fx.cli.evaluation_runs import Task
from dqar_fx.gates import ChangeGate, EntropyGate, Gates, SnrGate

FAST = ("--model", "digits", "--steps", "5", "--images", "8", "--batch", "4", "--backend", "eager")


def test_braces_stand_for_all_their_values() -> None:
    assert sweep_grid.expand("interval:every={2,3},warmup={0.1,0.2}") == [
        "interval:every=2,warmup=0.1",
        "interval:every=2,warmup=0.2",
        "interval:every=3,warmup=0.1",
        "interval:every=3,warmup=0.2",
    ]
    assert sweep_grid.expand("taper") == ["taper"]
    assert sweep_grid.expand("{int8,native,int8}") == ["int8", "native"]


def test_gates_are_read_from_text() -> None:
    assert sweep_grid.parse_gates("none") is None
    expected = Gates(entropy=EntropyGate(2.0), snr=SnrGate(0.1), change=ChangeGate(0.2), max_age=6, max_reuse=4)
    assert sweep_grid.parse_gates("entropy=2,snr=0.1,change=0.2,max_age=6,max_reuse=4") == expected
    assert sweep_grid.parse_gates("change=0.1") == Gates(entropy=None, snr=None, change=ChangeGate(0.1))


def row(key: str, rule: str, speedup: float, psnr: float | None, **more: Any) -> dict[str, Any]:
    return {
        "key": key, "rule": rule, "schedule": key, "cache": "int8:token", "gates": "none", "flop_speedup": speedup,
        "measured_speedup": 1.0, "reuse_ratio": {"value": 0.5}, "reuse_by_step": [0.0, 1.0],
        "psnr_db": None if psnr is None else {"value": psnr}, "refresh": None, "deep_first": False, "warmup": 0.1,
        "fraction": 1.0, "frechet": None, **more,
    }  # fmt: skip


def test_a_typical_generation_leaves_out_what_interrupts_one() -> None:
    runs = [[0.1, 0.2, 9.0], [0.1, 7.0, 0.3], [8.0, 0.2, 0.3]]  # each 7 s and more, by one step each
    assert sweep_grid.typical(runs) == pytest.approx(0.6)
    assert sweep_grid.typical([[0.1, 0.2], [0.3, 0.2]]) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="shorter"):
        sweep_grid.typical([[0.1, 0.2], [0.1]])


def test_the_middle_may_lie_outside_of_single_runs() -> None:
    """It is made of single steps' medians, the runs are whole ones: no error bar may have a negative length."""
    rows = [
        row("a", "x", 1.1, 50, measured_speedups=[0.8, 0.9]),
        row("b", "x", 1.2, 45, measured_speedups=[1.1, 1.3]),
        row("c", "x", 1.3, 40, measured_speedups=[0.9, 1.2]),
    ]
    figure = sweep_pictures.bars(rows)
    assert figure is not None
    (axes,) = figure.axes
    measured = next(c for c in axes.containers if isinstance(c, BarContainer) and c.errorbar is not None)
    (lines,) = measured.errorbar.lines[2]
    ends = {tuple(float(x) for x in segment[:, 0]) for segment in lines.get_segments()}
    assert ends == {(0.8, 1.0), (1.0, 1.3), (0.9, 1.2)}


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    rows = [row("a", "x", 1.1, 50), row("b", "x", 1.2, 40), row("c", "x", 1.2, 45), row("d", "x", 1.05, 44)]
    rows += [row("e", "x", 1.3, 20), row("f", "x", 1.0, None)]
    assert sweep_rows.on_the_front(rows) == {"a", "c", "e"}


def test_a_sweep_measures_each_once_and_reports_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedules = ("--schedule", "linear:warmup={0.1,0.4},fraction={0.5,1.0}", "--schedule", "taper:first=3,last=1")
    command = ["sweep", *FAST, "--output", str(tmp_path)]
    assert main([*command, *schedules[:2]]) == 0
    assert "4 configurations, 0 of them measured before" in capsys.readouterr().out
    path = tmp_path / "sweep.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # cut short, as by a crash
    with path.open("a") as file:
        file.write("\n")
    assert main([*command, *schedules]) == 0
    assert "5 configurations, 3 of them measured before" in capsys.readouterr().out
    rows = sweep_grid.read(tmp_path)
    assert {key.split(" | ")[0].split(":")[0] for key in rows} == {"linear", "taper"}
    assert len(rows) == 5
    for each in rows.values():
        assert 1 < each["flop_speedup"] < 2
        assert each["reuse_ratio"]["value"] == pytest.approx(sum(each["reuse_by_step"]) / 5)
        assert each["psnr_db"]["value"] > 5
        assert each["frechet"]["to_baseline"]["value"] > 0
    ratios = {(r["warmup"], r["fraction"]): r["reuse_ratio"]["value"] for r in rows.values() if r["rule"] == "linear"}
    assert ratios[0.1, 1.0] > ratios[0.4, 1.0] > ratios[0.4, 0.5]
    page = (tmp_path / "report.html").read_text()
    pictures = {"pareto.png", "heat.png", "steps.png", "bars.png", "grid.png", "attention.png", "mismatch.png"}
    assert page.count("data:image/png;base64,") == len(pictures)
    assert page.count("<tr") == 6
    assert pictures <= {file.name for file in tmp_path.iterdir()}
    assert {file.stem for file in (tmp_path / "images").iterdir()} == {"baseline", *map(sweep_rows.file_name, rows)}
    assert not list(tmp_path.glob(".*.claim"))
    settings = json.loads((tmp_path / "sweep.json").read_text())["settings"]
    assert settings["images"] == 8
    assert (
        main(["sweep", *FAST[:-4], "--images", "4", "--batch", "2", "--backend", "eager", "--output", str(tmp_path)])
        == 2
    )
    assert "holds a sweep with other settings" in capsys.readouterr().err


def test_without_options_caches_and_gates_are_swept_as_well() -> None:
    def keys(*given: str) -> list[str]:
        parser = argparse.ArgumentParser()
        sweep_grid.add_arguments(parser)
        return [point.key for point in sweep_grid.points(parser.parse_args(["--model", "digits", *given]))]

    every, chosen = keys(), keys("--schedule", "taper")
    assert len(chosen) == 1
    assert {key.split(" | ")[1] for key in every} >= {"int8:token", "native", "int4:token", "kv:int8:token"}
    assert {key.split(" | ")[2] for key in every} >= {"none", "change=0.1", "entropy=2.3,max_reuse=4"}
    assert sum("warmup=0.2,fraction=1.0" in key and "native" in key for key in every) == 1


def test_ways_to_store_values_stand_side_by_side() -> None:
    rows = [row("a", "taper", 1.1, 50) | {"schedule": "taper"}, row("b", "taper", 1.2, 40) | {"schedule": "taper"}]
    assert sweep_report._stores(rows) == []  # one way only
    rows[1]["cache"] = "native"
    (section,) = sweep_report._stores(rows)
    assert "<td>int8:token</td><td>50.00 (1.10)</td>" in section
    assert "<td>native</td><td>40.00 (1.20)</td>" in section


def test_the_attentions_are_measured_without_reuse() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    steps = [(q, k, v), (q, k, 2 * v), (q, k + 1e-3, v), (q, 2 * k, v)]

    class Loop(models.Painter):
        def draw(self, *_: Any, on_step: Any, **__: Any) -> torch.Tensor:
            for given in steps:
                scaled_dot_product_attention(*given)
                on_step()
            scaled_dot_product_attention(*torch.randn(3, 1, 1, 7, 4).unbind())  # a decoder's
            return torch.zeros(1)

    task = Task(classes=[0], seeds=[0], steps=4, guidance=1.0, device=torch.device("cpu"), features=None)
    Loop.__abstractmethods__ = frozenset()
    found = sweep_attention.measure(task, Loop())
    assert [len(found[name]) for name in ("entropy", "change", "stale_output", "stale_keys")] == [4] * 4
    assert found["change"][0] == found["stale_keys"][1] == [None]
    assert found["change"][1] == [pytest.approx(0.5)]
    assert found["stale_output"][2][0] < 1e-3
    # fresh queries, the keys and values of step 1: twice the values
    expected = scaled_dot_product_attention(q, k, 2 * v) - scaled_dot_product_attention(q, 2 * k, v)
    assert found["stale_keys"][3][0] == pytest.approx(
        float(expected.norm() / scaled_dot_product_attention(q, 2 * k, v).norm())
    )
    weights = torch.tensor(found["maps"]["fresh"])
    assert weights.shape == (5, 5)
    assert torch.allclose(weights.sum(-1), torch.ones(5), atol=1e-3)


def test_what_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    with sweep_grid._claimed(tmp_path, "a") as first, sweep_grid._claimed(tmp_path, "a") as second:
        assert first
        assert not second
    with sweep_grid._claimed(tmp_path, "a") as again:
        assert again
    (tmp_path / "sweep.jsonl").write_text(json.dumps({"key": "a"}) + "\n")
    with sweep_grid._claimed(tmp_path, "a") as done:
        assert not done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "over which model"),
        (["--model", "digits", "--dummy"], "over which model"),
        (["--model", "digits", "--schedule", "sometimes"], "there is no schedule 'sometimes'"),
        (["--model", "digits", "--gates", "mood=3"], "there is no 'mood'"),
        (["--model", "digits", "--gates", "change"], "is not NAME=NUMBER"),
        (["--model", "digits", "--images", "7"], "a multiple of the batch"),
    ],
)
def test_it_refuses_what_has_no_meaning(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["sweep", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
