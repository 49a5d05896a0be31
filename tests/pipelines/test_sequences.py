"""One pipeline, call after call: prompts, sizes, numbers of steps and batches change, and no call knows of another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pipelines.harness import DIFFUSERS_WARNS, call_of, expected, generate, optimized, planned, reuse_by_step

pytestmark = DIFFUSERS_WARNS

#: Of every kind of guidance, scheduler and latents some.
NAMES = [
    "auraflow", "cogvideox", "cosmos2", "dit", "flux", "helios", "hunyuan_dit", "hunyuan_image",
    "hunyuan_video15", "kandinsky5", "latte", "longcat_image", "ltx", "ltx2", "lumina", "pixart_sigma",
    "prx", "qwenimage", "sana", "sd3", "stable_audio", "wan", "z_image",
]  # fmt: skip
PROMPTS_AND_STEPS: list[dict[str, Any]] = [
    {}, {"prompt": 1}, {"steps": 4}, {"prompt": 1, "steps": 9}, {"steps": 1}, {"prompt": 2}, {},
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_numbers_of_steps_change_from_call_to_call(name: str) -> None:
    pipe = optimized(name)
    for request in PROMPTS_AND_STEPS:
        call = call_of(name, **request)
        assert torch.equal(generate(pipe, call), expected(pipe, name, call)), request


#: The same again with other shapes, for which the model is captured anew: of each kind one.
SHAPES: list[dict[str, Any]] = [
    {}, {"large": True}, {"batch": 2, "prompt": 1}, {"large": True, "batch": 3, "steps": 8}, {"guided": False}, {},
]  # fmt: skip
BRANCHES = {"dit": [""], "pixart_sigma": [""], "sd3": [""], "wan": ["cond", "uncond"], "flux": ["cond", "uncond"]}


@pytest.mark.parametrize("name", BRANCHES)
def test_sizes_and_batches_change_from_call_to_call_and_all_planned_reuse_happens(name: str) -> None:
    pipe = optimized(name)
    for request in SHAPES:
        call = call_of(name, **request)
        for seed in (0, 1):
            assert torch.equal(generate(pipe, call, seed), expected(pipe, name, call, seed)), request
            branches = BRANCHES[name] if request.get("guided", True) else BRANCHES[name][:1]
            assert reuse_by_step(pipe) == planned(pipe, branches), request
