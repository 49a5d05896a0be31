"""What is exact is read at every step after the first, for as long as it is exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, Schedule
from dqar_fx.runtime.lossless import constant_inputs
from tests.families import NUM_STEPS
from tests.graph.conftest import WIDTH, Attention, tokens
from tests.graph.test_lossless import Cross
from tests.runtime.test_keys_values import MODELS, sampled

STEPS = 6
#: Reuses the first site (the latents' own attention) at step 3 only.
SCHEDULE = Schedule.custom(STEPS, lambda step, site, *_: step == 3 and site == 0)
#: Reuses no site but the prompt's: at a step at which the value is read anyway.
PROMPT_ONLY = Schedule.custom(STEPS, lambda step, site, *_: step == 3 and site == 1)
INPUTS = [tokens() for _ in range(STEPS)]


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = Attention(), Cross()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.own(hidden_states) * timestep
        return x + self.cross(x, encoder_hidden_states.tanh())


pytestmark = pytest.mark.usefixtures("fresh_inference")


@pytest.mark.parametrize(
    ("sources", "latents", "constant"),
    [
        (["L['x']", "L['t']", "L['y']"], "x", {"L['y']"}),
        (["L['y']", "L['t']", "L['x']"], "x", {"L['y']"}),  # in the order in which the graph reads them
        (["L['x']", "L['t']", "L['y']"], "", {"L['y']"}),
        (["L['kwargs']['x'][0]", "L['kwargs']['t']", "L['kwargs']['caps'][0]"], "x", {"L['kwargs']['caps'][0]"}),
        (["L['args'][0]", "L['args'][1]", "L['kwargs']['caps']"], "x", {"L['kwargs']['caps']"}),
        (["L['x']", "L['self']._buffers['table']", "G['table']", "s0"], "x", set()),
        (["L['hidden_states']", "L['added']['resolution']", "L['added']['noise']"], "x", {"L['added']['resolution']"}),
    ],
)
def test_the_inputs_that_stay_are_told_by_name(sources: list[str], latents: str, constant: set[str]) -> None:
    assert constant_inputs(sources, latents) == constant


def pair(schedule: Schedule = PROMPT_ONLY, **cache: Any) -> tuple[nn.Module, nn.Module]:
    """An eager model, and its copy, optimised."""
    eager, model = Denoiser().eval(), Denoiser().eval()
    model.load_state_dict(eager.state_dict())
    return eager, dqar_fx.optimize(model, schedule, cache=CacheConfig("kv", **cache), backend="eager")


def call(model: nn.Module, step: int, prompt: Tensor) -> Tensor:
    result: Tensor = model(INPUTS[step], torch.tensor(float(STEPS - step)), prompt)
    return result


def actions(model: nn.Module, site: int = 1) -> list[str]:
    return [f"{d.action} {d.reason}" for d in dqar_fx.runtime(model).stats.decisions if d.site == site]


READ = ["compute warmup", *["reuse reuse"] * (STEPS - 1)]


@pytest.mark.parametrize("dtype", ["native", "int8"])
def test_it_is_read_at_every_step_after_the_first_and_changes_no_bit(dtype: str) -> None:
    eager, model = pair(dtype=dtype)
    prompt = tokens(length=4)
    for step in range(STEPS):
        assert torch.equal(call(model, step, prompt), call(eager, step, prompt))
    first, *later = actions(model)
    assert first.startswith("compute")
    assert later == ["reuse reuse"] * (STEPS - 1)
    assert not any(a.startswith("reuse") for a in actions(model, site=0))
    # In the model's own dtype, whatever the rest is stored in: 2 samples, 4 tokens, keys and values of float32.
    assert dqar_fx.runtime(model).stats.cache_bytes == 2 * 2 * 4 * WIDTH * 4


def test_the_schedule_still_decides_for_the_others() -> None:
    eager, model = pair(SCHEDULE, dtype="native")
    prompt = tokens(length=4)
    same = [torch.equal(call(model, step, prompt), call(eager, step, prompt)) for step in range(STEPS)]
    assert same == [step != 3 for step in range(STEPS)]
    assert [a.startswith("reuse") for a in actions(model, site=0)] == [step == 3 for step in range(STEPS)]
    assert [a.startswith("reuse") for a in actions(model)] == [step > 0 for step in range(STEPS)]


@pytest.mark.parametrize("way", ["another tensor", "written into"])
@pytest.mark.parametrize("change", range(1, STEPS))
def test_another_prompt_in_the_middle_of_a_generation_is_computed(way: str, change: int) -> None:
    eager, model = pair(dtype="native")
    prompt = tokens(length=4)
    with dqar_fx.runtime(model).generation(STEPS):  # where conditioning is not compared
        for step in range(STEPS):
            if step == change and way == "written into":
                prompt.mul_(2)
            elif step == change:
                prompt = prompt + 1
            assert torch.equal(call(model, step, prompt), call(eager, step, prompt)), step
        computed = [step for step, action in enumerate(actions(model)) if action.startswith("compute")]
    assert computed == [0, change]


def test_a_prompt_made_anew_at_every_step_computes() -> None:
    eager, model = pair(dtype="native")
    prompt = tokens(length=4)
    with dqar_fx.runtime(model).generation(STEPS):
        for step in range(STEPS):
            assert torch.equal(call(model, step, prompt.clone()), call(eager, step, prompt))
        assert not any(a.startswith("reuse") for a in actions(model))


def test_a_view_made_anew_of_the_same_memory_is_read() -> None:
    eager, model = pair(dtype="native")
    prompts = tokens(length=8)
    for step in range(STEPS):
        assert torch.equal(call(model, step, prompts[:, :4]), call(eager, step, prompts[:, :4]))
    assert sum(a.startswith("reuse") for a in actions(model)) == STEPS - 1


def test_changed_weights_are_seen() -> None:
    eager, model = pair(dtype="native")
    prompt = tokens(length=4)
    for step in range(STEPS):
        if step == 2:
            for changed in (eager, model):
                changed.cross.kv.weight.mul_(1.5)
        assert torch.equal(call(model, step, prompt), call(eager, step, prompt)), step


def test_branches_do_not_see_each_other() -> None:
    eager, model = pair(dtype="native")
    prompts = {"cond": tokens(length=4), "uncond": tokens(length=4)}
    runtime = dqar_fx.runtime(model)
    for step in range(STEPS):
        for name, prompt in prompts.items():
            with runtime.branch(name):
                assert torch.equal(call(model, step, prompt), call(eager, step, prompt))
    assert sum(a.startswith("reuse") for a in actions(model)) == 2 * (STEPS - 1)


def test_inference_tensors_follow_the_schedule_as_no_write_into_them_is_seen() -> None:
    eager, model = pair(dtype="native")
    with torch.inference_mode():
        prompt = tokens(length=4)
        for step in range(STEPS):
            if step == 2:
                prompt.mul_(2)
            found = call(model, step, prompt)
            assert torch.equal(found, call(eager, step, prompt))
    assert [a.startswith("reuse") for a in actions(model)] == [step == 3 for step in range(STEPS)]


def test_what_was_stored_of_inference_tensors_is_not_taken_for_that_of_others() -> None:
    """The prompt of the first steps comes back after one whose writes cannot be seen."""
    schedule = Schedule.custom(STEPS, lambda step, site, *_: step == 4 and site == 0)
    eager, model = pair(schedule, dtype="native")
    prompt = tokens(length=4)
    with torch.inference_mode():
        other = tokens(length=4)
    with dqar_fx.runtime(model).generation(STEPS):
        for step in range(STEPS):
            given = other if step == 2 else prompt
            found, fresh = call(model, step, given), call(eager, step, given)
            assert step == 4 or torch.equal(found, fresh), step
        assert [a.startswith("reuse") for a in actions(model)] == [False, True, False, False, True, True]


@pytest.mark.parametrize(("schedule", "lossless"), [(PROMPT_ONLY, False), (Schedule.none(STEPS), True)])
def test_it_can_be_switched_off_and_a_baseline_computes_everything(schedule: Schedule, lossless: bool) -> None:
    _, model = pair(schedule, dtype="native", lossless=lossless)
    prompt = tokens(length=4)
    for step in range(STEPS):
        call(model, step, prompt)
    reused = [step for step, a in enumerate(actions(model)) if a.startswith("reuse")]
    assert reused == ([] if lossless else [3])
    assert dqar_fx.runtime(model).sites[1].lossless is lossless


def test_the_next_generation_stores_its_own() -> None:
    eager, model = pair(dtype="native")
    for _ in range(2):
        prompt = tokens(length=4)
        for step in range(STEPS):
            assert torch.equal(call(model, step, prompt), call(eager, step, prompt))
        assert sum(a.startswith("reuse") for a in actions(model)) == STEPS - 1
    report = dqar_fx.runtime(model).report()
    assert [site["lossless"] for site in report.to_dict()["sites"]] == [False, True]
    assert "exact" in str(report)


@pytest.mark.parametrize("name", ["Wan", "PixArt"])
def test_in_diffusers_models_the_prompt_is_projected_once(name: str) -> None:
    """Nothing else reuses, so that the model gives what it gives eagerly; the prompt is handed on as it is."""
    family = MODELS[name]
    schedule = Schedule.custom(NUM_STEPS, lambda step, site, *_: step == 3 and site == 1)
    inputs = family.inputs(2, 8, 0)
    held = dataclasses.replace(family, inputs=lambda batch, size, prompt: inputs)
    model = held.optimized(schedule, cache=CacheConfig("kv"), fullgraph=True)
    assert torch.equal(sampled(held, model), sampled(held, held.make()))
    sites = dqar_fx.runtime(model).sites
    assert [(site.kind, site.lossless) for site in sites] == [("self", False), ("cross", True)] * 2
    reused = [d.site for d in dqar_fx.runtime(model).stats.decisions if d.action == "reuse"]
    assert reused == [1, 3] * (NUM_STEPS - 1)
    stats = dqar_fx.runtime(model).stats
    assert (stats.captures, stats.graph_breaks) == (1, 0)
