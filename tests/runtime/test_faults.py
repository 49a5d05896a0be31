"""Never a wrong image: whatever happened before, a generation equals one on a fresh model, bit for bit."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, Schedule
from dqar_fx.runtime.entered import open_generations
from tests.models import NUM_STEPS, make_dit, sample, timestep

SCHEDULE = Schedule.interval(NUM_STEPS, every=3, warmup=2)


def optimized(schedule: Schedule = SCHEDULE, **kwargs: object) -> nn.Module:
    return dqar_fx.optimize(make_dit(), schedule, backend="eager", **kwargs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clean() -> Tensor:
    return sample(optimized(), seed=1)


def test_the_clean_run_does_reuse(clean: Tensor) -> None:
    assert not torch.equal(clean, sample(make_dit(), seed=1))


@pytest.mark.parametrize("after", range(1, NUM_STEPS))
def test_an_abandoned_generation_leaves_nothing(clean: Tensor, after: int) -> None:
    model = optimized()
    sample(model, seed=2, steps=NUM_STEPS)
    partial(model, after)
    assert torch.equal(sample(model, seed=1), clean)


def partial(model: nn.Module, steps: int) -> None:
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 4])
    with torch.no_grad():
        for step in range(steps):
            model(x, timestep=timestep(step), class_labels=labels)


@pytest.mark.parametrize("at", [0, 1, 3, 4])
def test_an_exception_inside_the_model_leaves_nothing(clean: Tensor, at: int) -> None:
    model = optimized()
    partial(model, at)
    with pytest.raises(RuntimeError), torch.no_grad():
        model(
            torch.randn(2, 5, 8, 8), timestep=timestep(at), class_labels=torch.tensor([3, 4])
        )  # five channels, not four
    assert torch.equal(sample(model, seed=1), clean)


def test_an_exception_between_store_and_use_leaves_nothing(clean: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = optimized()
    partial(model, 1)
    graph = dqar_fx.runtime(model)._graphs[0]
    run = type(graph).run
    monkeypatch.setattr(type(graph), "run", lambda *a: (run(*a), 1 / 0))
    with pytest.raises(ZeroDivisionError), torch.no_grad():  # the values are written, the caller never saw the result
        model(torch.randn(2, 4, 8, 8), timestep=timestep(1), class_labels=torch.tensor([3, 4]))
    monkeypatch.undo()
    with torch.no_grad():
        model(torch.randn(2, 4, 8, 8), timestep=timestep(2), class_labels=torch.tensor([3, 4]))
    assert dqar_fx.runtime(model).stats.reused == 0
    assert torch.equal(sample(model, seed=1), clean)


def test_another_batch_size_in_the_middle_computes_and_says_shape() -> None:
    model, plain = optimized(), make_dit()
    partial(model, 2)
    x, labels = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3])
    with torch.no_grad():
        given = {"timestep": timestep(2, batch=3), "class_labels": labels}
        assert torch.equal(model(x, **given).sample, plain(x, **given).sample)
    assert {d.reason for d in dqar_fx.runtime(model).stats.decisions if d.step == 2} == {"shape"}


def test_another_batch_size_between_generations(clean: Tensor) -> None:
    model = optimized()
    sample(model, seed=5, batch=3)
    assert torch.equal(sample(model, seed=1), clean)
    assert torch.equal(sample(model, seed=5, batch=3), sample(optimized(), seed=5, batch=3))


@pytest.mark.parametrize("dtype", ["native", "int8"])
def test_nan_latents_stay_in_their_generation(dtype: str) -> None:
    cache = CacheConfig(dtype=dtype)
    model = optimized(cache=cache)
    poisoned = sample(model, start=torch.full((2, 4, 8, 8), torch.nan))
    assert poisoned.isnan().all()  # and are never hidden
    assert torch.equal(sample(model, seed=1), sample(optimized(cache=cache), seed=1))


def test_one_nan_sample_does_not_touch_the_other() -> None:
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    poisoned = start.clone()
    poisoned[1] = torch.nan
    for granularity in ("token", "tensor", "channel", "head"):
        cache = CacheConfig(granularity=granularity)
        assert torch.equal(
            sample(optimized(cache=cache), start=poisoned)[:, 0], sample(optimized(cache=cache), start=start)[:, 0]
        )


def test_two_threads_each_give_what_they_give_alone() -> None:
    model = optimized()
    sample(model, seed=9)  # captured and compiled
    alone = {seed: sample(model, seed=seed) for seed in (1, 2)}
    got: dict[int, Tensor] = {}
    barrier = threading.Barrier(2)

    def work(seed: int) -> None:
        barrier.wait()
        for _ in range(3):
            got[seed] = sample(model, seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, value in alone.items():
        assert torch.equal(got[seed], value)


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


def test_two_generators_that_take_turns_each_give_what_they_give_alone() -> None:
    model = optimized()
    alone = sample(model, seed=1), sample(model, seed=2)
    runtime = dqar_fx.runtime(model)

    def entered(seed: int):  # type: ignore[no-untyped-def]
        with runtime.generation(NUM_STEPS):
            yield from loop(model, seed)

    first, second = entered(1), entered(2)
    next(first)  # one step ahead
    for got in zip(first, second, strict=False):
        last = got
    *_, rest = second
    assert torch.equal(last[0], alone[0])
    assert torch.equal(rest, alone[1])
    assert not open_generations.get()


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


def test_two_runs_interleaved_without_a_word_compute_and_never_mix() -> None:
    model, plain = optimized(), make_dit()
    first, second = loop(model, 1), loop(model, 2)
    for a, b, c, d in zip(first, second, loop(plain, 1), loop(plain, 2), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert dqar_fx.runtime(model).stats.reused == 0


def guided(model: nn.Module, named: bool) -> Tensor:
    """Guidance in two calls a step."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    out = []
    with torch.no_grad():
        for step in range(NUM_STEPS):
            parts = []
            for name, label in (("cond", 3), ("uncond", 10)):
                given = {"timestep": timestep(step), "class_labels": torch.full((2,), label)}
                if named and hasattr(model, "_compiled_call_impl") and model._compiled_call_impl is not None:
                    with dqar_fx.runtime(model).branch(name):
                        parts.append(model(x, **given).sample)
                else:
                    parts.append(model(x, **given).sample)
            noise = parts[1] + 2 * (parts[0] - parts[1])
            x = x - 0.2 * noise
            out.append(noise)
    return torch.stack(out)


