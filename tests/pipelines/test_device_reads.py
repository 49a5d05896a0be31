"""With the scheduler given, a pipeline reads the device no more often than it does by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch

import dqar_fx
from tests.counting import CountsReads
from tests.pipelines.builders import BUILDERS
from tests.pipelines.harness import SCHEDULE, SETTINGS, build, call_of, eager, generate, optimized

# Mochi asks for an autocast that a CPU has not.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


def reads(pipe: Any, call: Mapping[str, Any]) -> int:
    """How often a call of the pipeline asks for a value."""
    tolist = torch.Tensor.tolist
    lists = []

    def counted(self: torch.Tensor) -> Any:  # on a CPU this is no operation that could be seen
        lists.append(1)
        return tolist(self)

    with mock.patch.object(torch.Tensor, "tolist", counted), CountsReads() as mode:
        generate(pipe, call)
    return mode.reads + len(lists)


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
