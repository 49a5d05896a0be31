"""Steps that are recorded and replayed: when, what that may never change, and what it does where it cannot.

A fake recorder stands in for CUDA: it repeats the operators it has seen on the very tensors they had.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, ChangeGate, CrossBranch, EntropyGate, Gates, RuntimeStateError, Schedule
from dqar_fx.runtime import sizes
from dqar_fx.runtime.cuda_graphs import GraphCounts, StaticInputs, StepGraphs, step_graphs
from tests.recording import FakeRecorder

STEPS = 12
SCHEDULE = Schedule.interval(STEPS, every=3, warmup=2)  # compute, store, reuse: three programs
WIDTH = 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).movedim(-3, 0).transpose(-2, -3)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attn(F.layer_norm(x, (WIDTH,)) + condition)
        return x + F.silu(self.mlp(x))


class Model(nn.Module):
    """Latents ``[B, 8, 16]``, a timestep, and an optional prompt ``[B, 16]``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor | None = None) -> Tensor:
        condition = torch.sin(timestep.reshape(-1, 1, 1) / 100)
        if prompt is not None:
            condition = condition + prompt[:, None]
        for block in self.blocks:
            x = block(x, condition)
        return x


class Counting(Model):
    """Counts its calls in its own state, which its result depends on."""

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor | None = None) -> Tensor:
        self.calls.add_(1)
        return super().forward(x, timestep, prompt) + self.calls / 100


class Replacing(Model):
    """The same; but this form of it is a result of the graph, which the module's attribute is set to."""

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, timestep, prompt) + self.calls / 100


class Broken(Model):
    """Two graphs, and the second takes what the first has made."""

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor | None = None) -> Tensor:
        condition = torch.sin(timestep.reshape(-1, 1, 1) / 100)
        x = self.blocks[0](x, condition)
        torch._dynamo.graph_break()
        return self.blocks[1](x, condition)


def make(
    kind: Callable[[], nn.Module] = Model, *, graphs: bool = True, limit: int = 64, **settings: Any
) -> tuple[nn.Module, dqar_fx.Runtime]:
    schedule = settings.pop("schedule", SCHEDULE)
    model = dqar_fx.optimize(kind().eval(), schedule, backend="eager", **settings)
    runtime = dqar_fx.runtime(model)
    if graphs:
        runtime.step_graphs = StepGraphs(FakeRecorder, device="cpu", limit=limit)
    return model, runtime


#: A model without, where its weights stay as they are.
reference = functools.cache(functools.partial(make, graphs=False))