def test_branches_have_stores_of_their_own() -> None:
    model = optimized()
    together = guided(model, named=True)
    stats = dqar_fx.runtime(model).stats
    assert stats.reuse_ratio == SCHEDULE.plan(3).reuse_ratio
    assert {d.branch for d in stats.decisions} == {"cond", "uncond"}
    # The oracle: two models, one for each branch.
    cond, uncond = optimized(), optimized()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for step in range(NUM_STEPS):
            c = cond(x, timestep=timestep(step), class_labels=torch.full((2,), 3)).sample
            u = uncond(x, timestep=timestep(step), class_labels=torch.full((2,), 10)).sample
            noise = u + 2 * (c - u)
            assert torch.equal(noise, together[step])
            x = x - 0.2 * noise


def test_unnamed_branches_compute() -> None:
    model = optimized(Schedule.always(NUM_STEPS))
    assert torch.equal(guided(model, named=False), guided(make_dit(), named=False))
    assert dqar_fx.runtime(model).stats.reused == 0
    assert f"{NUM_STEPS} calls came at a step that had been called already" in str(dqar_fx.runtime(model).report())


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_weights_changed_in_the_middle_are_noticed(how: str) -> None:
    model, plain = optimized(), make_dit()
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 4])
    with torch.no_grad():
        for step in range(2):
            model(x, timestep=timestep(step), class_labels=labels)
        for m in (model, plain):
            weight = m.transformer_blocks[1].attn1.to_v.weight
            if how == "in place":
                weight.mul_(2)
            else:
                m.transformer_blocks[1].attn1.to_v.weight = nn.Parameter(weight * 2)
        given = {"timestep": timestep(2), "class_labels": labels}
        assert torch.equal(model(x, **given).sample, plain(x, **given).sample)


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


def test_leaving_a_generation_by_an_exception_frees_it() -> None:
    model = optimized()
    runtime = dqar_fx.runtime(model)

    def interrupted() -> None:
        with runtime.generation(NUM_STEPS):
            partial(model, 3)
            assert runtime.stats.cache_bytes > 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert runtime.stats.cache_bytes == 0
    with runtime.generation(NUM_STEPS), torch.no_grad():
        model(torch.randn(2, 4, 8, 8), timestep=timestep(3), class_labels=torch.tensor([3, 4]))
        assert runtime.stats.reused == 0


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


def test_a_run_that_begins_below_an_abandoned_one_reads_nothing_of_it() -> None:
    model, plain = optimized(Schedule.always(NUM_STEPS)), make_dit()
    prompts(model, 1, range(1), torch.tensor([1, 2]))
    labels = torch.tensor([3, 4])  # image to image: the first timestep is lower, as the next one of a run would be
    assert torch.equal(prompts(model, 2, range(1, 2), labels), prompts(plain, 2, range(1, 2), labels))


def test_a_run_abandoned_after_one_call_leaves_nothing_even_with_a_warm_up_of_one_step() -> None:
    schedule = Schedule.always(NUM_STEPS, warmup=1)
    model, labels = optimized(schedule), torch.tensor([3, 4])
    clean = prompts(optimized(schedule), 2, range(NUM_STEPS), labels)
    prompts(model, 1, range(1), torch.tensor([1, 2]))
    assert torch.equal(prompts(model, 2, range(NUM_STEPS), labels), clean)


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
