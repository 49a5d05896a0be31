"""With the scheduler given, a pipeline reads the device no more often than it does by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dqar_fx
from tests.pipelines.builders import BUILDERS
from tests.pipelines.harness import SCHEDULE, SETTINGS, build, call_of, eager, generate, optimized

# Mochi asks for an autocast that a CPU has not.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")

#: What makes the host wait for the device.
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
}


class CountsReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or Dynamo would step aside for as long as the mode is active

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        # float64: numpy's numbers (Cosmos takes a square root by numpy), which Dynamo traces as tensors of the host.
        self.reads += func in READS and args[0].dtype is not torch.float64
        return func(*args, **(kwargs or {}))


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
