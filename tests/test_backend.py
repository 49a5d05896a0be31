"""The pass by its name: ``torch.compile(model, backend="dqar_fx", options={...})``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, CaptureError, RuntimeStateError, Schedule
from tests.models import NUM_STEPS, make_dit, sample, timestep

SCHEDULE = Schedule.interval(NUM_STEPS, every=3, warmup=1)
Y = torch.tensor([1, 2])


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(seed: int = 0, **options: Any) -> Any:
    options = {"schedule": SCHEDULE, "backend": "eager", **options}
    return torch.compile(make_dit(seed=seed), backend="dqar_fx", options=options)


def optimized(seed: int = 0, schedule: Schedule = SCHEDULE, **kwargs: Any) -> nn.Module:
    return dqar_fx.optimize(make_dit(seed=seed), schedule, backend="eager", **kwargs)


def test_the_entry_point_makes_it_known() -> None:
    assert "dqar_fx" in torch._dynamo.list_backends()


@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig(dtype="native")], ids=str)
def test_it_reuses_as_planned(cache: CacheConfig) -> None:
    model = compiled(cache=cache)
    expected = sample(optimized(cache=cache))
    assert torch.equal(sample(model), expected)
    assert torch.equal(sample(model), expected)  # the next generation is recognised
    plan = SCHEDULE.plan(3).reuse
    decisions = dqar_fx.runtime(model).stats.decisions
    assert [d.action == "reuse" for d in decisions] == plan.reshape(-1).tolist()
    assert not torch.equal(expected, sample(make_dit()))


def test_pieces_are_compiled_by_inductor_unless_told_otherwise() -> None:
    model = torch.compile(make_dit(layers=1), backend="dqar_fx", options={"schedule": Schedule.always(2)})
    reference = dqar_fx.optimize(make_dit(layers=1), Schedule.always(2), backend="eager")
    got, expected = sample(model, steps=2), sample(reference, steps=2)
    assert float((got - expected).norm() / expected.norm()) < 1e-4
    assert not torch.equal(got, expected)
    assert dqar_fx.runtime(model).stats.reused == 1


def test_the_runtime_is_there_after_the_first_call() -> None:
    model = compiled()
    with pytest.raises(RuntimeStateError, match="after its first call"):
        dqar_fx.runtime(model)
    sample(model, steps=1)
    runtime = dqar_fx.runtime(model)
    assert runtime.stats.captures == 1
    with runtime.generation(NUM_STEPS):
        sample(model)
        assert runtime.stats.reused == int(SCHEDULE.plan(3).reuse.sum())
    assert dqar_fx.runtime(model) is runtime


def by_keyword(model: Any, x: Tensor, t: Tensor) -> Tensor:
    return model(x, timestep=t, class_labels=Y).sample


def by_position(model: Any, x: Tensor, t: Tensor) -> Tensor:
    return model(x, t, Y).sample


@pytest.mark.parametrize("call", [by_keyword, by_position])
def test_the_timestep_is_recognised(call: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    model, expected = compiled(), optimized()
    with torch.no_grad():
        for step in range(NUM_STEPS):
            x = torch.randn(2, 4, 8, 8)
            assert torch.equal(call(model, x, timestep(step)), by_keyword(expected, x, timestep(step)))
    assert [d.step for d in dqar_fx.runtime(model).stats.decisions] == [s for s in range(NUM_STEPS) for _ in range(3)]
    assert dqar_fx.runtime(model).stats.reused > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "needs a schedule: torch.compile"),
        ({"cache": CacheConfig()}, "needs a schedule: torch.compile"),
        (
            {"schedule": SCHEDULE, "cahce": CacheConfig()},
            r"unknown options for backend \"dqar_fx\": \['cahce'\]. Known: sch",
        ),
        ({"schedule": "interval"}, "schedule is a str. Pass a dqar_fx.Schedule"),
        ({"schedule": SCHEDULE, "cache": "int8"}, "cache is a str. Pass a dqar_fx.CacheConfig"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any] | None, message: str) -> None:
    model = torch.compile(make_dit(), backend="dqar_fx", options=options)
    with pytest.raises(Exception, match=message):  # Dynamo wraps what a backend raises in an error of its own
        sample(model, steps=1)


def test_two_models_do_not_mix() -> None:
    schedules = SCHEDULE, Schedule.always(NUM_STEPS)
    models = [compiled(seed, schedule=schedule) for seed, schedule in enumerate(schedules)]
    expected = [sample(optimized(seed, schedule)) for seed, schedule in enumerate(schedules)]
    for _ in range(2):
        for model, predictions in zip(models, expected, strict=True):
            assert torch.equal(sample(model), predictions)
    assert dqar_fx.runtime(models[0]) is not dqar_fx.runtime(models[1])
    for model, schedule in zip(models, schedules, strict=True):
        assert dqar_fx.runtime(model).stats.reused == int(schedule.plan(3).reuse.sum())


def test_models_with_other_options_step_by_step_do_not_mix() -> None:
    caches = CacheConfig(), CacheConfig(dtype="native")
    models = [compiled(seed, cache=cache) for seed, cache in enumerate(caches)]
    references = [optimized(seed, cache=cache) for seed, cache in enumerate(caches)]
    with torch.no_grad():
        for step in range(NUM_STEPS):
            x = torch.randn(2, 4, 8, 8)
            for model, reference in zip(models, references, strict=True):
                assert torch.equal(by_keyword(model, x, timestep(step)), by_keyword(reference, x, timestep(step)))


def test_models_with_equal_options_step_by_step_compute_rather_than_mix() -> None:
    # Dynamo takes equal options for the same backend and runs both models by one graph: their weights tell them apart.
    models, plain = [compiled(seed) for seed in range(2)], [make_dit(seed=seed) for seed in range(2)]
    with torch.no_grad():
        for step in range(NUM_STEPS):
            x = torch.randn(2, 4, 8, 8)
            for model, eager in zip(models, plain, strict=True):
                assert torch.equal(by_keyword(model, x, timestep(step)), by_keyword(eager, x, timestep(step)))


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="torch.compile cannot isolate yet"
)
def test_isolated_models_with_equal_options_reuse_each_its_own() -> None:
    models = [
        torch.compile(
            make_dit(seed=seed),
            backend="dqar_fx",
            options={"schedule": SCHEDULE, "backend": "eager"},
            isolate_recompiles=True,
        )
        for seed in range(2)
    ]
    references = [optimized(seed) for seed in range(2)]
    with torch.no_grad():
        for step in range(NUM_STEPS):
            x = torch.randn(2, 4, 8, 8)
            for model, reference in zip(models, references, strict=True):
                assert torch.equal(by_keyword(model, x, timestep(step)), by_keyword(reference, x, timestep(step)))
    assert all(dqar_fx.runtime(model).stats.reused > 0 for model in models)


def test_gradients_are_refused_by_name() -> None:
    model = compiled()
    with pytest.raises(CaptureError, match=r"called with gradients enabled.*torch.no_grad\(\)"):
        by_keyword(model, torch.randn(2, 4, 8, 8), timestep(0))
    assert torch.equal(sample(model), sample(optimized()))  # no harm done
