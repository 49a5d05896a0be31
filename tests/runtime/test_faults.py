"""Never a wrong image: what else may happen to a run, or between runs (``test_faults_of_families`` has the usual)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, Schedule
from tests.models import NUM_STEPS, make_dit, sample, timestep

SCHEDULE = Schedule.interval(NUM_STEPS, every=3, warmup=2)


def optimized(schedule: Schedule = SCHEDULE, **kwargs: object) -> nn.Module:
    return dqar_fx.optimize(make_dit(), schedule, backend="eager", **kwargs)  # type: ignore[arg-type]


def test_one_nan_sample_does_not_touch_the_other() -> None:
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    poisoned = start.clone()
    poisoned[1] = torch.nan
    for granularity in ("token", "tensor", "channel", "head"):
        cache = CacheConfig(granularity=granularity)
        assert torch.equal(
            sample(optimized(cache=cache), start=poisoned)[:, 0], sample(optimized(cache=cache), start=start)[:, 0]
        )


def loop(model: nn.Module, seed: int):  # type: ignore[no-untyped-def]
    """A generation that stops after each step, so that two can be interleaved."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(2)
    out = []
    for step in range(NUM_STEPS):
        with torch.no_grad():
            noise = model(x, timestep=timestep(step), class_labels=labels).sample
        x = x - 0.2 * noise
        out.append(noise)
        yield torch.stack(out)


def test_a_generation_inside_another_touches_nothing_of_it() -> None:
    model = optimized()
    alone = sample(model, seed=1), sample(model, seed=2)
    runtime = dqar_fx.runtime(model)
    with runtime.generation(NUM_STEPS):
        outer = loop(model, 1)
        for _ in range(4):
            next(outer)
        with runtime.generation(NUM_STEPS):
            *_, inner = loop(model, 2)
        *_, rest = outer
    assert torch.equal(rest, alone[0])
    assert torch.equal(inner, alone[1])


def test_tasks_that_take_turns_each_give_what_they_give_alone() -> None:
    model = optimized()
    alone = sample(model, seed=1), sample(model, seed=2)
    runtime = dqar_fx.runtime(model)

    async def task(seed: int) -> Tensor:
        with runtime.generation(NUM_STEPS):
            steps = loop(model, seed)
            for _ in range(NUM_STEPS):
                out = await asyncio.to_thread(next, steps)
            return out

    async def both() -> list[Tensor]:
        return await asyncio.gather(task(1), task(2))

    got = asyncio.run(both())
    assert torch.equal(got[0], alone[0])
    assert torch.equal(got[1], alone[1])


def test_every_change_of_weights_is_noticed() -> None:
    model, plain = optimized(Schedule.always(NUM_STEPS)), make_dit()
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 4])
    with torch.no_grad():
        for step in range(4):
            for m in (model, plain):
                m.transformer_blocks[1].attn1.to_v.weight.mul_(2)
            given = {"timestep": timestep(step), "class_labels": labels}
            assert torch.equal(model(x, **given).sample, plain(x, **given).sample)


def test_a_buffer_that_the_model_writes_itself_is_no_change_of_weights() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dit = make_dit(1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.dit(x, timestep=t, class_labels=y).sample

    model = dqar_fx.optimize(Counts().eval(), Schedule.always(4), backend="eager")
    with torch.no_grad():
        for step in range(4):
            model(torch.randn(2, 4, 8, 8), timestep(step), torch.tensor([1, 2]))
    assert int(model.calls) == 4
    assert dqar_fx.runtime(model).stats.reused == 3


def test_more_steps_than_planned_compute_and_warn_once() -> None:
    model = optimized(Schedule.always(3))
    with pytest.warns(UserWarning, match="planned for 3 steps") as caught:
        sample(model)
    sample(model)  # warned once: a second warning here would be an error
    assert len(caught) == 1
    assert [d.action for d in dqar_fx.runtime(model).stats.decisions if d.step >= 3] == ["compute"] * 9


def prompts(model: nn.Module, seed: int, steps: range, labels: Tensor) -> Tensor:
    """The calls of a run at ``steps`` of the schedule; ``labels`` is its conditioning."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return torch.stack([model(x, timestep=timestep(step), class_labels=labels).sample for step in steps])


def test_a_run_that_goes_on_after_another_reads_nothing_of_it() -> None:
    model, plain = optimized(Schedule.always(NUM_STEPS)), make_dit()
    first, second = torch.tensor([1, 2]), torch.tensor([3, 4])
    prompts(model, 1, range(3), first)
    prompts(model, 2, range(3), second)
    assert torch.equal(prompts(model, 1, range(3, 4), first), prompts(plain, 1, range(3, 4), first))
    assert {d.reason for d in dqar_fx.runtime(model).stats.decisions} == {"warmup"}  # the first step of a run


def test_a_loop_that_makes_its_inputs_anew_is_told_why_nothing_is_reused() -> None:
    model, plain = optimized(Schedule.always(NUM_STEPS)), make_dit()

    def step_by_step(model: nn.Module) -> list[Tensor]:
        return [prompts(model, 0, range(i, i + 1), torch.tensor([i, i])) for i in range(NUM_STEPS)]

    with pytest.warns(UserWarning, match="class_labels were new tensors at each of the last 4 steps"):
        computed = step_by_step(model)
    assert all(map(torch.equal, computed, step_by_step(plain)))
    with dqar_fx.runtime(model).generation(NUM_STEPS):
        step_by_step(model)
        assert dqar_fx.runtime(model).stats.reused == 3 * (NUM_STEPS - 1)


def test_a_loop_that_stands_still_inside_its_generation_is_not_taken_for_the_caller() -> None:
    model, plain = optimized(Schedule.always(NUM_STEPS)), make_dit()

    def inside() -> Iterator[None]:
        with dqar_fx.runtime(model).generation(NUM_STEPS):
            labels = torch.tensor([1, 2])
            for step in range(NUM_STEPS):
                prompts(model, 1, range(step, step + 1), labels)
                yield

    loop = inside()
    next(loop)
    labels = torch.tensor([3, 4])
    assert torch.equal(prompts(model, 2, range(1, 2), labels), prompts(plain, 2, range(1, 2), labels))
    loop.close()


def test_a_generation_inside_a_context_manager_is_the_one_around_its_body() -> None:
    model = optimized(Schedule.always(NUM_STEPS))

    @contextlib.contextmanager
    def my_own() -> Iterator[None]:
        with dqar_fx.runtime(model).generation(NUM_STEPS):
            yield

    labels = torch.tensor([3, 4])
    with my_own():
        prompts(model, 1, range(NUM_STEPS), labels)
        assert dqar_fx.runtime(model).stats.reused == 3 * (NUM_STEPS - 1)
    assert dqar_fx.runtime(model).stats.cache_bytes == 0
