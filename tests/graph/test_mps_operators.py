"""What the rewriting adds runs on MPS: every operator has a kernel there, and none takes float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dqar_fx import CacheConfig
from dqar_fx.balance import fold_into_query
from dqar_fx.graph.measure import change_of, entropy_of
from dqar_fx.graph.specialise import exit_layout
from dqar_fx.metrics.entropy import entropy_in_graph
from tests import mps

B, H, N, D = 2, 3, 6, 8


@pytest.fixture
def fake() -> Callable[..., Tensor]:
    mode = FakeTensorMode()

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype, device="mps")

    return make


def check(function: Any, arguments: list[Tensor]) -> list[Tensor]:
    """What ``function`` returns, all of whose operators MPS has."""
    results: list[Tensor] = []

    def run(*given: Tensor) -> None:
        found = function(*given)
        results.extend(found if isinstance(found, tuple) else (found,))

    called = mps.operators(run, arguments)
    assert called
    lacking = [
        str(op) for op in called if op.namespace == "aten" and mps.support(op) not in (mps.KERNEL, mps.COMPOSITE)
    ]
    assert not lacking
    assert not [str(op) for op, dtypes in called.items() if torch.float64 in dtypes]
    assert all(result.device.type == "mps" for result in results)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "cache",
    ["int8", "int8:tensor", "int8:channel", "int8:head", "int4", "int4:group4", "int8+balance", "int4:group4+balance"],
)
def test_storing_and_reading_outputs(fake: Callable[..., Tensor], cache: str, dtype: torch.dtype) -> None:
    value = fake(B, N, H * D, dtype=dtype)
    layout = exit_layout(value, CacheConfig.parse(cache), H, B)
    packed = check(layout.pack, [value])
    assert len(packed) == layout.parts
    buffers = [fake(*part.shape, dtype=part.dtype) for part in packed]
    for buffer, part in zip(buffers, packed, strict=True):
        check(Tensor.copy_, [buffer, part])
    (back,) = check(layout.unpack, buffers)
    assert (back.shape, back.dtype) == (value.shape, dtype)


@pytest.mark.parametrize("cache", ["kv:int8", "kv:int4", "kv:int8:head", "kv:int8+balance", "kv:int4+balance"])
def test_storing_and_reading_keys_and_values(fake: Callable[..., Tensor], cache: str) -> None:
    query, key = fake(B, 2 * H, N, D), fake(B, H, N, D)
    layout = exit_layout(key, CacheConfig.parse(cache), H, B, "key")
    if layout.balance:
        layout = replace(layout, of_keys=True, groups=2)
    packed = check(layout.pack, [key, query] if layout.balance else [key])
    check(lambda *parts: layout.unpack(*parts, folded=True), packed)
    if layout.balance:
        check(lambda q, factors: fold_into_query(q, factors, 2), [query, packed[2]])


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("rows", [None, 3])
def test_measuring(fake: Callable[..., Tensor], mask: torch.dtype | None, rows: int | None) -> None:
    query, key = fake(B, H, N, D, dtype=torch.float16), fake(B, H, N, D, dtype=torch.float16)
    arguments = [query, key] if mask is None else [query, key, fake(B, 1, 1, N, dtype=mask)]
    (entropy,) = check(lambda *given: entropy_in_graph(*given, rows=rows, normalize="keys"), arguments)
    check(lambda e: entropy_of([e]), [entropy])
    check(lambda new, old: change_of([new], [old], True), [fake(B, N, D), fake(B, N, D)])


def test_the_table_tells_kernels_from_what_runs_on_the_cpu() -> None:
    aten = torch.ops.aten
    assert mps.support(aten.amax.default) == mps.KERNEL  # by its out= variant
    assert mps.support(aten._scaled_dot_product_attention_math_for_mps.default) == mps.KERNEL
    assert mps.support(aten._to_copy.default) == mps.COMPOSITE
    assert mps.support(aten._efficient_attention_forward.default) == mps.NONE
    assert mps.support(aten.linalg_eig.default) == mps.NONE
    assert mps.compiled(aten.amax.default) != mps.compiled(aten.mm.default) == "library"
