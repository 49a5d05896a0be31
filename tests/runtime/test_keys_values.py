"""Stored keys and values, against an eager model whose attentions are handed the stored ones with fresh queries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, dequantize, quantize
from tests.families import FAMILIES, SCHEDULE, Family, assert_planned, embedded

PIXART = Family(
    PixArtTransformer2DModel,
    {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8,
        "patch_size": 2, "cross_attention_dim": 16, "caption_channels": 12, "use_additional_conditions": False,
    },
    lambda batch, size: (batch, 4, size, size),
    lambda batch, size, prompt: {"encoder_hidden_states": embedded(prompt, batch, 6, 12)},
    sites=4,
)  # fmt: skip

MODELS = {**FAMILIES, "PixArt": PIXART}
every_model = pytest.mark.parametrize("name", MODELS)
# The schedule alone decides: the prompt's keys and values, which stay exact, are looked at in test_lossless.
by_schedule = functools.partial(CacheConfig, "kv", lossless=False)
KV = by_schedule("native")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def sampled(family: Family, model: nn.Module, **settings: Any) -> Tensor:
    """One generation; the prediction is the first half of the channels where variances are predicted as well."""
    call = family.call

    def halved(*args: Any, **kwargs: Any) -> Tensor:
        return call(*args, **kwargs)[:, : family.latent(1, 8)[1]]

    with mock.patch.object(Family, "call", lambda self, *args, **kwargs: halved(*args, **kwargs)):
        return family.sample(model, **settings)


@contextmanager
def replaying(
    model: nn.Module, sites: int, of_keys: Callable[[Tensor], Tensor], of_values: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """The oracle: where the plan reuses, an attention gets the stored keys and values in place of its own.

    ``of_keys`` and ``of_values`` say what a tensor is after it was stored and read back.
    """
    plan = SCHEDULE.plan(sites)
    attend = F.scaled_dot_product_attention
    step, site = -1, 0
    stored: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(*_: object) -> None:
        nonlocal step, site
        step, site = step + 1, 0

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal site
        if plan.reuse[step, site]:
            key, value = stored[site]
        else:
            stored[site] = of_keys(key), of_values(value)
        site += 1
        return attend(query, key, value, *args, **kwargs)

    handle = model.register_forward_pre_hook(begin)
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield
    assert site == sites
    handle.remove()


def through(granularity: str) -> Callable[[Tensor], Tensor]:
    return lambda x: dequantize(*quantize(x, granularity), x.dtype)


def expected(
    family: Family, key: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor], **settings: int
) -> Tensor:
    model = family.make()
    with replaying(model, family.sites, key, value):
        return sampled(family, model, **settings)


@every_model
def test_reuse_is_to_the_bit_what_the_stored_keys_and_values_give(name: str) -> None:
    family = MODELS[name]
    model = family.optimized(cache=KV, fullgraph=True)
    found = sampled(family, model)
    assert_planned(model, family.sites)
    assert torch.equal(found, expected(family, torch.clone, torch.clone))
    eager = sampled(family, family.make())
    assert torch.equal(found[:2], eager[:2])  # what computes never sees the cache
    assert not torch.equal(found[2], eager[2])
    whole = sampled(family, family.optimized())
    assert not torch.equal(found[2], whole[2])  # queries are fresh: it is not the output that was stored


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("DiT", "token"), ("SD3", "tensor"), ("Flux", "head"), ("Wan", "channel"), ("Wan", "token"), ("PixArt", "head")],
)
def test_int8_is_the_round_trip_of_keys_and_values(name: str, granularity: str) -> None:
    family = MODELS[name]
    found = sampled(family, family.optimized(cache=by_schedule("int8", granularity)))
    oracle = expected(family, through(granularity), through(granularity))
    torch.testing.assert_close(found, oracle, rtol=0, atol=2e-6 * float(oracle.abs().max()))
    assert not torch.equal(found, expected(family, torch.clone, torch.clone))


@pytest.mark.parametrize(("name", "dtype"), [("DiT", ("native", "int8")), ("SD3", ("int8", "native"))])
def test_a_pair_stores_keys_and_values_each_its_own_way(name: str, dtype: tuple[str, str]) -> None:
    family = MODELS[name]
    found = sampled(family, family.optimized(cache=by_schedule(dtype)))
    ways = {"native": torch.clone, "int8": through("token")}
    oracle = expected(family, ways[dtype[0]], ways[dtype[1]])
    torch.testing.assert_close(found, oracle, rtol=0, atol=2e-6 * float(oracle.abs().max()))


@pytest.mark.parametrize(("name", "dtype"), [("DiT", "int8"), ("PixArt", "native")])
def test_compiled_it_gives_the_same(name: str, dtype: str) -> None:
    family = MODELS[name]
    model = family.optimized(cache=by_schedule(dtype), backend="inductor", fullgraph=True)
    found = sampled(family, model)
    way = through("token") if dtype == "int8" else torch.clone
    oracle = expected(family, way, way)
    torch.testing.assert_close(found, oracle, rtol=0, atol=2e-4 * float(oracle.abs().max()))
    before = dqar_fx.runtime(model).stats.variants
    with torch.compiler.set_stance("fail_on_recompile"):
        again = sampled(family, model)
    assert torch.equal(again, found)
    stats = dqar_fx.runtime(model).stats
    assert (stats.captures, stats.graph_breaks, stats.variants) == (1, 0, before)


#: For each site of the family: samples x heads x tokens, and channels of a head.
SHAPES = {
    "DiT": [(2 * 2 * 16, 16)] * 2,
    "SD3": [(2 * 2 * (16 + 5), 8)] * 2,
    "Flux": [(2 * 2 * (16 + 5), 16)] * 2,
    "Wan": [(2 * 2 * 32, 12), (2 * 2 * 5, 12)] * 2,
    "PixArt": [(2 * 2 * 16, 8), (2 * 2 * 6, 8)] * 2,
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("DiT", "native"), ("SD3", "int8"), ("Flux", ("native", "int8")), ("Wan", "int8"), ("PixArt", "native")],
)
def test_the_cache_holds_keys_and_values_and_nothing_else(name: str, dtype: Any) -> None:
    family = MODELS[name]
    model = family.optimized(cache=by_schedule(dtype))
    sampled(family, model)
    exact, coarse = (sum(rows * size for rows, size in sizes) for sizes in _sizes(name))
    pair = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    assert dqar_fx.runtime(model).stats.cache_bytes == sum(exact if d == "native" else coarse for d in pair)


def _sizes(name: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows, and the bytes of one: float32 values, or bytes and one float32 scale."""
    return [(n, 4 * d) for n, d in SHAPES[name]], [(n, d + 4) for n, d in SHAPES[name]]


def test_the_cache_in_host_memory_gives_the_same() -> None:
    family = MODELS["SD3"]
    beside = sampled(family, family.optimized(cache=CacheConfig("kv")))
    model = family.optimized(cache=CacheConfig("kv", device="cpu"))
    assert torch.equal(sampled(family, model), beside)


def test_other_sizes_and_another_run_start_afresh() -> None:
    family = MODELS["DiT"]
    model = family.optimized(cache=KV)
    for batch, seed in ((2, 0), (3, 0), (2, 1)):
        found = sampled(family, model, batch=batch, seed=seed)
        assert torch.equal(found, expected(family, torch.clone, torch.clone, batch=batch, seed=seed))


def test_the_report_says_what_is_stored() -> None:
    family = MODELS["SD3"]
    model = family.optimized(cache=CacheConfig("kv", ("native", "int8")))
    sampled(family, model)
    runtime = dqar_fx.runtime(model)
    data = runtime.report().to_dict()
    assert data["cache"] == "kv:native/int8:token"
    assert [site["exits"] for site in data["sites"]] == [2, 2]
    assert [site["shapes"] for site in data["sites"]] == [[["2", "2", "21", "8"]] * 2] * 2
    assert "reuse_or_compute" in runtime.diff()
