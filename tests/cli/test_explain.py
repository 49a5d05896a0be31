"""``dqar-fx explain``: what it prints is what it counted, and what it cannot do it says."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CaptureError, DqarError, PlanError, Schedule, ScheduleError, explanation
from dqar_fx.cli import explain
from dqar_fx.example_inputs import example_inputs
from dqar_fx.graph.flops import speedup_bound

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
DIT = {**HEADS, "num_layers": 2, "sample_size": 8, "norm_num_groups": 2}
# Class, config, further arguments, and the kind and number of exits of each site.
MODELS: dict[str, tuple[dict[str, Any], list[str], list[tuple[str, int]]]] = {
    "DiTTransformer2DModel": (DIT, [], [("self", 1)] * 2),
    "PixArtTransformer2DModel": (
        {**HEADS, "num_layers": 1, "sample_size": 8, "cross_attention_dim": 32, "caption_channels": 8},
        ["--text-tokens", "5"],
        [("self", 1), ("cross", 1)],
    ),
    "SD3Transformer2DModel": (
        {**HEADS, "num_layers": 2, "sample_size": 8, "caption_projection_dim": 32, "joint_attention_dim": 8},
        ["--text-tokens", "5"],
        [("joint", 2), ("joint", 1)],  # the last block has no use for its text
    ),
    "FluxTransformer2DModel": (
        {**HEADS, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 8, "axes_dims_rope": [4, 4, 8]},
        ["--size", "4", "--text-tokens", "5"],
        [("joint", 2), ("self", 1)],
    ),
    "WanTransformer3DModel": (
        {**HEADS, "num_layers": 1, "text_dim": 8, "ffn_dim": 32},
        ["--height", "8", "--width", "12", "--frames", "3"],
        [("self", 1), ("cross", 1)],
    ),
}


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    explain.add_arguments(parser)
    return explain.run(parser.parse_args(arguments))


def told(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "explained.json"
    assert run(*arguments, "--json", str(file)) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_found_and_the_numbers_agree(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, arguments, sites = MODELS[name]
    found = told(tmp_path, name, "--config", json.dumps(config), *arguments)
    assert found["model"] == name
    assert [(s["kind"], s["exits"]) for s in found["sites"]] == sites
    assert [s["index"] for s in found["sites"]] == list(range(len(sites)))
    assert found["captures"] == 1
    assert found["graph_breaks"] == found["left_computing"] == found["uncounted"] == found["advice"] == []
    assert found["attentions"] == found["attentions_captured"] == len(sites)
    shares = [s["flop_share"] for s in found["sites"]]
    assert all(share > 0 for share in shares)
    assert sum(shares) <= found["flop_share"] + 1e-9 < 1
    assert found["limit"] == pytest.approx(1 / (1 - found["flop_share"]))
    # Every site reuses at the same steps, so all that they share falls away with them.
    text = capsys.readouterr().out
    bound = 1 / (1 - found["planned_reuse_ratio"] * found["flop_share"])
    hoisted = found["hoisted"]
    if hoisted["values"]:  # ... and every step but the first is given what was computed once
        assert bound < found["bound"] < 1 / (1 / bound - hoisted["flop_share"])
        assert f"{hoisted['values']} values, {hoisted['bytes'] / 2**20:.2f} MiB per branch" in text
    else:
        assert found["bound"] == pytest.approx(bound)
    assert (hoisted["values"] > 0) == (name != "DiTTransformer2DModel")
    timed = found["timestep_values"]
    assert timed["values"] > 0
    if name == "DiTTransformer2DModel":
        assert timed["weight_share"] > 0.3  # adaLN: 40 % of the published ones, more of small ones
    assert f"{timed['values']} values, {timed['bytes'] / 2**20:.2f} MiB per branch: {timed['weight_share']:.1%}" in text
    assert found["cache_bytes"] == sum(s["cache_bytes"] for s in found["sites"])
    values = sum(s["native_bytes"] for s in found["sites"]) // 2  # of bfloat16
    assert values < found["cache_bytes"] < 2 * values
    for site in found["sites"]:
        assert site["path"] in text
        assert f"{site['flop_share']:.2%}" in text
    assert f"at most {found['bound']:.3f}x" in text


def test_the_model_that_ships_needs_no_config(tmp_path: Path) -> None:
    found = told(tmp_path, "digits")
    assert found["model"] == "DiTTransformer2DModel"
    assert found["inputs"] == "hidden_states [1, 1, 8, 8], timestep [1], class_labels [1]"
    assert len(found["sites"]) == 6


def test_a_folder_of_a_pipeline_or_a_model_or_a_file_will_do(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel", **DIT}))
    for path in (folder, folder / "transformer", folder / "transformer" / "config.json"):
        model = explanation.find_model(str(path), {"num_layers": 1})()
        assert isinstance(model, DiTTransformer2DModel)
        assert model.config["num_attention_heads"] == 2
        assert len(model.transformer_blocks) == 1  # what is given on top of a config counts


def test_schedule_steps_cache_and_sizes_change_what_is_told(tmp_path: Path) -> None:
    base = ("DiTTransformer2DModel", "--config", json.dumps({**DIT, "num_layers": 1}))
    found = told(tmp_path, *base)
    more = told(tmp_path, *base, "--schedule", "always:warmup=1", "--steps", "20", "--cache", "native", "--batch", "3")
    assert (found["num_steps"], more["num_steps"]) == (50, 20)
    assert more["bound"] > found["bound"]
    assert more["cache_bytes"] == more["native_bytes"] == 3 * found["native_bytes"]
    assert more["gflop_per_call"] == pytest.approx(3 * found["gflop_per_call"])
    larger = told(tmp_path, *base, "--size", "16")  # four times the tokens
    assert larger["native_bytes"] == 4 * found["native_bytes"]
    assert larger["flop_share"] > found["flop_share"]
    wider = told(tmp_path, *base, "--dtype", "float32")
    assert wider["native_bytes"] == 2 * found["native_bytes"]
    assert wider["cache_bytes"] == found["cache_bytes"]


def test_the_bound_follows_the_plan_step_by_step(tmp_path: Path) -> None:
    plan = Schedule.linear(10, warmup=0.2, fraction=1.0).plan(2)
    plan.save(tmp_path / "plan.json")
    base = ("DiTTransformer2DModel", "--config", json.dumps(DIT))
    found = told(tmp_path, *base, "--schedule", str(tmp_path / "plan.json"))
    shares = [round(1e12 * s["flop_share"]) for s in found["sites"]]
    saved = [sum(s for s, reused in zip(shares, row, strict=True) if reused) for row in plan.reuse]
    assert found["bound"] == pytest.approx(speedup_bound(10**12, saved))
    with pytest.raises(PlanError, match="2 sites and 10 steps"):
        run(*base, "--schedule", str(tmp_path / "plan.json"), "--steps", "11")


def test_what_will_hardly_pay_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("DiTTransformer2DModel", "--config", json.dumps({**DIT, "num_layers": 1}))
    (few,) = told(tmp_path, *base, "--steps", "8")["advice"]
    assert few.startswith("reuse will hardly pay in 8 steps")
    none = told(tmp_path, *base, "--schedule", "none")
    assert none["bound"] == 1.0
    assert "hardly pay" in none["advice"][0]
    assert f"note: {none['advice'][0]}" in capsys.readouterr().out


def test_sites_that_are_not_selected_are_listed_with_the_reason(tmp_path: Path) -> None:
    base = ("DiTTransformer2DModel", "--config", json.dumps(DIT))
    found = told(tmp_path, *base, "--sites", "*.1.*")
    assert [s["path"] for s in found["sites"]] == ["transformer_blocks.1.attn1"]
    assert found["left_computing"] == [
        {"path": "transformer_blocks.0.attn1", "kind": "self", "reason": "not selected by --sites"}
    ]
    with pytest.raises(CaptureError, match=r"--sites nothing matches none .*transformer_blocks\.0\.attn1"):
        run(*base, "--sites", "nothing")


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 4}
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.linear(hidden_states) * timestep


class Broken(NoAttention):
    """Its attentions stand behind a break and, the second, in a frame that Dynamo leaves alone."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.linear(hidden_states).unsqueeze(1)
        torch._dynamo.graph_break()
        x = x + nn.functional.scaled_dot_product_attention(self.linear(x), x, x)
        return x + eager_attention(x)