def steps(seed: int = 0, batch: int = 2, count: int = STEPS) -> Iterator[tuple[int, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        yield step, torch.randn(batch, 8, WIDTH, generator=generator), torch.tensor([900.0 - 10 * step]).expand(batch)


def sample(model: nn.Module, seed: int = 0, batch: int = 2, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(x, timestep=t, **inputs) for _, x, t in steps(seed, batch)])


def recorder(runtime: dqar_fx.Runtime) -> FakeRecorder:
    assert runtime.step_graphs is not None
    found = runtime.step_graphs.recorder(torch.device("cpu"))
    assert isinstance(found, FakeRecorder)
    return found


def counts(runtime: dqar_fx.Runtime) -> GraphCounts:
    found = runtime.stats.cuda_graphs
    assert found is not None
    return found


CASES: dict[str, dict[str, Any]] = {
    "int8": {},
    "native": {"cache": CacheConfig(dtype="native")},
    "int4, balanced": {"cache": CacheConfig(dtype="int4", balance="dynamic")},
    "kv": {"cache": CacheConfig(target="kv")},
    "linear": {"schedule": Schedule.linear(STEPS, warmup=0.2, fraction=1.0)},
    "entropy and change": {"gates": Gates(entropy=EntropyGate(100.0), change=ChangeGate(0.05), snr=None)},
    "state of its own": {"kind": Counting},
    "two graphs": {"kind": Broken},
}


@pytest.mark.parametrize("case", CASES)
def test_replays_are_the_run_without_them_bit_for_bit(case: str) -> None:
    (plain, expected), (model, runtime) = make(graphs=False, **CASES[case]), make(**CASES[case])
    for seed in range(4):
        assert torch.equal(sample(model, seed), sample(plain, seed))
        assert runtime.stats.decisions == expected.stats.decisions
        assert str(runtime.stats.measurements) == str(expected.stats.measurements)
        assert runtime.stats.cache_bytes == expected.stats.cache_bytes
    found = counts(runtime)
    assert found.reasons == ()
    assert found.held == found.recorded
    assert found.replayed > STEPS


def test_a_step_is_recorded_when_it_comes_the_third_time_and_only_replayed_from_then_on() -> None:
    model, runtime = make()
    sample(model)
    assert counts(runtime) == GraphCounts(held=2, recorded=2, replayed=7)  # 12 steps: 2 + 3 + 7; and each twice without
    sample(model)
    sample(model)
    assert counts(runtime).recorded == 3  # the warm-up comes twice a generation
    sample(model)
    before = counts(runtime)
    sample(model)
    after = counts(runtime)
    assert (after.recorded, after.replayed) == (3, before.replayed + STEPS)
    assert recorder(runtime).recorded == 3
    assert recorder(runtime).waits == after.replayed + 3  # each of the three also ran once over static memory


def test_a_shape_that_is_seen_once_is_not_recorded() -> None:
    model, runtime = make(schedule=Schedule.none(STEPS), dynamic=True)
    with torch.no_grad():
        for batch in range(2, 8):
            model(torch.randn(batch, 8, WIDTH), timestep=torch.full((batch,), 900.0))
    assert counts(runtime) == GraphCounts()


def test_other_shapes_have_recordings_of_their_own() -> None:
    (plain, _), (model, runtime) = reference(), make()
    for batch in (2, 3, 3, 2, 3, 2):
        assert torch.equal(sample(model, batch, batch), sample(plain, batch, batch))
    assert counts(runtime).replayed > 2 * STEPS


def test_branches_have_stores_and_so_recordings_of_their_own() -> None:
    def guided(model: nn.Module, runtime: dqar_fx.Runtime, seed: int) -> Tensor:
        prompts = {name: torch.full((2, WIDTH), value) for name, value in (("cond", 1.0), ("uncond", -1.0))}
        found = []
        with torch.no_grad(), runtime.generation(STEPS):
            for _, x, t in steps(seed):
                for name, prompt in prompts.items():
                    with runtime.branch(name):
                        found.append(model(x, timestep=t, prompt=prompt))
        return torch.stack(found)

    for settings in ({}, {"gates": Gates(entropy=None, snr=None, cross_branch=CrossBranch(math.inf))}):
        (plain, other), (model, runtime) = make(graphs=False, **settings), make(**settings)
        for seed in range(4):
            assert torch.equal(guided(model, runtime, seed), guided(plain, other, seed))
        assert runtime.stats.shared == other.stats.shared
        assert bool(runtime.stats.shared) is bool(settings)
        before = counts(runtime).recorded
        guided(model, runtime, 0)
        assert counts(runtime).recorded == before


def test_one_makes_room_for_another_that_runs_more_and_returns() -> None:
    (plain, _), (model, runtime) = reference(), make(limit=1)
    replayed = []
    for seed, batch in enumerate((2, 2, 3, 3, 3, 2, 2)):
        assert torch.equal(sample(model, seed, batch), sample(plain, seed, batch))
        found = counts(runtime)
        assert found.held == 1
        assert found.recorded == found.evicted + 1
        replayed.append(found.replayed)
    assert counts(runtime).evicted >= 2
    assert replayed == sorted(set(replayed))  # each generation replayed something


def test_of_more_steps_in_turn_than_there_is_room_for_some_stay_recorded() -> None:
    schedule = Schedule.linear(STEPS, warmup=1, fraction=1.0)
    model, runtime = make(schedule=schedule, limit=2)
    for seed in range(5):
        sample(model, seed)
    before = counts(runtime)
    sample(model)
    after = counts(runtime)
    assert after.held == 2
    assert after.recorded == before.recorded
    assert after.replayed >= before.replayed + 2


def test_gates_make_many_programs_and_no_more_recordings_than_the_limit() -> None:
    gates = Gates(entropy=None, snr=None, change=ChangeGate(0.2), max_reuse=2)
    schedule = Schedule.always(STEPS, warmup=2)
    (plain, other), (model, runtime) = (
        make(graphs=False, gates=gates, schedule=schedule),
        make(gates=gates, schedule=schedule, limit=2),
    )
    for seed in range(5):
        assert torch.equal(sample(model, seed), sample(plain, seed))
        assert runtime.stats.decisions == other.stats.decisions
        assert counts(runtime).held <= 2


def test_weights_written_in_place_are_those_that_a_replay_reads() -> None:
    (plain, _), (model, runtime) = make(graphs=False), make()
    for seed in range(3):
        sample(model, seed)
    before = counts(runtime)
    for each in (plain, model):
        with torch.no_grad():
            for p in each.parameters():
                p.mul_(1.1)
    assert torch.equal(sample(model, 3), sample(plain, 3))
    assert counts(runtime).recorded == before.recorded
    assert counts(runtime).replayed == before.replayed + STEPS


@pytest.mark.parametrize("how", ["data", "parameter", "half-way"])
def test_weights_in_other_memory_are_recorded_anew(how: str) -> None:
    def change(model: nn.Module) -> None:
        module = model.blocks[1].mlp
        if how == "parameter":
            module.weight = nn.Parameter(module.weight.detach() * 1.1)
        else:
            module.weight.data = module.weight.data * 1.1

    def run(model: nn.Module, seed: int) -> Tensor:
        with torch.no_grad():
            found = []
            for step, x, t in steps(seed):
                if how == "half-way" and step == 7:
                    change(model)
                found.append(model(x, timestep=t))
        return torch.stack(found)

    (plain, _), (model, runtime) = make(graphs=False), make()
    for seed in range(3):
        assert torch.equal(run(model, seed), run(plain, seed))
    recorded = counts(runtime).recorded
    for each in (plain, model):
        change(each)
    for seed in range(3):
        assert torch.equal(run(model, seed), run(plain, seed))
    assert counts(runtime).recorded > recorded


def test_what_a_step_returns_is_the_callers_own() -> None:
    (plain, _), (model, _) = reference(), make()
    sample(model)
    with torch.no_grad():
        kept, expected = [], []
        for _, x, t in steps(1):
            kept.append(model(x, timestep=t))
            expected.append(plain(x, timestep=t))
        kept[-2].zero_()  # and may be written into
        expected[-2].zero_()
        assert torch.equal(torch.stack(kept), torch.stack(expected))
    assert torch.equal(sample(model, 2), sample(plain, 2))


def test_inputs_of_any_strides() -> None:
    (plain, _), (model, runtime) = reference(), make()
    prompt = torch.randn(1, WIDTH).expand(2, WIDTH)
    with torch.no_grad():
        for seed in range(3):
            for _, x, t in steps(seed):
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
                assert torch.equal(model(x, timestep=t, prompt=prompt), plain(x, timestep=t, prompt=prompt))
    assert counts(runtime).replayed > STEPS


def test_inference_mode() -> None:
    (plain, _), (model, runtime) = reference(), make()
    for seed in range(3):
        with torch.inference_mode():
            assert torch.equal(sample(model, seed), sample(plain, seed))
        assert torch.equal(sample(model, seed), sample(plain, seed))
    assert counts(runtime).replayed > 2 * STEPS


def test_generations_that_take_turns() -> None:
    (plain, other), (model, runtime) = make(graphs=False), make()
    for _ in range(3):
        found: dict[str, list[Tensor]] = {}
        for name, each, rt in (("plain", plain, other), ("graphs", model, runtime)):
            generations = [rt.generation(STEPS) for _ in range(2)]
            for (_, x, t), (_, y, _) in zip(steps(1), steps(2), strict=True):
                for latents, generation in zip((x, y), generations, strict=True):
                    with generation, torch.no_grad():
                        found.setdefault(name, []).append(each(latents, timestep=t))
        assert torch.equal(torch.stack(found["plain"]), torch.stack(found["graphs"]))


def test_threads() -> None:
    (plain, _), (model, runtime) = reference(), make()
    expected = [sample(plain, seed) for seed in range(2)]
    sample(model)  # captured here: Dynamo compiles one frame at a time
    failed: list[int] = []

    def work(seed: int) -> None:
        for _ in range(4):
            with runtime.generation(STEPS):
                if not torch.equal(sample(model, seed), expected[seed]):
                    failed.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert counts(runtime).replayed > STEPS


def test_two_models_that_take_turns() -> None:
    pairs = [(make(lambda s=s: Model(s), graphs=False), make(lambda s=s: Model(s))) for s in range(2)]
    for seed in range(3):
        with torch.no_grad():
            for _, x, t in steps(seed):
                for (plain, _), (model, _) in pairs:
                    assert torch.equal(model(x, timestep=t), plain(x, timestep=t))
    assert all(counts(runtime).replayed > STEPS for _, (_, runtime) in pairs)


def test_another_prompt_is_read_and_the_same_one_is_not_copied_again() -> None:
    (plain, _), (model, runtime) = reference(), make()
    prompt = torch.randn(2, WIDTH)
    for seed in range(3):
        assert torch.equal(sample(model, seed, prompt=prompt), sample(plain, seed, prompt=prompt))
    other = torch.randn(2, WIDTH)
    assert torch.equal(sample(model, 3, prompt=other), sample(plain, 3, prompt=other))
    other.add_(1)
    assert torch.equal(sample(model, 4, prompt=other), sample(plain, 4, prompt=other))
    assert counts(runtime).replayed > 3 * STEPS


class Layout:
    copied = (0, 1)
    constant = frozenset({1})


@pytest.mark.parametrize(
    ("change", "copied"),
    [
        (lambda prompt: prompt, False),
        (lambda prompt: prompt.fill_(2.0), True),
        (lambda prompt: prompt.detach(), True),  # another object: who knows how it was written
        (lambda prompt: torch.full_like(prompt, 2.0), True),
    ],
    ids=["same", "written into", "a view", "another"],
)
def test_what_stays_the_same_is_copied_once(change: Callable[[Tensor], Tensor], copied: bool) -> None:
    latents, prompt = torch.zeros(3), torch.ones(3)
    static = StaticInputs(Layout(), [latents, prompt])  # type: ignore[arg-type]
    first = static.fill([latents, prompt, "other"])
    assert first[2] == "other"
    versions = [t._version for t in first[:2]]
    second = static.fill([latents, changed := change(prompt), "other"])
    assert second[0] is first[0]
    assert second[1] is first[1]
    assert torch.equal(second[1], changed)
    assert [t._version > v for t, v in zip(second[:2], versions, strict=True)] == [True, copied]


def test_inputs_of_another_shape_do_not_fit() -> None:
    static = StaticInputs(Layout(), [torch.zeros(3, 2), torch.ones(3)])  # type: ignore[arg-type]
    assert static.fits([torch.ones(3, 2), torch.zeros(3)])
    assert not static.fits([torch.ones(1, 2), torch.zeros(3)])  # which could be broadcast
    assert not static.fits([torch.ones(2, 3).T, torch.zeros(3)])


# -- where it cannot be done ---------------------------------------------------------------------------------------


def fails(failure: Exception, message: str) -> dqar_fx.Runtime:
    (plain, _), (model, runtime) = reference(), make()
    recorder(runtime).failures = [failure]
    with pytest.warns(UserWarning, match=message):
        assert torch.equal(sample(model), sample(plain))
    for seed in range(2):
        assert torch.equal(sample(model, seed), sample(plain, seed))
    return runtime


def test_out_of_memory_while_recording_runs_without_from_then_on_and_says_so() -> None:
    runtime = fails(torch.OutOfMemoryError("CUDA out of memory."), "without CUDA graphs.*out of memory")
    assert counts(runtime) == GraphCounts(reasons=("the device ran out of memory",))
    assert recorder(runtime).trimmed == 1
    assert "without CUDA graphs: the device ran out of memory" in str(runtime.report())
    assert runtime.stats.cache_bytes > 0
    stores = [stored.store for stored in runtime._generation()._stores.values()]
    assert all(buffers is None for store in stores for buffers in store.buffers)  # freed at the end of the run again


def test_what_cannot_be_captured_runs_without_and_says_so() -> None:
    runtime = fails(RuntimeError("operation not permitted\nwhen stream is capturing"), r"not permitted\)$")
    assert counts(runtime).reasons == ("a step could not be recorded (RuntimeError: operation not permitted)",)


def test_out_of_memory_in_a_step_gives_back_what_recordings_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    (plain, _), (model, runtime) = reference(), make()
    sample(model)
    assert counts(runtime).held
    graph = runtime.graphs[0]
    run, left = graph.run, [1]

    def out_of_memory(*args: Any) -> list[Any]:
        if left and left.pop():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(*args)

    monkeypatch.setattr(graph, "run", out_of_memory)
    with pytest.warns(UserWarning, match="from here on: the device ran out of memory"):
        assert torch.equal(sample(model, 1), sample(plain, 1))  # its warm-up has not been recorded yet
    assert counts(runtime).held == 0
    assert torch.equal(sample(model, 2), sample(plain, 2))


def test_out_of_memory_without_recordings_is_the_callers() -> None:
    model, runtime = make()
    sample(model)
    runtime.reset()
    graph = runtime.graphs[0]

    def out_of_memory(*args: Any) -> list[Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    graph.run = out_of_memory  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        sample(model)
    assert counts(runtime).reasons == ()


def test_inside_of_somebody_elses_capture_nothing_is_replayed() -> None:
    (plain, _), (model, runtime) = reference(), make()
    sample(model)
    before = counts(runtime)
    recorder(runtime).busy = True
    assert torch.equal(sample(model, 1), sample(plain, 1))
    assert counts(runtime) == before


def test_values_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "is_apart", lambda _device: True)  # as if the model were on a device
    (plain, _), (model, runtime) = reference(), make(cache=CacheConfig(device="cpu"))
    for seed in range(3):
        assert torch.equal(sample(model, seed), sample(plain, seed))
    assert counts(runtime) == GraphCounts(
        reasons=("stored values are copied from and to host memory (CacheConfig.device)",)
    )


class Timed(Model):
    def forward(self, x: Tensor, timestep: float) -> Tensor:  # type: ignore[override]
        return super().forward(x, x.new_full((x.shape[0],), timestep * 1.0))


def test_a_timestep_that_is_a_number_is_never_baked_in() -> None:
    schedule = Schedule.none(3)
    (plain, _), (model, runtime) = (make(Timed, graphs=on, dynamic=True, schedule=schedule) for on in (False, True))
    with torch.no_grad():
        for seed in range(4):
            for step, x, _ in steps(seed, count=3):
                assert torch.equal(model(x, 900.0 - step), plain(x, 900.0 - step))
    assert counts(runtime).recorded == 0
    assert any("is a number that changes: pass a tensor on the device" in r for r in counts(runtime).reasons)


def test_weights_whose_memory_is_not_known() -> None:
    class Wrapped(Tensor):
        pass

    class Reading(Model):
        def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor | None = None) -> Tensor:
            return super().forward(x, timestep, prompt) + self.extra

    def reading() -> nn.Module:
        model = Reading()
        model.extra = torch.ones(1).as_subclass(Wrapped)
        return model

    model, runtime = make(reading, cache=CacheConfig(dtype="native"))
    sample(model)
    sample(model)
    assert counts(runtime).recorded == 0
    assert "extra is a Wrapped, whose memory is not known" in counts(runtime).reasons[0]


