"""A package gives what the live model gives, without this library; and what has no package is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, CaptureError, ExportError, Plan, PlanError, RuntimeStateError, Schedule
from dqar_fx.errors import DqarError
from dqar_fx.exporting.source import capture
from dqar_fx.exporting.steps import Step, steps_of, stored_tensors
from tests.families import SD3, Family
from tests.models import make_dit
from tests.tuning.test_tune import Model, Plain, inputs

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_exported.py"
STEPS = 6
#: Every other site reuses, in turn, and the last step computes everything.
MIXED = Schedule.custom(STEPS, lambda t, s, T, S: 0 < t < T - 1 and (t + s) % 3 != 0)
NATIVE = CacheConfig(dtype="native")
CACHES = [NATIVE, CacheConfig(target="kv"), CacheConfig(balance="dynamic")]
Given = Callable[[int], dict[str, Tensor]]


def live(model: nn.Module, given: Given, plan: Plan, cache: CacheConfig) -> list[Tensor]:
    """What the optimised model gives at every step."""
    dqar_fx.optimize(model, plan, cache=cache, backend="eager")
    runtime, found = dqar_fx.runtime(model), []
    constant = given(0)  # conditioned on the same memory throughout
    with torch.no_grad(), runtime.generation(plan.num_steps):
        for step in range(plan.num_steps):
            runtime.begin_step(step)
            changing = {k: v for k, v in given(step).items() if k in ("x", "hidden_states", "timestep")}
            result = model(**{**constant, **changing})
            found.append(result if isinstance(result, Tensor) else result.sample)
    assert runtime.stats.reused >= plan.reuse.sum()
    dqar_fx.restore(model)
    return found


def of_family(family: Family) -> Given:
    return lambda step: {
        "hidden_states": (1 + step) * family.noise(),
        "timestep": family.timestep(step, 2),
        **family.conditioning(),
    }


def in_order(spec: dict[str, Any], given: dict[str, Tensor]) -> list[Tensor]:
    return [given[wanted["path"][0]] for wanted in spec["inputs"]]


class Conditional:
    """A package with ``form="cond"``, as a user runs it."""

    def __init__(self, path: Path) -> None:
        self.spec = json.loads(path.with_suffix(".json").read_text())
        self.program = torch.export.load(path)
        self.module = self.program.module()
        self.stored = [torch.zeros(s["shape"], dtype=getattr(torch, s["dtype"])) for s in self.spec["stored"]]

    def __call__(self, row: str, given: dict[str, Tensor]) -> Tensor:
        reuse = torch.tensor([mark == "#" for mark in row])
        with torch.no_grad():
            (output,), self.stored = self.module(in_order(self.spec, given), self.stored, reuse)
        return output


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_one_graph_with_conditions_equals_the_live_model_bit_for_bit(cache: CacheConfig, tmp_path: Path) -> None:
    plan = MIXED.plan(4)
    path = dqar_fx.export(Model(), plan, inputs(), tmp_path / "model.pt2", form="cond", cache=cache)
    package = Conditional(path)
    got = [package(row, inputs(step)) for step, row in enumerate(package.spec["reuse"])]
    expected = live(Model(), inputs, plan, cache)
    assert all(map(torch.equal, got, expected))
    with torch.no_grad():
        assert not torch.equal(got[1], Model()(**inputs(1)))


def test_other_rows_than_those_of_the_plan_run_too(tmp_path: Path) -> None:
    given = of_family(SD3)  # joint attention: two exits, of the last block one
    model = SD3.make().requires_grad_(False)
    path = dqar_fx.export(model, Schedule.always(STEPS), given(0), tmp_path / "m.pt2", form="cond", cache=NATIVE)
    package = Conditional(path)
    plan = MIXED.plan(2)
    rows = ["".join(".#"[int(reused)] for reused in row) for row in plan.reuse]
    got = [package(row, given(step)) for step, row in enumerate(rows)]
    assert all(map(torch.equal, got, live(model, given, plan, NATIVE)))


def test_what_is_read_is_not_computed(tmp_path: Path) -> None:
    path = dqar_fx.export(Model(), Schedule.always(STEPS), inputs(), tmp_path / "m.pt2", form="cond")
    program = torch.export.load(path)

    def operators(gm: Any) -> list[str]:
        return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]

    def attends(gm: Any) -> bool:
        return any("attention" in name or "linear" in name for name in operators(gm))

    top = program.graph_module
    conditions = [node for node in top.graph.nodes if node.target is torch.ops.higher_order.cond]
    assert len(conditions) == 4
    assert not attends(top)
    for node in conditions:
        read, compute = (getattr(top, branch.target) for branch in node.args[1:3])
        assert attends(compute)
        assert not attends(read)


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_each_kind_of_step_equals_the_live_model_bit_for_bit(cache: CacheConfig) -> None:
    plan = MIXED.plan(4)
    source = capture(Model(), plan, (), inputs(), cache)
    stored = stored_tensors(source, range(4))
    buffers, weights = [each.value for each in stored], [value for _, value in source.weights.values()]
    kinds = {outcomes: Step(source, stored, outcomes) for outcomes in steps_of(source)}
    expected = live(Model(), inputs, plan, cache)
    for step, outcomes in enumerate(steps_of(source)):
        given = [inputs(step)[str(way[0])] for way, _ in source.inputs.values()]
        with torch.no_grad():
            (got,) = kinds[outcomes](given, weights, buffers)
        assert torch.equal(got, expected[step])


def test_a_package_runs_where_this_library_is_not_installed(tmp_path: Path) -> None:
    model = make_dit(layers=2).requires_grad_(False)
    plan = Schedule.always(3).plan(2)
    x, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 4])
    given = {"hidden_states": x, "timestep": torch.full((2,), 500), "class_labels": labels}
    # The wrapper's speed is no matter here, but how long it compiles.
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = dqar_fx.export(model, plan, given, tmp_path / "dit.pt2", options=options)
    spec = json.loads(path.with_suffix(".json").read_text())
    assert spec["steps"] == ["step_0", "step_1", "step_1"]
    assert spec["reuse"] == ["..", "##", "##"]
    assert [each["name"] for each in spec["stored"][:2]] == ["site 0, exit 0, values", "site 0, exit 0, scales"]
    assert {str(name).split(".")[0] for name in spec["weights"]} >= {"transformer_blocks", "proj_out_1"}
    code = (
        "import runpy, sys; sys.modules['dqar_fx'] = None; "
        f"main = runpy.run_path({str(EXAMPLE)!r})['main']; files = [{str(path)!r}, '--output', 'samples.pt']\n"
        "main([*files, '--classes', '3,4'])\n"
        "try: main([*files, '--classes', '3'])\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 steps, 2 compiled models -> samples.pt" in done.stdout
    assert "['class_labels'] is ([1], 'torch.int64', 'cpu'), and the package was exported for" in done.stdout

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    dqar_fx.optimize(model, plan, backend="eager", scheduler=scheduler)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, timestep=t.expand(2), class_labels=labels).sample, t, x).prev_sample
    assert dqar_fx.runtime(model).stats.reused == 4
    got = torch.load(tmp_path / "samples.pt")
    assert float((got - x).norm() / x.norm()) < 2e-4  # other kernels, and INT8 rounds either way where they differ


class Returning(nn.Module):
    """An attention whose result is joined by an input as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.to_out = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_out(F.scaled_dot_product_attention(x, x, x)), x


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"inputs": {**inputs(), "x": torch.ones(2, 3)}}, ExportError, r"cannot run the inputs x \[2, 3\].*RuntimeErr"),
        ({"inputs": {"x": inputs()["x"]}}, ExportError, "missing a required argument: 'timestep'"),
        ({"inputs": {**inputs(), "y": 1}}, ExportError, "unexpected keyword argument 'y'"),
        ({"inputs": [1]}, ExportError, "inputs is a list"),
        ({"plan": MIXED.plan(3)}, PlanError, "3 sites and 6 steps, but the run has 4"),
        ({"plan": "taper"}, RuntimeStateError, "schedule is a str"),
        ({"path": "model.bin"}, ExportError, "'model.bin'. torch loads packages whose name ends in .pt2"),
        ({"form": "onnx"}, ExportError, "form is 'onnx'. Use 'steps' or 'cond'"),
        ({"cache": CacheConfig(device="cpu")}, ExportError, "cache.device is 'cpu'"),
        ({"cache": CacheConfig(target="kv", balance="dynamic")}, ExportError, "blocks.0.attn1: balanced keys"),
        ({"options": {"max_autotune": True}}, ExportError, "options are Inductor's"),
        ({"model": Model(breaks=True)}, ExportError, "Model is not one graph.*graph_break"),
        ({"model": Plain(), "inputs": {"x": torch.zeros(2)}}, CaptureError, "no attention was found"),
        ({"model": Returning(), "inputs": {"x": torch.zeros(1, 4, 8)}}, ExportError, r"hands back a tensor \(1, \["),
    ],
)  # fmt: skip
def test_what_has_no_package_is_refused(
    change: dict[str, Any], kind: type[DqarError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"model": Model(), "plan": MIXED, "inputs": inputs(), "path": "model.pt2", "form": "cond", **change}
    with pytest.raises(kind, match=message):
        dqar_fx.export(**settings)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_optimised_is_refused_and_one_that_was_exported_is_as_it_was(tmp_path: Path) -> None:
    model = Model()
    attributes = dict(vars(model))
    dqar_fx.export(model, MIXED, inputs(), tmp_path / "model.pt2", form="cond")
    assert vars(model) == attributes
    dqar_fx.optimize(model, MIXED, backend="eager")
    with pytest.raises(RuntimeStateError, match="optimised already"):
        dqar_fx.export(model, MIXED, inputs(), tmp_path / "model.pt2")
