"""Attentions within the prompt, read at every step after the first: to the bit what the schedule alone gives."""

import dataclasses

import pytest
import torch

import dqar_fx
from tests.pipelines.harness import SCHEDULE, SETTINGS, build, generate

#: What in these attends to the prompt alone: a refiner or a pooler of its embedding.
PROMPT = {
    "hunyuan_video": "refiner_blocks",
    "mochi": "pooler",
    "hunyuan_dit": "pooler",
}


# Mochi asks for an autocast that a CPU has not.
@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", PROMPT)
def test_reading_what_is_exact_changes_no_bit(name: str) -> None:
    samples, reused = [], []
    for lossless in (True, False):
        torch._dynamo.reset()
        pipe, kwargs = build(name)
        cache = dataclasses.replace(SETTINGS["cache"], lossless=lossless)
        dqar_fx.optimize(pipe.transformer, SCHEDULE, scheduler=pipe.scheduler, **{**SETTINGS, "cache": cache})
        samples.append(generate(pipe, kwargs))
        runtime = dqar_fx.runtime(pipe.transformer)
        exact = [site.index for site in runtime.sites if PROMPT[name] in site.path]
        assert exact
        assert [site.lossless for site in runtime.sites if site.index in exact] == [lossless] * len(exact)
        reused.append([d.step for d in runtime.stats.decisions if d.site == exact[0] and d.action == "reuse"])
    assert torch.equal(*samples)
    assert set(reused[1]) < set(reused[0])
    assert set(reused[0]) == set(range(1, 6))
