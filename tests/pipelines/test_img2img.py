"""Pipelines that change a picture start in the middle of the schedule: the plan is followed from there on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dqar_fx
from tests.pipelines.harness import (
    call_of,
    eager,
    expected,
    first_step,
    fresh,
    generate,
    on_scheduler,
    optimized,
    planned,
    reuse_by_step,
)

#: Each with the names of its calls.
CASES = {
    "cogvideox_video2video": ["cond_uncond"],
    "flux_img2img": [""],
    "qwenimage_img2img": ["cond", "uncond"],
    "sd3_img2img": [""],
    "wan_video2video": [""],
    "z_image_img2img": [""],
}
#: Guided, these make two calls that nobody names, and compute.
UNNAMED = ["flux_img2img", "wan_video2video"]
STRENGTHS = [1.0, 0.9, 0.7, 0.5, 0.35, 0.2]


def planned_from(pipe: Any, name: str, call: dict[str, Any]) -> dict[tuple[int, str], list[bool]]:
    """The plan from the step at which ``call`` starts, where nothing is stored yet."""
    with on_scheduler(eager(name), pipe.scheduler):
        first = first_step(eager(name), call)
    wanted = planned(pipe, CASES[name], first=first)
    return wanted | {(first, branch): [False] * len(wanted[first, branch]) for branch in CASES[name]}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_run_that_starts_late_computes_first_and_then_follows_the_plan(name: str, strength: float) -> None:
    pipe, call = optimized(name), call_of(name, guided=name not in UNNAMED, steps=9) | {"strength": strength}
    assert torch.equal(generate(pipe, call), expected(pipe, name, call))
    assert reuse_by_step(pipe) == planned_from(pipe, name, call)
    assert dqar_fx.runtime(pipe.transformer).plan.num_steps == 9


@pytest.mark.parametrize("name", ["flux_img2img", "sd3_img2img"])
def test_another_batch_size_and_strength_follow_the_plan_as_well(name: str) -> None:
    """The model is captured for the second batch where that run starts, in the middle of the schedule."""
    pipe = fresh(name)
    for batch, large, strength in ((1, False, 1.0), (2, False, 0.5), (2, True, 0.9), (1, False, 0.7)):
        call = call_of(name, guided=name not in UNNAMED, steps=9, batch=batch, large=large) | {"strength": strength}
        sample = generate(pipe, call)
        assert reuse_by_step(pipe) == planned_from(pipe, name, call), (batch, large, strength)
        assert torch.equal(sample, expected(pipe, name, call)), (batch, large, strength)
