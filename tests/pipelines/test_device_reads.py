"""With the scheduler given, a pipeline reads the device no more often than it does by itself."""

from __future__ import annotations

import pytest

import dqar_fx
from tests.pipelines.builders import BUILDERS
from tests.pipelines.harness import (
    DIFFUSERS_WARNS,
    SCHEDULE,
    SETTINGS,
    build,
    call_of,
    eager,
    generate,
    optimized,
    reads,
)

pytestmark = DIFFUSERS_WARNS


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "skyreels_v2_forcing"])
def test_the_library_reads_nothing_from_the_device(name: str) -> None:
    call = call_of(name)
    pipe = optimized(name)
    generate(pipe, call)
    mine = reads(pipe, call)
    assert mine <= reads(eager(name), call)


def test_the_count_sees_what_is_read_where_no_scheduler_is_given() -> None:
    pipe, call = build("dit")
    own = reads(pipe, call)
    dqar_fx.optimize(pipe.transformer, SCHEDULE, **SETTINGS)
    generate(pipe, call)
    assert reads(pipe, call) > own
