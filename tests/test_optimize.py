"""The public calls on a real diffusers model: what they give, what they leave behind, what they refuse."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, CaptureError, DqarError, Plan, PlanError, RuntimeStateError, Schedule
from tests.counting import CountsReads
from tests.models import NUM_STEPS, make_dit, replaying, sample, timestep

SCHEDULES = [
    Schedule.interval(NUM_STEPS, every=3, warmup=1),
    Schedule.linear(NUM_STEPS, warmup=1, fraction=1.0),
    Schedule.linear(NUM_STEPS, warmup=1, fraction=1.0, deep_first=True, refresh=2),
    Schedule.phases(NUM_STEPS, early_end=0.5, mid_end=0.8, warmup=1),
    Schedule.always(NUM_STEPS),
    Schedule.custom(NUM_STEPS, lambda t, s, T, S: t > 0 and (t + s) % 2 == 1),
]


def test_nothing_reused_is_the_eager_model_bit_for_bit() -> None:
    model = dqar_fx.optimize(make_dit(), Schedule.none(NUM_STEPS), backend="eager", fullgraph=True)
    assert torch.equal(sample(model), sample(make_dit()))
    assert dqar_fx.runtime(model).stats.cache_bytes == 0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_native_reuse_equals_the_oracle_bit_for_bit(schedule: Schedule) -> None:
    plain = make_dit()
    with replaying(plain, schedule.plan(3)):
        expected = sample(plain)
    model = dqar_fx.optimize(make_dit(), schedule, cache=CacheConfig(dtype="native"), backend="eager", fullgraph=True)
    assert torch.equal(sample(model), expected)
    assert not torch.equal(expected, sample(make_dit()))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_int8_reuse_equals_the_oracle_with_rounding(schedule: Schedule) -> None:
    plain = make_dit()
    with replaying(plain, schedule.plan(3), quantized=True):
        expected = sample(plain)
    model = dqar_fx.optimize(make_dit(), schedule, backend="eager", fullgraph=True)
    torch.testing.assert_close(sample(model), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ["native", "int8"])
def test_inductor_equals_the_oracle(dtype: str) -> None:
    schedule = SCHEDULES[0]
    plain = make_dit(layers=2)
    with replaying(plain, schedule.plan(2), quantized=dtype == "int8"):
        expected = sample(plain)
    model = dqar_fx.optimize(make_dit(layers=2), schedule, cache=CacheConfig(dtype=dtype), fullgraph=True)
    got = sample(model)
    assert float((got - expected).norm() / expected.norm()) < (2e-4 if dtype == "int8" else 1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(sample(model), got)


@pytest.mark.parametrize("backend", ["aot_eager", "own"])
def test_any_backend_compiles_the_pieces(backend: str) -> None:
    compiled: list[int] = []

    def own(gm: torch.fx.GraphModule, inputs: list[Tensor]):  # type: ignore[no-untyped-def]
        compiled.append(len(gm.graph.nodes))
        return gm.forward

    schedule = SCHEDULES[0]
    model = dqar_fx.optimize(make_dit(), schedule, backend=own if backend == "own" else backend)
    reference = dqar_fx.optimize(make_dit(), schedule, backend="eager")
    torch.testing.assert_close(sample(model), sample(reference), rtol=1e-5, atol=1e-6)
    assert backend != "own" or len(compiled) == dqar_fx.runtime(model).stats.variants


@pytest.mark.parametrize("schedule", [SCHEDULES[1], SCHEDULES[-1]], ids=str)
def test_one_capture_and_at_most_nine_pieces_whatever_the_depth(schedule: Schedule) -> None:
    model = dqar_fx.optimize(make_dit(layers=12), schedule, backend="eager", fullgraph=True)
    sample(model)
    stats = dqar_fx.runtime(model).stats
    assert (stats.captures, stats.graph_breaks) == (1, 0)
    assert stats.variants <= 9
    with torch.compiler.set_stance("fail_on_recompile"):
        sample(model, seed=3)
    assert dqar_fx.runtime(model).stats.variants == stats.variants
    plan = schedule.plan(12)
    assert [d.action == "reuse" for d in dqar_fx.runtime(model).stats.decisions] == plan.reuse.flatten().tolist()
    assert [d.reason for d in dqar_fx.runtime(model).stats.decisions] == [
        plan.reason(t, s) for t in range(NUM_STEPS) for s in range(12)
    ]


def test_the_cache_takes_one_byte_a_value_and_four_a_token() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")
    sample(model)
    tokens, width = 16, 32
    assert dqar_fx.runtime(model).stats.cache_bytes == 3 * (2 * tokens * width + 4 * 2 * tokens)
    assert dqar_fx.runtime(model).report().to_dict()["sites"][0]["cache_bytes"] == 2 * tokens * width + 4 * 2 * tokens


@pytest.mark.parametrize(
    ("granularity", "scales"), [("token", 2 * 16), ("tensor", 2), ("channel", 2 * 32), ("head", 2 * 2)]
)
def test_every_granularity_changes_the_cache_and_the_result(granularity: str, scales: int) -> None:
    def run(cache: CacheConfig) -> Tensor:
        model = dqar_fx.optimize(make_dit(), SCHEDULES[0], cache=cache, backend="eager")
        result = sample(model)
        if cache.granularity == granularity:
            assert dqar_fx.runtime(model).stats.cache_bytes == 3 * (2 * 16 * 32 + 4 * scales)
        return result

    other = "token" if granularity == "tensor" else "tensor"
    got = run(CacheConfig(granularity=granularity))
    assert not torch.equal(got, run(CacheConfig(granularity=other)))
    native = dqar_fx.optimize(make_dit(), SCHEDULES[0], cache=CacheConfig(dtype="native"), backend="eager")
    exact = sample(native)
    assert 0 < float((got - exact).norm() / exact.norm()) < 0.01


def test_stored_values_keep_their_addresses() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")
    sample(model)
    store = next(iter(dqar_fx.runtime(model)._generation()._stores.values())).store
    before = [t.data_ptr() for site in store.buffers for parts in site or [] for t in parts]
    sample(model, seed=4)
    assert [t.data_ptr() for site in store.buffers for parts in site or [] for t in parts] == before


def test_joint_attention_stores_both_streams() -> None:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 8),
    }  # fmt: skip
    dqar_fx.optimize(model, Schedule.always(3), cache=CacheConfig(dtype="native"), backend="eager", fullgraph=True)
    with torch.no_grad():
        for step in range(3):
            model(**inputs, timestep=torch.tensor([900.0 - 100 * step]))
    sites = dqar_fx.runtime(model).sites
    assert [(s.kind, len(s.exits)) for s in sites] == [("joint", 2), ("joint", 1)] or [len(s.exits) for s in sites] == [
        2,
        1,
    ]  # the last block gives its text stream away
    assert dqar_fx.runtime(model).stats.reused == 4


def test_only_selected_sites_are_rewritten() -> None:
    for sites in ("transformer_blocks.1.*", ["*.1.attn1"], lambda site: site.path.endswith("1.attn1")):
        model = dqar_fx.optimize(make_dit(), SCHEDULES[0], sites=sites, backend="eager")
        sample(model)
        runtime = dqar_fx.runtime(model)
        assert [s.path for s in runtime.sites] == ["transformer_blocks.1.attn1"]
        assert [(s.path, s.reason) for s in runtime.report().skipped] == [
            (f"transformer_blocks.{i}.attn1", "not selected by `sites`") for i in (0, 2)
        ]


def test_the_diff_shows_one_guard_a_site() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")
    sample(model, steps=1)
    added = [
        line
        for line in dqar_fx.runtime(model).diff().splitlines()
        if line.startswith("+") and "= reuse_or_compute(" in line
    ]
    assert len(added) == 3


def test_the_report_is_a_table_and_plain_values() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")
    assert "nothing captured yet" in str(dqar_fx.runtime(model).report())
    assert dqar_fx.runtime(model).plan is None
    sample(model)
    report = dqar_fx.runtime(model).report()
    assert "transformer_blocks.2.attn1" in str(report)
    data = report.to_dict()
    assert data["reuse_ratio"] == pytest.approx(data["planned_reuse_ratio"])
    assert sum(s["reused"] for s in data["sites"]) == data["reused"] == dqar_fx.runtime(model).stats.reused
    assert dqar_fx.runtime(model).plan == SCHEDULES[0].plan(3)


# -- identity given by hand, by the scheduler ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DDIMScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_scheduler_plans_for_its_steps_and_reads_nothing(kind: type) -> None:
    scheduler = kind()
    model = dqar_fx.optimize(make_dit(), Schedule.interval(50, every=2, warmup=1), scheduler=scheduler, backend="eager")
    for steps in (4, 7):
        scheduler.set_timesteps(steps)
        latent, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
        reads = CountsReads()
        for t in scheduler.timesteps:
            with torch.no_grad(), reads:
                noise = model(latent, timestep=(t + 0).expand(2), class_labels=labels).sample
            latent = scheduler.step(noise, t, latent).prev_sample
        assert reads.reads == 0
        plan = Schedule.interval(steps, every=2, warmup=1).plan(3)
        assert dqar_fx.runtime(model).plan == plan
        assert [d.action == "reuse" for d in dqar_fx.runtime(model).stats.decisions] == plan.reuse.flatten().tolist()


def test_a_run_that_starts_in_the_middle_computes_what_is_not_stored() -> None:
    scheduler = DDIMScheduler()
    model = dqar_fx.optimize(make_dit(), Schedule.interval(10, every=3, warmup=1), scheduler=scheduler, backend="eager")
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps[5:]:
            model(torch.randn(2, 4, 8, 8), timestep=t.expand(2), class_labels=torch.tensor([1, 2]))
    first = [d for d in dqar_fx.runtime(model).stats.decisions if d.step == 5]
    assert {(d.action, d.reason) for d in first} == {("compute", "empty")}
    assert dqar_fx.runtime(model).stats.reused > 0


def test_steps_by_hand_need_no_timestep() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    with pytest.warns(UserWarning, match="begin_step"):
        model = dqar_fx.optimize(Denoiser().eval(), Schedule.always(3), backend="eager")
    x = torch.randn(1, 4, 8)
    runtime = dqar_fx.runtime(model)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        assert runtime.stats.reused == 0
        with runtime.generation(3):
            for step in range(3):
                runtime.begin_step(step)
                model(x + step)
            assert [d.action for d in runtime.stats.decisions] == ["compute", "reuse", "reuse"]


def test_a_generation_plans_for_its_own_number_of_steps() -> None:
    model = dqar_fx.optimize(make_dit(), Schedule.interval(50, every=2, warmup=0.5), backend="eager")
    runtime = dqar_fx.runtime(model)
    with runtime.generation(num_steps=4):
        sample(model, steps=4)
        assert runtime.plan == Schedule.interval(4, every=2, warmup=0.5).plan(3)
        assert runtime.stats.reuse_ratio == runtime.plan.reuse_ratio > 0
    assert runtime.stats.cache_bytes == 0
    assert runtime.stats.steps == 4  # what happened can still be asked


def test_reset_frees_and_starts_anew() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")
    sample(model)
    runtime = dqar_fx.runtime(model)
    assert runtime.stats.cache_bytes > 0
    runtime.reset()
    assert runtime.stats.cache_bytes == 0
    with torch.no_grad():
        model(torch.randn(2, 4, 8, 8), timestep=timestep(3), class_labels=torch.tensor([1, 2]))
    assert {d.step for d in runtime.stats.decisions} == {0}


def test_importing_the_package_needs_no_diffusers_and_gives_the_digits() -> None:
    code = "import sys, dqar_fx; assert 'diffusers' not in sys.modules; assert callable(dqar_fx.digits.load)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dqar_fx.nothing  # noqa: B018


# -- living with the module -------------------------------------------------------------------------------------------


def test_the_same_module_comes_back_and_restore_leaves_no_trace() -> None:
    model = make_dit()
    before = dict(vars(model))
    scheduler = DDIMScheduler()
    step = vars(scheduler).copy()
    assert dqar_fx.optimize(model, SCHEDULES[0], scheduler=scheduler, backend="eager") is model
    sample(model)
    assert dqar_fx.restore(model) is model
    after = {k: v for k, v in vars(model).items() if k != "_compiled_call_impl"}
    assert after == {k: v for k, v in before.items() if k != "_compiled_call_impl"}
    assert model._compiled_call_impl is None
    assert vars(scheduler) == step
    assert torch.equal(sample(model), sample(make_dit()))
    with pytest.raises(RuntimeStateError, match="not optimised"):
        dqar_fx.runtime(model)


def test_a_model_can_be_optimised_again_and_again() -> None:
    model = make_dit(layers=1)
    for i in range(9):  # more often than Dynamo's recompile limit
        dqar_fx.optimize(model, SCHEDULES[i % len(SCHEDULES)], backend="eager", fullgraph=True)
        sample(model)
        assert dqar_fx.runtime(model).stats.reused > 0
        dqar_fx.restore(model)


def test_a_copy_is_not_optimised_and_weights_keep_their_names() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")
    sample(model)
    assert list(model.state_dict()) == list(make_dit().state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeStateError):
            dqar_fx.runtime(other)
        assert torch.equal(sample(other), sample(make_dit()))


def test_a_dropped_model_is_freed() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")
    sample(model)
    gone = weakref.ref(dqar_fx.runtime(model))
    dqar_fx.restore(model)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert gone() is None


def test_branches_named_through_diffusers_reach_the_runtime() -> None:
    class WithContext(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_dit(1)
            self.names: list[str] = []

        from contextlib import contextmanager

        @contextmanager
        def cache_context(self, name: str):  # type: ignore[no-untyped-def]
            self.names.append(name)
            yield

        def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
            return self.inner(x, timestep=timestep, class_labels=y).sample

    model = dqar_fx.optimize(WithContext().eval(), Schedule.always(2), backend="eager")
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        for step in range(2):
            for name in ("cond", "uncond"):
                with model.cache_context(name):
                    model(x, timestep(step), y)
    decisions = dqar_fx.runtime(model).stats.decisions
    assert [(d.branch, d.action) for d in decisions] == [
        ("cond", "compute"), ("uncond", "compute"), ("cond", "reuse"), ("uncond", "reuse"),
    ]  # fmt: skip
    assert model.names == ["cond", "uncond"] * 2  # the model's own is still called
    copied = copy.deepcopy(model)
    assert copied.cache_context.__self__ is copied


def test_intermediate_values_are_freed_at_their_last_use() -> None:
    model = dqar_fx.optimize(make_dit(layers=4), Schedule.none(2), backend="eager")
    sample(model, steps=2)
    graph = dqar_fx.runtime(model).graphs[0]
    (program,) = [p for p in graph._programs.values() if p.compiled]
    made = {r for step in program.steps for r in step.results} - set(graph._returned)
    assert made
    for register in made:
        readers = [i for i, step in enumerate(program.steps) if register in step.arguments]
        assert register in program.freed[readers[-1]]


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_sizes_take_turns(dynamic: bool | None) -> None:
    schedule, cache = SCHEDULES[0], CacheConfig(dtype="native")
    model = dqar_fx.optimize(make_dit(), schedule, cache=cache, backend="eager", dynamic=dynamic)
    for batch in (2, 3, 4, 2):
        plain = make_dit()
        with replaying(plain, schedule.plan(3)):
            assert torch.equal(sample(model, batch=batch), sample(plain, batch=batch))
        assert dqar_fx.runtime(model).stats.cache_bytes == 3 * batch * 16 * 32 * 4  # the old size is gone
    assert dqar_fx.runtime(model).stats.captures == (1 if dynamic else 2)


def test_numbers_of_the_model_reach_inductor_with_dynamic_shapes() -> None:
    # dynamic=True makes the embedding's float attributes inputs, as 0-d tensors.
    model = dqar_fx.optimize(make_dit(1), Schedule.always(2), dynamic=True)
    reference = dqar_fx.optimize(make_dit(1), Schedule.always(2), backend="eager")
    torch.testing.assert_close(sample(model, steps=2), sample(reference, steps=2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    start = torch.randn(2, 4, 8, 8).to(dtype)
    plain = make_dit().to(dtype)
    with replaying(plain, SCHEDULES[0].plan(3)):
        expected = sample(plain, start=start)
    cache = CacheConfig(dtype="native")
    model = dqar_fx.optimize(make_dit().to(dtype), SCHEDULES[0], cache=cache, backend="eager")
    assert torch.equal(sample(model, start=start), expected)
    assert dqar_fx.runtime(model).stats.cache_bytes == 3 * 2 * 16 * 32 * 2


def test_inference_mode_and_no_grad_share_the_cache() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")
    first = sample(model)
    with torch.inference_mode():
        assert torch.equal(sample(model), first)
    assert torch.equal(sample(model), first)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_gradients_are_refused_before_anything_is_compiled() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")
    with pytest.raises(CaptureError, match=r"no_grad"):
        model(torch.randn(2, 4, 8, 8), timestep=timestep(0), class_labels=torch.tensor([1, 2]))
    assert dqar_fx.runtime(model).stats.variants == 0


def test_dropout_in_training_mode_is_refused() -> None:
    model = make_dit().train()
    with pytest.raises(CaptureError, match=r"dropout.*eval\(\)"):
        dqar_fx.optimize(model, SCHEDULES[0])
    assert model._compiled_call_impl is None


def test_a_plan_for_other_sites_or_steps_is_refused() -> None:
    compiled: list[object] = []
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0].plan(5), backend=lambda gm, _: compiled.append(gm) or gm.forward)
    with pytest.raises(PlanError, match=r"5.*3|3.*5"):
        sample(model)
    assert not compiled
    dqar_fx.restore(model)
    dqar_fx.optimize(model, SCHEDULES[0].plan(3), backend="eager")
    with pytest.raises(PlanError, match="8"), dqar_fx.runtime(model).generation(8):
        pass


def test_a_model_without_attention_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.linear(x) * t

    model = dqar_fx.optimize(Plain().eval(), SCHEDULES[0], backend="eager")
    with pytest.raises(CaptureError, match="scaled_dot_product_attention"), torch.no_grad():
        model(torch.randn(2, 8), torch.tensor(3.0))


def test_running_eager_is_said() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")
    with torch.compiler.set_stance("force_eager"), pytest.warns(UserWarning, match="ran eager") as caught:
        assert torch.equal(sample(model), sample(make_dit()))
    assert len(caught) == 1
    sample(model)
    assert dqar_fx.runtime(model).stats.reused > 0


def test_a_filter_that_leaves_nothing_is_refused() -> None:
    model = dqar_fx.optimize(make_dit(), SCHEDULES[0], sites="nothing.*", backend="eager")
    with pytest.raises(CaptureError, match="selected by `sites`"):
        sample(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "interval"}, "schedule is a str"),
        ({"cache": "int8"}, "cache is a str"),
        ({"scheduler": object()}, "scheduler is a object"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DqarError, match=message):
        dqar_fx.optimize(make_dit(), **{"schedule": SCHEDULES[0], **arguments})  # type: ignore[arg-type]


def test_what_cannot_be_optimised_is_refused() -> None:
    model = make_dit()
    with pytest.raises(RuntimeStateError, match="not optimised"):
        dqar_fx.restore(model)
    with pytest.raises(CaptureError, match=r"not an nn\.Module"):
        dqar_fx.optimize(lambda x: x, SCHEDULES[0])  # type: ignore[type-var]
    with pytest.raises(RuntimeStateError, match="_orig_mod"):
        dqar_fx.optimize(torch.compile(model), SCHEDULES[0])
    dqar_fx.optimize(model, SCHEDULES[0])
    with pytest.raises(RuntimeStateError, match="restore"):
        dqar_fx.optimize(model, SCHEDULES[0])
    other = make_dit()
    other.compile()
    with pytest.raises(RuntimeStateError, match=r"model\.compile\(\)"):
        dqar_fx.optimize(other, SCHEDULES[0])


def test_misuse_of_the_runtime_is_named() -> None:
    runtime = dqar_fx.runtime(dqar_fx.optimize(make_dit(), SCHEDULES[0]))
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(RuntimeStateError, match="num_steps"), runtime.generation(wrong):  # type: ignore[arg-type]
            pass
    for wrong in (-1, 1.5, True):
        with pytest.raises(RuntimeStateError, match="begin_step"):
            runtime.begin_step(wrong)  # type: ignore[arg-type]


def test_a_saved_plan_runs_like_the_schedule(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan = SCHEDULES[0].plan(3)
    plan.save(tmp_path / "plan.json")
    model = dqar_fx.optimize(make_dit(), Plan.load(tmp_path / "plan.json"), backend="eager")
    assert torch.equal(sample(model), sample(dqar_fx.optimize(make_dit(), SCHEDULES[0], backend="eager")))