def test_reset_lets_go_of_recordings_and_stores() -> None:
    model, runtime = make()
    sample(model)
    sample(model)
    assert counts(runtime).held
    runtime.reset()
    assert counts(runtime).held == 0
    assert runtime.pool.take((runtime.graphs[0], ())) is None


def test_stores_are_kept_for_recordings_and_for_nothing_else() -> None:
    model, runtime = make(dynamic=False)  # or a second batch size would be another capture for all sizes
    sample(model)
    addresses = {p.data_ptr() for s in runtime._generation()._stores.values() for b in s.store.buffers for p in b[0]}
    for batch in (3, 4, 5):  # a step of each: nothing of it is recorded
        with torch.no_grad():
            for _, x, t in steps(0, batch, 3):
                model(x, timestep=t)
    sample(model)
    again = {p.data_ptr() for s in runtime._generation()._stores.values() for b in s.store.buffers for p in b[0]}
    assert again == addresses
    assert sum(map(len, runtime.pool._free.values())) <= 1


class Prompted(Model):
    """Its prompt is projected at every call: what a compiler can do once."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.project = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor | None = None) -> Tensor:
        return super().forward(x, timestep, self.project(prompt))


def test_what_is_computed_once_stays_where_recordings_read_it() -> None:
    (plain, _), (model, runtime) = make(Prompted, graphs=False), make(Prompted)
    prompts = list(torch.randn(3, 2, WIDTH).unbind())
    recorded = []
    for seed, prompt in enumerate([*prompts, prompts[0]]):
        assert torch.equal(sample(model, seed, prompt=prompt), sample(plain, seed, prompt=prompt))
        recorded.append(counts(runtime).recorded)
    assert runtime.graphs[0].hoisting is not None
    assert recorded[1] == recorded[-1] > 0  # the prompts of later generations are read from the same memory
    with torch.no_grad():
        prompts[0].mul_(2)
    assert torch.equal(sample(model, 0, prompt=prompts[0]), sample(plain, 0, prompt=prompts[0]))


# -- what is asked for ----------------------------------------------------------------------------------------------


def test_state_that_is_replaced_by_a_result_is_not_recorded() -> None:
    (plain, _), (model, runtime) = make(Replacing, graphs=False), make(Replacing)
    for seed in range(3):
        assert torch.equal(sample(model, seed), sample(plain, seed))
    assert "which shares its memory with L['self']._buffers['calls']" in counts(runtime).reasons[0]


def test_without_a_cuda_device_auto_is_off_and_the_graph_runs_itself() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    model, runtime = make(graphs=False)
    sample(model)
    assert runtime.step_graphs is None
    assert all(graph.runner is None for graph in runtime.graphs)
    assert runtime.stats.cuda_graphs is None
    assert runtime.report().to_dict()["cuda_graphs"] is None
    assert "CUDA graph" not in str(runtime.report())


def test_true_without_a_cuda_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeStateError, match=r"cuda_graphs=True, but torch finds no CUDA device\. Use"):
        dqar_fx.optimize(Model().eval(), SCHEDULE, cuda_graphs=True)
    compiled = torch.compile(
        Model().eval(), backend="dqar_fx", options={"schedule": SCHEDULE, "backend": "eager", "cuda_graphs": True}
    )
    with pytest.raises(Exception, match="torch finds no CUDA device"):  # Dynamo wraps it in an error of its own
        sample(compiled)


def test_true_with_the_model_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        model = dqar_fx.optimize(Model().eval(), SCHEDULE, backend="eager", cuda_graphs=True)
    with pytest.raises(RuntimeStateError, match="cuda_graphs=True, but the model runs on cpu"):
        sample(model)


@pytest.mark.parametrize("setting", ["on", None, 1, "True"])
def test_another_setting_is_refused(setting: Any) -> None:
    with pytest.raises(RuntimeStateError, match=r'cuda_graphs is .*\. Use "auto"'):
        dqar_fx.optimize(Model().eval(), SCHEDULE, cuda_graphs=setting)


@pytest.mark.parametrize(
    "compiled",
    [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"triton.cudagraphs": True}},
     {"backend": "cudagraphs"}],
    ids=str,
)  # fmt: skip
def test_beside_cuda_graphs_of_the_pieces_own(compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeStateError, match="cuda_graphs=True, but the pieces are compiled into CUDA graphs of"):
        dqar_fx.optimize(Model().eval(), SCHEDULE, cuda_graphs=True, **compiled)
    assert dqar_fx.runtime(dqar_fx.optimize(Model().eval(), SCHEDULE, **compiled)).stats.cuda_graphs is None  # off
    model = dqar_fx.optimize(Model().eval(), SCHEDULE, cuda_graphs="auto", **compiled)
    assert counts(dqar_fx.runtime(model)).reasons == (
        "the pieces are compiled into CUDA graphs of their own (mode, or options)",
    )


def test_modes_without_cuda_graphs_leave_ours_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for mode in (None, "default", "max-autotune-no-cudagraphs"):
        model = dqar_fx.optimize(Model().eval(), SCHEDULE, mode=mode, cuda_graphs=True)
        assert counts(dqar_fx.runtime(model)).reasons == ()
    assert step_graphs(False, None) is None


def test_what_is_required_warns_where_it_cannot_be() -> None:
    model, runtime = make(cache=CacheConfig(device="cpu"))
    runtime.step_graphs = StepGraphs(FakeRecorder, device="cpu", required=True)
    with pytest.warns(UserWarning, match="without CUDA graphs: stored values are copied"):
        sample(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(model)  # once
