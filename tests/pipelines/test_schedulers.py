"""Schedulers of every kind: as many steps are planned as there are evaluations, and all planned reuse happens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import dqar_fx
from tests.pipelines.harness import (
    SCHEDULE,
    SETTINGS,
    build,
    call_of,
    expected,
    generate,
    plain,
    planned,
    reuse_by_step,
)

KARRAS = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm++ multistep": diffusers.DPMSolverMultistepScheduler,
    "dpm++ singlestep": diffusers.DPMSolverSinglestepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "lms": diffusers.LMSDiscreteScheduler,
}
FLOW = {
    "euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "lcm": diffusers.FlowMatchLCMScheduler,
    "dpm++ multistep": lambda: diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    ),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
}
CASES = [("dit", kind, make) for kind, make in KARRAS.items()] + [("sd3", kind, make) for kind, make in FLOW.items()]
STEPS = 5


every_scheduler = pytest.mark.parametrize(
    ("name", "make"), [case[::2] for case in CASES], ids=[f"{name}-{kind}" for name, kind, _ in CASES]
)


def evaluations(pipe: Any, call: Callable[[], Any]) -> int:
    """How often the transformer is called."""
    count = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        call()
    finally:
        handle.remove()
    return len(count)


@every_scheduler
def test_every_planned_reuse_happens_if_the_scheduler_is_given(name: str, make: Callable[[], Any]) -> None:
    pipe, call = build(name, steps=STEPS)
    pipe.scheduler = make()
    evaluated = evaluations(pipe, lambda: generate(pipe, call))
    dqar_fx.optimize(pipe.transformer, SCHEDULE, scheduler=pipe.scheduler, **SETTINGS)
    for seed in (0, 1):
        assert torch.equal(generate(pipe, call, seed), expected(pipe, name, call, seed))
        assert dqar_fx.runtime(pipe.transformer).plan.num_steps == evaluated
        assert reuse_by_step(pipe) == planned(pipe, [""])
        assert dqar_fx.runtime(pipe.transformer).stats.reused > 0


@functools.cache
def without_scheduler(name: str) -> Any:
    """A pipeline optimised without a word about its scheduler: it may take another one later."""
    pipe = build(name)[0]
    dqar_fx.optimize(pipe.transformer, SCHEDULE, **SETTINGS)
    return pipe


@every_scheduler
def test_without_the_scheduler_another_timestep_is_another_step_and_a_repeated_one_computes(
    name: str, make: Callable[[], Any]
) -> None:
    pipe, call = without_scheduler(name), call_of(name, steps=STEPS)
    pipe.scheduler = make()
    sample = generate(pipe, call)
    assert torch.equal(sample, expected(pipe, name, call, by_timestep=True))
    timesteps = pipe.scheduler.timesteps.tolist()
    never = timesteps[1::2] == timesteps[2::2]  # every evaluation but the first has a twin
    assert (dqar_fx.runtime(pipe.transformer).stats.reused == 0) == never
    assert torch.equal(sample, plain(pipe, name, call)) == never
