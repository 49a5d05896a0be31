"""What is stored takes memory from the first store to the end of the run, and no more than that."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

import dqar_fx
from bench.common import peak_mib
from dqar_fx import CacheConfig, Schedule
from dqar_fx.errors import CacheError
from dqar_fx.runtime import sizes
from tests.models import NUM_STEPS, make_dit, sample

CPU = torch.device("cpu")
SCHEDULE = Schedule.interval(NUM_STEPS, every=3, warmup=1)
VALUES = 3 * 2 * 16 * 32  # sites, batch, tokens, width


def buffers(model: nn.Module) -> list[Tensor]:
    """The stored tensors of the calling thread's generation."""
    stores = [stored.store for stored in dqar_fx.runtime(model)._generation()._stores.values()]
    return [part for store in stores for exits in store.buffers for parts in exits or [] for part in parts]


def test_memory_is_taken_at_the_first_store_and_free_again_after_the_last_step() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULE, cache=CacheConfig(dtype="native"), backend="eager")
    assert buffers(model) == []
    sample(model, steps=NUM_STEPS - 1)
    held = [weakref.ref(t) for t in buffers(model)]
    assert len(held) == 3
    dqar_fx.runtime(model).reset()
    sample(model)
    gc.collect()
    assert [t() for t in held] == [None] * 3
    assert buffers(model) == []
    assert dqar_fx.runtime(model).stats.cache_bytes == VALUES * 4  # what the run had stored


def test_another_run_takes_over_nothing() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULE, backend="eager")
    with torch.no_grad():
        sample(model, steps=3)
    sample(model, steps=2)  # begins anew
    assert dqar_fx.runtime(model).stats.cache_bytes == VALUES + VALUES // 32 * 4


class Cached(DiTTransformer2DModel, CacheMixin):
    """A DiT with what most of diffusers' newer models have: its pipeline says when a run is over."""


def test_the_end_of_a_pipeline_call_frees_what_was_stored() -> None:
    model = make_dit()
    model.__class__ = Cached
    dqar_fx.optimize(model, SCHEDULE, backend="eager")
    sample(model, steps=3)  # three of six: interrupted
    assert buffers(model)
    model._reset_stateful_cache()
    assert buffers(model) == []
    assert dqar_fx.runtime(model).stats.reused > 0  # what was done can still be asked for
    dqar_fx.restore(model)
    assert "_reset_stateful_cache" not in vars(model)


def test_kept_buffers_are_those_of_the_run_before_and_freed_by_a_reset() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULE, cache=CacheConfig(keep_buffers=True), backend="eager")
    runtime = dqar_fx.runtime(model)
    addresses = []
    for _ in range(3):
        with runtime.generation(NUM_STEPS):
            sample(model)
            addresses.append([t.data_ptr() for t in buffers(model)])
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(addresses[0]) == 6
    with runtime.generation(NUM_STEPS):
        sample(model, steps=2)
        held = [weakref.ref(t) for t in buffers(model)]
    runtime.reset()
    gc.collect()
    assert [t() for t in held] == [None] * 6


def test_kept_buffers_change_no_result() -> None:
    results = [
        sample(dqar_fx.optimize(make_dit(), SCHEDULE, cache=CacheConfig(keep_buffers=keep), backend="eager"), seed=seed)
        for keep in (False, True)
        for seed in (1,)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", ["int8", "native"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_run_takes_at_most_what_the_eager_model_takes_and_its_cache(dtype: str, backend: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=4, sample_size=32,
            patch_size=2,
        ).eval()  # fmt: skip

    def run(model: nn.Module) -> None:
        x, labels = torch.randn(2, 4, 32, 32), torch.tensor([1, 2])
        with torch.no_grad():
            for step in range(NUM_STEPS):
                model(x, timestep=torch.tensor([900 - 100 * step] * 2), class_labels=labels)

    plain = make()
    model = dqar_fx.optimize(make(), SCHEDULE, cache=CacheConfig(dtype=dtype), backend=backend)
    for each in (plain, model):
        run(each)
    eager, ours = (peak_mib(lambda each=each: run(each), CPU) for each in (plain, model))
    cache = dqar_fx.runtime(model).stats.cache_bytes / 2**20
    assert cache > 0.2
    assert ours <= 1.05 * eager + cache


@pytest.mark.parametrize("dtype", ["int8", "native"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_values_in_host_memory_are_brought_and_taken(dtype: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = dqar_fx.optimize(make_dit(), SCHEDULE, cache=CacheConfig(dtype=dtype), backend=backend)
    expected = sample(beside, seed=3)
    monkeypatch.setattr(sizes, "is_apart", lambda _device: True)  # as if the model were on a device
    model = dqar_fx.optimize(make_dit(), SCHEDULE, cache=CacheConfig(dtype=dtype, device="cpu"), backend=backend)
    for _ in range(2):
        assert torch.equal(sample(model, seed=3), expected)
    stats, others = dqar_fx.runtime(model).stats, dqar_fx.runtime(beside).stats
    assert (stats.reused, stats.cache_bytes) == (others.reused, others.cache_bytes)


def test_on_the_host_anyway_nothing_is_copied() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULE, cache=CacheConfig(device="cpu"), backend="eager")
    sample(model, steps=2)
    assert not any(stored.store.on_host for stored in dqar_fx.runtime(model)._generation()._stores.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["int8", "native"])
def test_on_cuda_values_live_in_pinned_memory_and_results_are_the_same(dtype: str) -> None:
    results, peaks = [], []
    for device in (None, "cpu"):
        model = make_dit(8).cuda()
        dqar_fx.optimize(model, SCHEDULE, cache=CacheConfig(dtype=dtype, device=device), backend="eager")
        x, labels = torch.ones(2, 4, 8, 8, device="cuda"), torch.tensor([1, 2], device="cuda")
        outputs = []
        with torch.no_grad():
            for step in range(NUM_STEPS):
                timestep = torch.tensor([900 - 100 * step] * 2, device="cuda")
                outputs.append(model(x, timestep=timestep, class_labels=labels).sample)
                if step == 1:
                    assert all(t.is_pinned() is (device == "cpu") for t in buffers(model))
                    peaks.append(sum(t.nbytes for t in buffers(model) if t.is_cuda))
        results.append(torch.stack(outputs))
    assert torch.equal(*results)
    assert peaks[1] == 0 < peaks[0]


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(CacheError, match=r"CacheConfig\.device is 'disk'"):
        CacheConfig(device="disk")


def test_the_place_round_trips_through_text() -> None:
    assert CacheConfig.parse("int8:channel@cpu") == CacheConfig(granularity="channel", device="cpu")
    assert str(CacheConfig(device="cpu")) == "int8:token@cpu"
