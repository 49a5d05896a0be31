"""Offloading and layerwise casting: hooks that move or cast weights around every call of a module.

Dynamo cannot trace most of them, so the model is captured in many graphs. What counts: the results are those of the
model without hooks, reuse is as planned, the report says where it broke, and nothing is captured anew at every step.
Between two calls the weights of the disk and accelerate variants are not there: a call that skipped a hook would show.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import dqar_fx
from tests.families import NATIVE, SCHEDULE, SD3, assert_planned

CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def by_block_on_disk(model: Any, folder: Path) -> None:
    model.enable_group_offload(
        CPU, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    )


def by_leaf_on_disk(model: Any, folder: Path) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


def by_accelerate(model: Any, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def whole_by_accelerate(model: Any, folder: Path) -> None:
    """What ``pipe.enable_model_cpu_offload()`` does to each model."""
    accelerate.cpu_offload_with_hook(model, execution_device=CPU)


Tool = Callable[[Any, Path], None]
#: (what is done, where the report must say that it broke)
TOOLS: list[tuple[Tool, str]] = [
    (by_block_on_disk, "group_offloading.py"),
    (by_leaf_on_disk, "group_offloading.py"),
    (by_accelerate, "accelerate"),
    (whole_by_accelerate, ""),
]


@pytest.fixture(scope="module")
def reused() -> Tensor:
    return SD3.sample(SD3.optimized())


def check(model: nn.Module, expected: Tensor, broke: str) -> None:
    runtime = dqar_fx.runtime(model)
    assert torch.equal(SD3.sample(model), expected)
    assert_planned(model, SD3.sites)
    captures = runtime.stats.captures
    assert torch.equal(SD3.sample(model), expected)
    assert_planned(model, SD3.sites)
    assert runtime.stats.captures == captures
    breaks = [b.where for b in runtime.report().breaks]
    assert any(broke in where for where in breaks) if broke else not breaks


@pytest.mark.parametrize(("tool", "broke"), TOOLS, ids=lambda x: getattr(x, "__name__", ""))
def test_offloaded_before(tool: Tool, broke: str, reused: Tensor, tmp_path: Path) -> None:
    model = SD3.make()
    tool(model, tmp_path)
    dqar_fx.optimize(model, SCHEDULE, cache=NATIVE, backend="eager")
    check(model, reused, broke)


@pytest.mark.parametrize(("tool", "broke"), TOOLS, ids=lambda x: getattr(x, "__name__", ""))
def test_offloaded_after(tool: Tool, broke: str, reused: Tensor, tmp_path: Path) -> None:
    model = SD3.optimized()
    tool(model, tmp_path)
    check(model, reused, broke)


def test_offloaded_after_a_generation(reused: Tensor, tmp_path: Path) -> None:
    model = SD3.optimized()
    assert torch.equal(SD3.sample(model), reused)
    by_leaf_on_disk(model, tmp_path)
    check(model, reused, "group_offloading.py")


def test_offloading_in_the_middle_computes(tmp_path: Path) -> None:
    model, plain = SD3.optimized(), SD3.make()
    for step in range(2):
        SD3.call(model, step)
    by_block_on_disk(model, tmp_path)
    assert torch.equal(SD3.call(model, 2), SD3.call(plain, 2))


@pytest.mark.parametrize("before", [True, False])
def test_layerwise_casting(before: bool) -> None:
    def cast(model: Any) -> Any:
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        return model

    model = SD3.make()
    model = dqar_fx.optimize(cast(model) if before else model, SCHEDULE, cache=NATIVE, backend="eager")
    model = model if before else cast(model)
    rounded = SD3.make()
    for (name, value), stored in zip(rounded.named_parameters(), model.parameters(), strict=True):
        assert stored.dtype is torch.bfloat16 or "embed" in name or "norm" in name or "proj_out" in name, name
        value.data = stored.data.to(torch.float32)
    assert torch.equal(SD3.sample(rounded)[0], SD3.sample(cast(SD3.make()))[0])  # the eager model, cast as well
    expected = SD3.sample(dqar_fx.optimize(rounded, SCHEDULE, cache=NATIVE, backend="eager"))
    check(model, expected, "module.py")


def in_groups(model: Any, **how: Any) -> Any:
    model.enable_group_offload(torch.device("cuda"), CPU, offload_type="leaf_level", **how)
    return model


def in_groups_on_a_stream(model: Any) -> Any:
    return in_groups(model, use_stream=True)


def whole(model: Any) -> Any:
    accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cuda"))
    return model


@CUDA
@pytest.mark.parametrize("offload", [in_groups, in_groups_on_a_stream, whole])
@pytest.mark.parametrize("before", [False, True])
def test_offloading_from_cuda(before: bool, offload: Callable[[Any], Any]) -> None:
    expected = sampled_on_cuda(SD3.optimized().to("cuda"))
    model = SD3.make()
    model = dqar_fx.optimize(offload(model) if before else model, SCHEDULE, cache=NATIVE, backend="eager")
    assert torch.equal(sampled_on_cuda(model if before else offload(model)), expected)
    assert_planned(model, SD3.sites)


def sampled_on_cuda(model: nn.Module) -> Tensor:
    with torch.device("cuda"):
        return SD3.sample(lambda **inputs: model(**{k: v.to("cuda") for k, v in inputs.items()}))  # type: ignore[arg-type]
