"""Videos made in sections or sizes, each denoised by itself: every one follows the plan, and none reads of another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pipelines.harness import (
    DIFFUSERS_WARNS,
    STEPS,
    call_of,
    expected,
    generate,
    optimized,
    plain,
    planned,
    reuse_by_step,
)

#: A builder, how often it denoises, the names of its calls at a step, and what it is asked for.
CASES: dict[str, tuple[str, int, list[str], dict[str, Any]]] = {
    "helios": ("helios", 2, ["cond", "uncond"], {}),
    "helios, two sizes": ("helios_pyramid", 4, ["cond", "uncond"], {}),
    "framepack": ("hunyuan_video_framepack", 2, [""], {"true_cfg_scale": 1.0}),
    "framepack, in order": ("hunyuan_video_framepack", 2, [""], {"true_cfg_scale": 1.0, "sampling_type": "vanilla"}),
}
every_case = pytest.mark.parametrize(("name", "sections", "branches", "given"), CASES.values(), ids=CASES)

pytestmark = DIFFUSERS_WARNS


class StopError(Exception):
    """What a user's callback raises."""


@every_case
def test_every_section_follows_the_plan(name: str, sections: int, branches: list[str], given: dict[str, Any]) -> None:
    pipe, call = optimized(name), call_of(name) | given
    seen = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == STEPS - 1:
            seen.append(reuse_by_step(pipe))
        return tensors

    sample = generate(pipe, call | {"callback_on_step_end": look})
    assert seen == [planned(pipe, branches)] * sections
    assert torch.equal(sample, expected(pipe, name, call))
    assert not torch.equal(sample, plain(pipe, name, call))


@every_case
@pytest.mark.parametrize("at", [2, STEPS - 1, STEPS + 1, STEPS + 3])
def test_a_call_after_one_that_ended_in_a_section_is_as_if_that_had_never_been(
    name: str, sections: int, branches: list[str], given: dict[str, Any], at: int
) -> None:
    pipe, call = optimized(name), call_of(name) | given
    seen = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        if len(seen) > at:  # counted through all sections
            raise StopError
        return tensors

    with pytest.raises(StopError):
        generate(pipe, call_of(name, prompt=1) | given | {"callback_on_step_end": stop}, seed=2)
    assert torch.equal(generate(pipe, call), expected(pipe, name, call))


@every_case
def test_the_number_of_sections_changes_from_call_to_call(
    name: str, sections: int, branches: list[str], given: dict[str, Any]
) -> None:
    pipe = optimized(name)
    for frames in (5, 15, 10):
        call = call_of(name) | given | {"num_frames": frames}
        assert torch.equal(generate(pipe, call), expected(pipe, name, call)), frames
