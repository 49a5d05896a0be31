"""What depends on the timestep, computed for all steps at once: real pipelines draw what they draw step by step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import dqar_fx
from dqar_fx.graph.lower import Lowerer
from dqar_fx.runtime import timestep_values
from tests.pipelines.builders import BUILDERS
from tests.pipelines.harness import DIFFUSERS_WARNS, SCHEDULE, SETTINGS, build, generate

pytestmark = DIFFUSERS_WARNS

#: The pipelines that hand over no view into the scheduler's timesteps: on a GPU, nothing is known ahead.
NO_VIEW = frozenset(
    {
        "auraflow", "chroma", "easyanimate", "flux", "flux2_klein", "flux_img2img", "flux_kontext", "helios_pyramid",
        "hunyuan_dit", "kandinsky5", "krea2", "longcat_audio", "longcat_image", "lumina", "ovis_image", "prx",
        "qwenimage", "qwenimage_img2img", "sana", "skyreels_v2_forcing",
    }
)  # fmt: skip
#: ... and those in which nothing pays, or that are more than one graph.
NOTHING = frozenset(
    {
        "allegro", "cosmos", "cosmos2", "hunyuan_image", "hunyuan_image_distilled", "hunyuan_video15", "lumina2",
        "stable_audio", "z_image", "z_image_img2img",
    }
)  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("on", ["host", "device"])
def test_pipelines_draw_the_same(name: str, on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, kwargs = build(name)
    cache = dataclasses.replace(SETTINGS["cache"], lossless=True)
    settings = {**SETTINGS, "cache": cache}
    dqar_fx.optimize(pipe.transformer, SCHEDULE, scheduler=pipe.scheduler, **settings)
    expected = [generate(pipe, kwargs, seed) for seed in (0, 1)]

    monkeypatch.setattr(Lowerer, "rounds_differently", True)
    if on == "device":  # where no value is read
        monkeypatch.setattr(timestep_values, "read_timestep", lambda _: None)
    torch._dynamo.reset()
    pipe, kwargs = build(name)
    dqar_fx.optimize(pipe.transformer, SCHEDULE, scheduler=pipe.scheduler, **settings)
    for seed, sample in enumerate(expected):
        found = generate(pipe, kwargs, seed)
        assert (found - sample).norm() < 1e-4 * sample.norm()
    timed = dqar_fx.runtime(pipe.transformer).report().to_dict()["timestep_values"]["values"] > 0
    assert timed == (name not in NOTHING and (on == "host" or name not in NO_VIEW))
