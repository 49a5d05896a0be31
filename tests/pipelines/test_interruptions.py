"""Calls that end early: the next call is as if they had never been."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dqar_fx
from dqar_fx import Schedule
from tests.pipelines.harness import DIFFUSERS_WARNS, MANY, SETTINGS, build, call_of, expected, generate, optimized

#: Pipelines that call back at the end of a step and can be interrupted there.
INTERRUPTIBLE = [
    "allegro", "auraflow", "chroma", "cogvideox", "cogview4", "cosmos", "flux", "helios", "hunyuan_image",
    "hunyuan_video", "latte", "ltx", "ltx2", "mochi", "qwenimage", "sana", "sd3", "wan", "z_image",
]  # fmt: skip
#: Pipelines that only an exception ends early.
OTHERS = ["dit", "pixart_sigma", "stable_audio"]

pytestmark = DIFFUSERS_WARNS


class StopError(Exception):
    """What a user's callback raises."""


def interrupting(at: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == at
        return tensors

    return callback


def raising(at: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise StopError
        return tensors

    return callback


@pytest.mark.parametrize("name", INTERRUPTIBLE)
def test_a_call_after_an_interrupted_one_is_as_if_that_had_never_been(name: str) -> None:
    pipe, call, other = optimized(name), call_of(name), call_of(name, prompt=1)
    wanted = {seed: expected_after_a_run(pipe, name, call, seed) for seed in (0, 1)}
    for at in (0, 1, 2, 3, 4):
        for interrupted in (call, other):
            seed = at % 2
            generate(pipe, {**interrupted, "callback_on_step_end": interrupting(at)}, seed=2)
            assert torch.equal(generate(pipe, call, seed), wanted[seed])


@pytest.mark.parametrize("name", INTERRUPTIBLE)
def test_a_call_after_one_whose_callback_raised_is_as_if_that_had_never_been(name: str) -> None:
    pipe, call, other = optimized(name), call_of(name), call_of(name, prompt=1)
    wanted = expected_after_a_run(pipe, name, call, 0)
    for at in (0, 1, 2, 4):
        for stopped in (call, other):
            with pytest.raises(StopError):
                generate(pipe, {**stopped, "callback_on_step_end": raising(at)}, seed=2)
            assert torch.equal(generate(pipe, call), wanted)


@pytest.mark.parametrize("name", OTHERS)
def test_a_call_after_one_whose_scheduler_raised_is_as_if_that_had_never_been(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call, other = optimized(name), call_of(name), call_of(name, prompt=1)
    wanted = expected_after_a_run(pipe, name, call, 0)
    for at in (1, 2, 3, 5):
        for stopped in (call, other):
            monkeypatch.setattr(pipe.scheduler, "scale_model_input", raising_after(at), raising=True)
            with pytest.raises(StopError):
                generate(pipe, stopped, seed=2)
            monkeypatch.undo()
            assert torch.equal(generate(pipe, call), wanted)


def raising_after(steps: int) -> Callable[..., Any]:
    """A scheduler's ``scale_model_input`` that raises where it is asked for the step after ``steps`` of them."""
    calls = []

    def raises(sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > steps:
            raise StopError
        return sample

    return raises


def expected_after_a_run(pipe: Any, name: str, call: dict[str, Any], seed: int) -> torch.Tensor:
    """What the oracle says; the pipeline runs once before, so that its sites are known."""
    generate(pipe, call)
    return expected(pipe, name, call, seed)


@functools.cache
def without_scheduler() -> Any:
    """A pipeline that changes an image, optimised without a word about its scheduler; its second step reuses."""
    pipe = build("sd3_img2img")[0]
    dqar_fx.optimize(pipe.transformer, Schedule.interval(MANY, every=3, warmup=1), **SETTINGS)
    return pipe


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("prompt", [0, 1], ids=["another prompt", "the same prompt"])
def test_a_run_that_begins_where_another_was_abandoned_reads_nothing_of_it(at: int, prompt: int) -> None:
    """Only timesteps and conditioning are known, and time moves on: steps may be counted on from the abandoned run."""
    pipe = without_scheduler()
    full = call_of("sd3_img2img", prompt=1) | {"strength": 1.0}
    generate(pipe, full | {"callback_on_step_end": interrupting(at)}, seed=2)
    late = call_of("sd3_img2img", prompt=prompt) | {"strength": 0.7 - 0.1 * at}
    sample = generate(pipe, late)
    alone = [expected(pipe, "sd3_img2img", late, by_timestep=True, first=step) for step in (0, at, at + 1)]
    assert any(torch.equal(sample, wanted) for wanted in alone)
