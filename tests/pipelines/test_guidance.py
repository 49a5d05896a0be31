"""Guidance: in one call, in two with and without names, off, and switched off in the middle: branches never mix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.callbacks import SD3CFGCutoffCallback

import dqar_fx
from dqar_fx import Schedule
from tests.pipelines.builders import BUILDERS
from tests.pipelines.harness import (
    DIFFUSERS_WARNS,
    SETTINGS,
    build,
    call_of,
    eager,
    expected,
    fresh,
    generate,
    optimized,
    plain,
    planned,
    reuse_by_step,
)

pytestmark = DIFFUSERS_WARNS

#: One call a step, named by the pipeline.
ONE_NAMED = ["cogvideox", "ltx", "ltx2", "mochi"]
#: Two calls a step, named by the pipeline.
TWO_NAMED = [
    "cogview4", "flux", "flux2_klein", "helios", "helios_pyramid", "hunyuan_video", "longcat_image", "ovis_image",
    "qwenimage", "skyreels_v2", "wan",
]  # fmt: skip
#: Two calls a step, named by a guider, which is a part of the pipeline.
TWO_GUIDED = ["hunyuan_image", "hunyuan_video15"]
#: One call a step that a guider names: it guides nothing.
ONE_GUIDED = ["hunyuan_image_distilled"]
#: Two calls a step, and nobody says which is which.
TWO_UNNAMED = [
    "chroma", "cosmos", "cosmos2", "flux_kontext", "hunyuan_video_framepack", "kandinsky5", "krea2", "longcat_audio",
    "lumina2",
]  # fmt: skip
#: They start in the middle: test_img2img has their tests.
LATE = [name for name in BUILDERS if name.endswith(("img2img", "video2video"))]
OTHERS = {*ONE_NAMED, *TWO_NAMED, *ONE_GUIDED, *TWO_GUIDED, *TWO_UNNAMED, *LATE, "skyreels_v2_forcing"}
#: All else: one call a step without a name, guidance in its batch.
ONE = [name for name in BUILDERS if name not in OTHERS]


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        *((name, [""]) for name in ONE),
        *((name, ["cond_uncond"]) for name in ONE_NAMED),
        *((name, ["cond", "uncond"]) for name in TWO_NAMED),
        *((name, ["pred_cond"]) for name in ONE_GUIDED),
        *((name, ["pred_cond", "pred_uncond"]) for name in TWO_GUIDED),
    ],
)
def test_all_planned_reuse_happens_in_every_branch(name: str, branches: list[str]) -> None:
    pipe, call = optimized(name), call_of(name)
    sample = generate(pipe, call)
    assert reuse_by_step(pipe) == planned(pipe, branches)
    assert not torch.equal(sample, plain(pipe, name, call))


@pytest.mark.parametrize("name", TWO_UNNAMED)
def test_two_calls_without_a_name_compute(name: str) -> None:
    pipe, call = optimized(name), call_of(name)
    assert torch.equal(generate(pipe, call), plain(pipe, name, call))
    assert dqar_fx.runtime(pipe.transformer).stats.reused == 0


ALONE = [*((name, "cond") for name in TWO_NAMED), *((name, "") for name in (*TWO_UNNAMED, "dit", "sd3"))]


@pytest.mark.parametrize(("name", "branch"), ALONE)
def test_without_guidance_all_planned_reuse_happens(name: str, branch: str) -> None:
    pipe, call = optimized(name), call_of(name, guided=False)
    sample = generate(pipe, call)
    assert torch.equal(sample, expected(pipe, name, call))
    assert reuse_by_step(pipe) == planned(pipe, [branch])


def with_guider(monkeypatch: pytest.MonkeyPatch, pipe: Any, name: str, **kwargs: Any) -> None:
    """A guider of the same kind with other settings, for ``pipe`` and for the eager pipeline each their own."""
    for each in (pipe, eager(name)):
        monkeypatch.setattr(each, "guider", each.guider.new(**kwargs))


@pytest.mark.parametrize("name", TWO_GUIDED)
def test_without_a_guider_all_planned_reuse_happens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = optimized(name), call_of(name)
    guided = generate(pipe, call)
    with_guider(monkeypatch, pipe, name, enabled=False)
    sample = generate(pipe, call)
    assert torch.equal(sample, expected(pipe, name, call))
    assert reuse_by_step(pipe) == planned(pipe, ["pred_cond"])
    assert not torch.equal(sample, guided)


@pytest.mark.parametrize("name", TWO_GUIDED)
@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.5, 1.0)], ids=["first half", "second half"])
def test_a_guider_for_a_part_of_the_steps_leaves_the_other_branch_as_it_was(
    name: str, start: float, stop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call = optimized(name), call_of(name)
    with_guider(monkeypatch, pipe, name, start=start, stop=stop)
    assert torch.equal(generate(pipe, call), expected(pipe, name, call))
    rows = reuse_by_step(pipe)
    uncond = {step: rows.pop((step, "pred_uncond")) for step, branch in list(rows) if branch == "pred_uncond"}
    assert rows == planned(pipe, ["pred_cond"])
    assert list(uncond) == list(range(round(start * 6), round(stop * 6)))
    assert not any(uncond[next(iter(uncond))])
    assert all(next(reversed(uncond.values())))


def guidance_becomes(scale: float, after: int) -> dict[str, Any]:
    """Arguments of a call whose guidance is switched once step ``after`` is done."""

    def switch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == after:
            pipe._guidance_scale = scale
        return tensors

    return {"callback_on_step_end": switch}


#: Pipelines that ask at every step whether there is guidance, rather than once.
SWITCHING = ["cogview4", "flux2_klein", "skyreels_v2", "wan"]


@pytest.mark.parametrize("name", SWITCHING)
@pytest.mark.parametrize("after", [1, 2])
def test_guidance_switched_off_leaves_the_other_branch_as_it_was(name: str, after: int) -> None:
    pipe, call = optimized(name), call_of(name) | guidance_becomes(1.0, after)
    assert torch.equal(generate(pipe, call), expected(pipe, name, call))
    guided = {key: row for key, row in planned(pipe, ["uncond"]).items() if key[0] <= after}
    assert reuse_by_step(pipe) == planned(pipe, ["cond"]) | guided


@pytest.mark.parametrize("name", [name for name in SWITCHING if name != "flux2_klein"])  # this one cannot switch it on
@pytest.mark.parametrize("after", [0, 1, 2])
def test_guidance_switched_on_computes_until_something_is_stored(name: str, after: int) -> None:
    pipe, call = optimized(name), call_of(name) | guidance_becomes(5.0, after)
    call["guidance_scale"] = 1.0
    assert torch.equal(generate(pipe, call), expected(pipe, name, call))
    rows = reuse_by_step(pipe)
    assert {key: row for key, row in rows.items() if key[1] == "cond"} == planned(pipe, ["cond"])
    assert not any(rows[after + 1, "uncond"])
    assert any(rows[5, "uncond"])


@pytest.fixture(scope="module")
def sd3() -> Any:
    """A pipeline that has seen no other batch yet, so that it is captured anew in the middle of a run."""
    return fresh("sd3")


@pytest.mark.parametrize("after", [2, 1, 3])
def test_a_batch_that_guidance_leaves_computes_and_then_reuses(sd3: Any, after: int) -> None:
    pipe = sd3
    call = call_of("sd3") | {
        "callback_on_step_end": SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=after),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    assert torch.equal(generate(pipe, call), expected(pipe, "sd3", call))
    rows = reuse_by_step(pipe)
    assert not any(rows[after + 1, ""])
    assert all(rows[5, ""])


@pytest.mark.parametrize(("name", "argument"), [("lumina2", "cfg_trunc_ratio"), ("z_image", "cfg_truncation")])
def test_guidance_for_a_part_of_the_steps_equals_the_oracle(name: str, argument: str) -> None:
    pipe, call = optimized(name), call_of(name) | {argument: 0.5}
    sample = generate(pipe, call)
    assert torch.equal(sample, expected(pipe, name, call))
    assert all(reuse_by_step_of_last(pipe))
    assert not torch.equal(sample, generate(pipe, call_of(name)))


def reuse_by_step_of_last(pipe: Any) -> list[bool]:
    """Which sites reused at the last step."""
    decisions = dqar_fx.runtime(pipe.transformer).stats.decisions
    return [decision.action == "reuse" for decision in decisions if decision.step == decisions[-1].step]


def test_a_second_call_that_leaves_layers_out_computes_and_mixes_with_nothing() -> None:
    pipe, call = optimized("sd3"), call_of("sd3")
    call |= {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.5}
    for _ in range(2):
        assert torch.equal(generate(pipe, call), expected(pipe, "sd3", call))
    assert all(reuse_by_step_of_last(pipe))
    all_layers = call_of("sd3")
    assert not torch.equal(generate(pipe, all_layers), expected(pipe, "sd3", call))
    assert torch.equal(generate(pipe, all_layers), expected(pipe, "sd3", all_layers))
    assert reuse_by_step(pipe) == planned(pipe, [""])


#: What LTX-2.3 adds to guidance by a prompt: another call a step, in which something is left out.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "uncond_modality": {"modality_scale": 3.0, "audio_modality_scale": 3.0},  # what pictures and sound see of another
    "uncond_stg": {"stg_scale": 1.0, "audio_stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1]},  # an attention
}


@pytest.mark.parametrize("kinds", [["uncond_modality"], ["uncond_stg"], list(LEFT_OUT)], ids="-".join)
def test_named_calls_that_leave_something_out_reuse_by_themselves(kinds: list[str]) -> None:
    pipe, call = optimized("ltx2"), call_of("ltx2")
    generate(pipe, call)
    sites = dqar_fx.runtime(pipe.transformer).sites
    guided = call | {name: value for kind in kinds for name, value in LEFT_OUT[kind].items()}
    sample = generate(pipe, guided)
    assert torch.equal(sample, expected(pipe, "ltx2", guided, sites=sites))
    reused = {(d.step, d.branch, d.action == "reuse") for d in dqar_fx.runtime(pipe.transformer).stats.decisions}
    assert reused == {(t, kind, t in {2, 3, 5}) for t in range(6) for kind in ("cond_uncond", *kinds)}
    assert torch.equal(generate(pipe, call), expected(pipe, "ltx2", call))


@pytest.mark.parametrize("ar_step", [0, 1], ids=["all at one level", "each at its own"])
def test_frames_that_are_denoised_together_or_one_after_another_equal_the_oracle(ar_step: int) -> None:
    """Diffusion forcing steps copies of its scheduler, so it is the timesteps that say which step it is."""
    pipe, call = build("skyreels_v2_forcing")
    call["ar_step"] = ar_step
    dqar_fx.optimize(pipe.transformer, Schedule.interval(50, every=3, warmup=2), **SETTINGS)
    sample = generate(pipe, call)
    assert torch.equal(sample, expected(pipe, "skyreels_v2_forcing", call, by_timestep=True))
    assert any(map(any, reuse_by_step(pipe).values()))