@torch._dynamo.disable
def eager_attention(x: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x, x, x)


def test_a_model_without_attention_is_an_error_that_says_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation, "find_model", lambda name, config: NoAttention)
    with pytest.raises(
        CaptureError, match=r"no attention was found in NoAttention: .*scaled_dot_product_attention nowhere"
    ):
        run("anything")


def test_breaks_and_attentions_outside_of_the_graphs_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(explanation, "find_model", lambda name, config: Broken)
    found = told(tmp_path, "anything")
    assert found["captures"] == 3
    assert len(found["sites"]) == found["attentions_captured"] == 1
    assert found["attentions"] == 2
    assert "1 of 2 attentions run outside of the captured graphs" in found["advice"][0]
    text = capsys.readouterr().out
    assert text.count("graph break: ") == 2
    assert "test_explain.py" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DiTTransformer2D", r"no model 'DiTTransformer2D'; did you mean DiTTransformer2DModel"),
        ("digit", r"did you mean digits\?"),
        ("FluxPipeline", r"'FluxPipeline' is no model class of diffusers"),
        ("UNet2DModel", r"UNet2DModel\.forward needs 'sample'"),
        ("LatteTransformer3DModel", r"cannot be built from its config: .*Set what is missing with --config"),
        ("RFD4ProteinaTransformer", r"RFD4ProteinaTransformer\.forward needs 'bb_ca'"),
    ],
)
def test_models_that_cannot_be_explained_are_named(name: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        run(name)


def test_a_model_that_looks_at_values_is_given_some_if_it_is_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {"num_layers": 1, "text_embed_dim": 8, "pooled_projection_dim": 8, "time_embed_dim": 16}
    base = ("MochiTransformer3DModel", "--config", json.dumps({**HEADS, **config}), "--size", "4", "--frames", "1")
    state = torch.get_rng_state()
    found = told(tmp_path, *base, "--text-tokens", "5")
    assert torch.equal(torch.get_rng_state(), state)
    assert found["graph_breaks"] == []
    monkeypatch.setattr(explanation, "MAX_PARAMETERS_ON_CPU", 1000)
    with pytest.raises(CaptureError, match=r"looks at values while it runs .*too large to be given random ones"):
        run(*base)


def test_bad_arguments_are_errors_of_the_family(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="intervall"):
        run("digits", "--schedule", "intervall")
    with pytest.raises(CaptureError, match=r"the config .* cannot be read"):
        run("digits", "--config", str(tmp_path / "nothing.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(CaptureError, match=r"is a list"):
        run("digits", "--config", str(tmp_path / "list.json"))
    with pytest.raises(CaptureError, match=r"no config\.json"):
        run(str(tmp_path))


def test_what_is_told_is_what_the_runtime_does(tmp_path: Path) -> None:
    config, arguments, _ = MODELS["PixArtTransformer2DModel"]
    found = told(tmp_path, "PixArtTransformer2DModel", "--config", json.dumps(config), *arguments, "--dtype", "float32")
    model = PixArtTransformer2DModel(**config).eval().requires_grad_(False)
    inputs = example_inputs(model, text_tokens=5)
    dqar_fx.optimize(model, Schedule.taper(50), backend="eager")
    runtime = dqar_fx.runtime(model)
    with torch.no_grad(), runtime.generation(num_steps=50):
        for step in range(5):  # the last step of the warm-up stores
            runtime.begin_step(step)
            model(**inputs)
        report = runtime.report().to_dict()
    keys = ("index", "path", "kind", "owner", "exits", "shapes", "planned_reuse", "cache_bytes")
    for site, real in zip(found["sites"], report["sites"], strict=True):
        assert {key: site[key] for key in keys} == {key: real[key] for key in keys}
    assert found["planned_reuse_ratio"] == report["planned_reuse_ratio"]
    assert found["cache_bytes"] + found["hoisted"]["bytes"] == report["cache_bytes"]
    for key in ("values", "bytes", "flop_share", "weight_share"):
        assert found["hoisted"][key] == report["hoisted"][key] > 0


def test_nothing_is_left_behind_that_a_later_compile_would_meet() -> None:
    run("DiTTransformer2DModel", "--config", json.dumps(DIT))
    model = DiTTransformer2DModel(**DIT).eval().requires_grad_(False)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([7]),
        "class_labels": torch.tensor([3]),
    }
    with torch.no_grad():
        expected = model(**inputs).sample
        model.compile(backend="eager", fullgraph=True)
        assert torch.equal(model(**inputs).sample, expected)


def test_calibrating_tells_the_errors_and_saves_a_balance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "digits.safetensors"
    found = told(tmp_path, "digits", "--calibrate", "--dtype", "float32", "--save-balance", str(file))["balance"]
    total = {(e["cache"], e["mode"]): e["relative_error"] for e in found["total"]}
    assert ("int8:channel", "plain") in total
    assert ("int8:channel", "dynamic") not in total
    for cache in ("int8:token", "int8:head", "int8:tensor", "int4:token", "int4:group32"):
        # Measured on 2026-11-21: between 0.46 and 0.69 of the error without.
        assert 0.3 < total[cache, "dynamic"] / total[cache, "plain"] < 0.75
        assert 0.3 < total[cache, "calibrated"] / total[cache, "plain"] < 0.8
    own = [e for e in found["sites"] if (e["cache"], e["mode"]) == ("int8:token", "plain")]
    assert [e["site"] for e in own] == [f"transformer_blocks.{i}.attn1" for i in range(6)]
    mean = sum(e["relative_error"] ** 2 for e in own) / 6
    assert total["int8:token", "plain"] == pytest.approx(mean**0.5)
    assert total["int8:token", "plain"] == pytest.approx(10 ** (-found["total"][0]["sqnr_db"] / 20))
    assert f"{total['int4:token', 'dynamic']:.3%}" in capsys.readouterr().out
    assert (found["calls"], found["unbalanced"]) == (10, [])
    assert dqar_fx.CacheConfig.parse(f"int4+balance={file}").balance.steps == 10


def test_a_folder_with_weights_is_run_on_noise_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config, _, _ = MODELS["FluxTransformer2DModel"]
    FluxTransformer2DModel(**config).save_pretrained(tmp_path / "pipe" / "transformer")
    base = (str(tmp_path / "pipe"), "--size", "4", "--text-tokens", "5", "--dtype", "float32", "--cache", "kv:int4")
    found = told(tmp_path, *base, "--calibrate")["balance"]
    assert {e["of"] for e in found["total"]} == {"value", "attention"}
    assert len({e["site"] for e in found["sites"]}) == 2
    text = capsys.readouterr().out
    assert "random latents and prompts at 10 timesteps: that is no generation" in text
    assert "kv:int4:token" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("DiTTransformer2DModel", "--calibrate"), "'DiTTransformer2DModel' names none: random ones have no salient"),
        (("digits", "--save-balance", "x"), "--save-balance is what --calibrate finds"),
        (("digits", "--calibrate", "--config", "{}"), "which --config would no longer fit"),
    ],
)
def test_what_cannot_be_calibrated_is_said(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(DqarError, match=message):
        run(*arguments)


def test_a_folder_without_weights_cannot_be_calibrated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel", **DIT}))
    with pytest.raises(CaptureError, match="its weights cannot be loaded"):
        run(str(tmp_path), "--calibrate")
