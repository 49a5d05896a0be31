"""What Inductor emits for a DiT block: storing costs no kernel, reusing removes the attention and adds none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.graph import GraphLowering

import dqar_fx
from dqar_fx import Balance, CacheConfig, Schedule

#: Step 0 computes, step 1 computes and stores, step 2 reuses.
SCHEDULE = Schedule.custom(5, lambda t, s, T, S: t in (2, 3))


def _no_kernel(*pointers: object) -> None:
    """Stands in for a compiled kernel."""


def generated(model: torch.nn.Module, step: int) -> list[str]:
    """The code of the pieces that a step compiles, in order. C++ kernels are not compiled: only their calls count."""
    codes: list[str] = []
    with (
        torch.no_grad(),
        # A graph from a cache is not lowered, so that there would be no code to see.
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        mock.patch.object(GraphLowering, "save_output_code", codes.append),
        mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=_no_kernel),
    ):
        timestep = torch.full((2,), 900 - 100 * step)
        model(torch.randn(2, 4, 32, 32), timestep=timestep, class_labels=torch.tensor([1, 2]))
    return codes


def calls(code: str) -> dict[str, int]:
    """What the compiled piece calls."""
    body = code[code.index("def call(") :]
    return {
        "fused": len(re.findall(r"^\s*cpp_fused\w*\(", body, re.MULTILINE)),
        "gemm": len(re.findall(r"\bextern_kernels\.(?:addmm|mm|bmm|baddbmm)\(", body)),
        "attention": len(re.findall(r"= torch\.ops\.aten\._scaled_dot_product\w+", body)),
        "other": len(re.findall(r"\bextern_kernels\.(?!addmm|mm|bmm|baddbmm)\w+\(", body)),
    }


@pytest.fixture(autouse=True)
def _forget_code_without_kernels() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    PyCodeCache.cache_clear()


@pytest.mark.parametrize("dtype", ["int8", "int4", "native"])
def test_a_block_stores_for_free_and_reuses_without_a_kernel_more(dtype: str) -> None:
    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=2, sample_size=32,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    dqar_fx.optimize(model, SCHEDULE, cache=CacheConfig(dtype=dtype), fullgraph=True)
    _prologue, _first, compute, _epilogue = map(calls, generated(model, step=0))
    _first, store = map(calls, generated(model, step=1))
    _first, reuse = map(calls, generated(model, step=2))

    assert compute["attention"] == 1
    assert compute["other"] == 0
    assert store == compute  # quantising and writing fuse into the kernels around the out-projection
    # Q, K, V and the out-projection are gone, and so is the norm before them; what dequantises is the residual add.
    assert reuse == {**compute, "attention": 0, "gemm": compute["gemm"] - 4, "fused": compute["fused"] - 1}
    assert (compute["fused"], compute["gemm"]) == (5, 9)


@pytest.mark.parametrize("dtype", ["int8", "native"])
def test_keys_and_values_are_stored_by_small_kernels_and_read_by_one(dtype: str) -> None:
    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=2, sample_size=32,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    dqar_fx.optimize(model, SCHEDULE, cache=CacheConfig("kv", dtype), fullgraph=True)
    _prologue, _first, compute, _epilogue = map(calls, generated(model, step=0))
    _first, store = map(calls, generated(model, step=1))
    _first, reuse = map(calls, generated(model, step=2))

    # What is stored comes from a library's kernel and goes to another: there is nothing to fuse with, so each has a
    # kernel of its own. (With them in the graph, Inductor also takes the statistics of the norm before apart.)
    assert store == {**compute, "fused": compute["fused"] + 3}
    # The projections of keys and values are gone; queries, attention and out-projection stay.
    assert reuse == {**compute, "gemm": compute["gemm"] - 2, "fused": compute["fused"] + (dtype == "int8")}


def calibrated(target: str) -> CacheConfig:
    shape, fill = ((1, 1, 384), 0.3) if target == "output" else ((1, 6, 1, 64), 2.0)
    names = [f"transformer_blocks.{i}.attn1/0" for i in range(2)]
    return CacheConfig(target, balance=Balance(target, {name: torch.full(shape, fill) for name in names}, 1))


@pytest.mark.parametrize("target", ["output", "kv"])
def test_calibrated_balancing_adds_no_kernel(target: str) -> None:
    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=2, sample_size=32,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    dqar_fx.optimize(model, Schedule.always(5), cache=calibrated(target), fullgraph=True)
    _prologue, _first, store, _epilogue = map(calls, generated(model, step=0))
    _first, reuse = map(calls, generated(model, step=1))

    # As without (see above): the factors are multiplied in where values are rounded, and out where they are read; the
    # queries are scaled by the kernel that reads the keys.
    keys = target == "kv"
    assert store == {"fused": 8 if keys else 5, "gemm": 9, "attention": 1, "other": 0}
    assert reuse == {"fused": 6 if keys else 4, "gemm": 7 if keys else 5, "attention": int(keys), "other": 0}
