"""CUDA graphs on a CUDA device: what the tests with a fake recorder show, with the real one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, ChangeGate, Gates, Schedule
from dqar_fx.runtime.cuda_graphs import GraphCounts, StepGraphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

STEPS = 12
SCHEDULE = Schedule.interval(STEPS, every=3, warmup=2)
CACHES = [CacheConfig(), CacheConfig(dtype="native"), CacheConfig(target="kv"), CacheConfig(balance="dynamic")]


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=4, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval().cuda()  # fmt: skip


def make(graphs: bool | str = True, seed: int = 0, **settings: Any) -> tuple[nn.Module, dqar_fx.Runtime]:
    settings = {"schedule": SCHEDULE, "backend": "eager", **settings}
    model = dqar_fx.optimize(make_model(seed), cuda_graphs=graphs, **settings)
    return model, dqar_fx.runtime(model)


def steps(seed: int, batch: int = 2) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(batch, device="cuda")
    for step in range(STEPS):
        x = torch.randn(batch, 4, 16, 16, generator=generator).cuda()
        yield x, {"timestep": torch.tensor([900 - 10 * step], device="cuda").expand(batch), "class_labels": labels}


def sample(model: nn.Module, seed: int = 0, batch: int = 2) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(x, **inputs).sample for x, inputs in steps(seed, batch)])


def counts(runtime: dqar_fx.Runtime) -> GraphCounts:
    found = runtime.stats.cuda_graphs
    assert found is not None
    return found


def junk() -> None:
    """Take what memory is free, and leave something in it."""
    held = [torch.full((size,), torch.nan, device="cuda") for size in (2**10, 2**16, 2**20, 2**24) for _ in range(8)]
    torch.cuda.synchronize()
    del held


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_replays_are_the_run_without_graphs_bit_for_bit(cache: CacheConfig, backend: str) -> None:
    (plain, expected), (model, runtime) = (make(graphs, cache=cache, backend=backend) for graphs in (False, True))
    for seed in range(4):
        assert torch.equal(sample(model, seed), sample(plain, seed))
        junk()
    assert runtime.stats.decisions == expected.stats.decisions
    assert counts(runtime).reasons == ()
    before = counts(runtime).replayed
    sample(model)
    assert counts(runtime).replayed == before + STEPS


def test_gates_and_sharing_read_what_replays_measured() -> None:
    gates = Gates(entropy=None, snr=None, change=ChangeGate(0.05), max_reuse=2)
    (plain, expected), (model, runtime) = (make(graphs, gates=gates) for graphs in (False, True))
    for seed in range(4):
        assert torch.equal(sample(model, seed), sample(plain, seed))
        assert runtime.stats.decisions == expected.stats.decisions
        assert str(runtime.stats.measurements) == str(expected.stats.measurements)


def test_after_an_eviction() -> None:
    (plain, _), (model, runtime) = make(False), make()
    runtime.step_graphs = StepGraphs(limit=1)
    for seed, batch in enumerate((2, 2, 3, 3, 3, 2, 2)):
        assert torch.equal(sample(model, seed, batch), sample(plain, seed, batch))
        junk()
    assert counts(runtime).evicted >= 2
    assert counts(runtime).held == 1


@pytest.mark.parametrize("how", ["in place", "other memory"])
def test_after_a_change_of_weights(how: str) -> None:
    (plain, _), (model, runtime) = make(False), make()
    for seed in range(3):
        sample(model, seed)
    recorded = counts(runtime).recorded
    with torch.no_grad():
        for each in (plain, model):
            for parameter in each.parameters():
                if how == "in place":
                    parameter.mul_(1.01)
                else:
                    parameter.data = parameter.data * 1.01
    junk()
    for seed in range(3):
        assert torch.equal(sample(model, seed), sample(plain, seed))
    assert (counts(runtime).recorded > recorded) is (how == "other memory")


def test_another_model_allocates_in_between() -> None:
    pairs = [(make(False, seed), make(True, seed)) for seed in range(2)]
    for seed in range(3):
        for x, inputs in steps(seed):
            with torch.no_grad():
                for (plain, _), (model, _) in pairs:
                    assert torch.equal(model(x, **inputs).sample, plain(x, **inputs).sample)
                    junk()
    assert all(counts(runtime).replayed > STEPS for _, (_, runtime) in pairs)


def test_on_another_stream() -> None:
    (plain, _), (model, runtime) = make(False), make()
    expected = [sample(plain, seed) for seed in range(4)]
    torch.cuda.synchronize()
    for seed in range(4):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = sample(model, seed)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(found, expected[seed])
    assert counts(runtime).replayed > STEPS


def test_inside_of_a_capture_of_the_callers_nothing_is_replayed() -> None:
    (plain, _), (model, runtime) = make(False, schedule=Schedule.none(STEPS)), make(schedule=Schedule.none(STEPS))
    sample(model)
    x, inputs = next(steps(0))
    before = counts(runtime)
    rt = dqar_fx.runtime(model)
    with torch.no_grad(), rt.generation(STEPS):
        rt.begin_step(0)  # so that no timestep is read from the device
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            found = model(x, **inputs).sample
        recorded.replay()
        assert torch.equal(found, plain(x, **inputs).sample)
    assert counts(runtime) == before


def test_out_of_memory_while_recording() -> None:
    (plain, _), (model, runtime) = make(False), make()
    assert runtime.step_graphs is not None
    recorder = runtime.step_graphs.recorder(torch.device("cuda", torch.cuda.current_device()))
    record = recorder.record

    def out_of_memory(run: Any) -> Any:
        def then(*_: Any) -> Any:
            run()
            raise torch.OutOfMemoryError("CUDA out of memory.")

        return record(then)

    recorder.record = out_of_memory  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="without CUDA graphs.*out of memory"):
        assert torch.equal(sample(model), sample(plain))
    assert torch.equal(sample(model, 1), sample(plain, 1))
    assert counts(runtime).reasons == ("the device ran out of memory",)


def test_what_cannot_be_captured() -> None:
    class Reading(DiTTransformer2DModel):
        def forward(self, hidden_states: Tensor, **inputs: Any) -> Any:
            host = torch.ops.test_dqar_fx.mean(hidden_states)
            return super().forward(hidden_states + host, **inputs)

    with torch.library._scoped_library("test_dqar_fx", "DEF") as library:
        library.define("mean(Tensor x) -> Tensor")
        library.impl("mean", lambda x: x.new_full((), float(x.mean())), "CUDA")  # waits for the device
        library.impl("mean", lambda x: x.new_empty(()), "Meta")
        (plain, _), (model, runtime) = make(False), make()
        for each in (plain, model):
            each.__class__ = Reading
        with pytest.warns(UserWarning, match="a step could not be recorded"):
            assert torch.equal(sample(model), sample(plain))
        assert torch.equal(sample(model, 1), sample(plain, 1))
    assert counts(runtime).held == 0
    (plain, _), (model, runtime) = make(False), make()  # and the next model is recorded as if nothing had been
    for seed in range(3):
        assert torch.equal(sample(model, seed), sample(plain, seed))
    assert counts(runtime).replayed > STEPS


def test_memory_is_bounded_and_given_back() -> None:
    model, runtime = make()
    for seed in range(3):
        sample(model, seed)
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    for seed in range(6):
        sample(model, seed)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held + 2**22
    graphs = counts(runtime).held
    dqar_fx.restore(model)
    gc.collect()
    torch.cuda.empty_cache()
    assert graphs
    assert counts(runtime).held == 0
    assert torch.cuda.memory_reserved() < held


def test_auto_is_on_and_leaves_a_model_on_the_host_alone() -> None:
    model, runtime = make("auto")
    sample(model)
    sample(model)
    assert counts(runtime).held
    host = dqar_fx.optimize(make_model().cpu(), SCHEDULE, backend="eager")
    with torch.no_grad():
        for x, inputs in steps(0):
            host(x.cpu(), **{name: value.cpu() for name, value in inputs.items()})
    assert counts(dqar_fx.runtime(host)).recorded == 0
