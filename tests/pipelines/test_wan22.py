"""Wan 2.2: one transformer denoises the first steps, another the rest; each has a runtime and a cache of its own."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import dqar_fx
from tests.pipelines.harness import (
    ALL_WARMUP,
    SCHEDULE,
    SETTINGS,
    Oracle,
    generate,
    on_scheduler,
    planned,
    reads,
    reuse_by_step,
)
from tests.pipelines.kit import Request
from tests.pipelines.videos import wan22
from tests.runtime.test_memory import buffers

PARTS = ("transformer", "transformer_2")
#: The first step of the second transformer, and the ratio that says so for six steps (999, 937, 857, 750, 600, 376).
BOUNDARIES = {1: 0.95, 2: 0.9, 3: 0.8, 4: 0.7, 5: 0.5}
GUIDED = ["cond", "uncond"]


def call_of(**request: Any) -> dict[str, Any]:
    return wan22(Request(**request))[1]


@functools.cache
def eager() -> Any:
    """The eager pipeline, one for all tests."""
    return wan22()[0]


@functools.cache
def optimized() -> Any:
    """A pipeline whose transformers are both optimised, one for all tests."""
    pipe = wan22()[0]
    for part in PARTS:
        dqar_fx.optimize(getattr(pipe, part), SCHEDULE, scheduler=pipe.scheduler, **SETTINGS)
    return pipe


def with_boundary(ratio: float) -> Any:
    """The optimised pipeline; the eager one gets the same boundary."""
    for pipe in (optimized(), eager()):
        pipe.register_to_config(boundary_ratio=ratio)
    return optimized()


def expected(pipe: Any, call: dict[str, Any], seed: int = 0) -> Tensor:
    """By an oracle for each transformer that the call comes to."""
    reference = eager()
    firsts = {part: first for part, first in zip(PARTS, (0, boundary(pipe)), strict=True) if first < steps(pipe)}
    with on_scheduler(reference, pipe.scheduler), ExitStack() as stack:
        for part, first in firsts.items():
            runtime = dqar_fx.runtime(getattr(pipe, part))
            stack.enter_context(Oracle(reference, runtime.sites, runtime.schedule, first, part=part).replaying())
        return generate(reference, call, seed)


def steps(pipe: Any) -> int:
    """How many the last call had."""
    return len(pipe.scheduler.timesteps)


def boundary(pipe: Any) -> int:
    """The first step of the second transformer in the last call."""
    return int((pipe.scheduler.timesteps >= pipe.config.boundary_ratio * 1000).sum())


def assert_plans_are_followed(pipe: Any, branches: list[str]) -> None:
    """The first up to the boundary, the second from there on, where nothing is stored yet."""
    first = boundary(pipe)
    high = {key: row for key, row in planned(pipe, branches).items() if key[0] < first}
    low = planned(pipe, branches, first=first, part="transformer_2")
    low |= {(first, branch): [False] * len(low[first, branch]) for branch in branches}
    assert reuse_by_step(pipe) == high
    assert reuse_by_step(pipe, "transformer_2") == low


def test_nothing_reused_is_the_eager_pipeline_bit_for_bit() -> None:
    pipe, call = with_boundary(0.9), call_of(steps=ALL_WARMUP)
    sample = generate(pipe, call)
    assert boundary(pipe) == 1
    with on_scheduler(eager(), pipe.scheduler):
        assert torch.equal(sample, generate(eager(), call))


@pytest.mark.parametrize("first", BOUNDARIES)
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "alone"])
def test_both_follow_their_plans_wherever_the_second_takes_over(first: int, guided: bool) -> None:
    pipe, call = with_boundary(BOUNDARIES[first]), call_of(guided=guided)
    sample = generate(pipe, call)
    assert boundary(pipe) == first
    assert_plans_are_followed(pipe, GUIDED if guided else GUIDED[:1])
    assert torch.equal(sample, expected(pipe, call))
    assert torch.equal(sample, generate(pipe, call))


def test_boundaries_prompts_and_numbers_of_steps_change_from_call_to_call() -> None:
    pipe = optimized()
    for ratio, request in (
        (0.7, {}), (0.9, {}), (0.7, {"prompt": 1, "steps": 9}), (0.5, {"large": True, "batch": 2}),
        (0.8, {"guided": False}), (0.8, {"prompt": 2}), (0.7, {}),
    ):  # fmt: skip
        with_boundary(ratio)
        call = call_of(**request)
        sample = generate(pipe, call)
        assert_plans_are_followed(pipe, GUIDED if request.get("guided", True) else GUIDED[:1])
        assert torch.equal(sample, expected(pipe, call)), (ratio, request)


def test_a_transformer_that_a_call_does_not_come_to_keeps_out_of_it() -> None:
    pipe, call = with_boundary(0.7), call_of()
    generate(pipe, call)
    before = reuse_by_step(pipe, "transformer_2")
    with_boundary(0.3)  # the first alone
    sample = generate(pipe, call)
    assert reuse_by_step(pipe) == planned(pipe, GUIDED)
    assert reuse_by_step(pipe, "transformer_2") == before
    assert torch.equal(sample, expected(pipe, call))
    with_boundary(0.7)
    assert torch.equal(generate(pipe, call), expected(pipe, call))


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("prompt", [0, 1], ids=["the same prompt", "another prompt"])
def test_a_call_after_an_interrupted_one_is_as_if_that_had_never_been(at: int, prompt: int) -> None:
    pipe, call = with_boundary(0.8), call_of()

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == at
        return tensors

    generate(pipe, call_of(prompt=prompt) | {"callback_on_step_end": interrupt}, seed=2)
    assert torch.equal(generate(pipe, call), expected(pipe, call))
    assert_plans_are_followed(pipe, GUIDED)


def test_the_end_of_a_call_frees_what_both_have_stored() -> None:
    pipe = with_boundary(0.9)  # the second step of the first is stored for steps that it does not come to
    held = {}

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        held[step] = [len(buffers(getattr(pipe, part))) for part in PARTS]
        return tensors

    generate(pipe, call_of() | {"callback_on_step_end": look})
    assert held[1][0] > 0
    assert held[2][1] > 0
    assert [buffers(getattr(pipe, part)) for part in PARTS] == [[], []]


def test_the_library_reads_nothing_from_the_device() -> None:
    pipe, call = with_boundary(0.8), call_of()
    generate(pipe, call)
    mine = reads(pipe, call)
    assert mine <= reads(eager(), call)
