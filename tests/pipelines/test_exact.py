"""Every pipeline, with guidance: exact where nothing is reused, equal to the oracle where the plan reuses."""

from __future__ import annotations

import pytest
import torch

from tests.pipelines.builders import BUILDERS
from tests.pipelines.harness import ALL_WARMUP, DIFFUSERS_WARNS, call_of, expected, generate, optimized, plain

pytestmark = DIFFUSERS_WARNS


@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_reused_is_the_eager_pipeline_bit_for_bit(name: str) -> None:
    pipe, call = optimized(name), call_of(name, steps=ALL_WARMUP)
    assert torch.equal(generate(pipe, call), plain(pipe, name, call))


# Diffusion forcing steps copies of its scheduler, where the oracle does not see it: test_guidance has its tests.
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "skyreels_v2_forcing"])
def test_reuse_equals_the_oracle_and_so_does_the_next_call(name: str) -> None:
    pipe, call = optimized(name), call_of(name)
    sample = generate(pipe, call)
    assert torch.equal(sample, expected(pipe, name, call))
    assert torch.equal(sample, generate(pipe, call))
