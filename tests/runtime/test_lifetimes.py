"""Nothing is stored that nobody reads later, and values that are not alive together may have the same memory."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, ChangeGate, EntropyGate, Gates, Plan, Schedule
from dqar_fx.graph.specialise import STORING, Outcome
from dqar_fx.runtime import plans
from dqar_fx.runtime.generation import StepTable
from dqar_fx.runtime.lifetimes import intervals, places, step_table
from dqar_fx.runtime.program import CapturedGraph
from tests.runtime.test_cross_branch import Small, make_small

STEPS, SITES = 12, 3
#: Each site reuses at every fourth step, in turn, and is stored where the one before it reads.
STAGGERED = Schedule.custom(STEPS, lambda t, s, T, S: t > 0 and t % 4 == s)
#: A third of the run for each.
THIRDS = Schedule.custom(STEPS, lambda t, s, T, S: t > 0 and t % 4 > 0 and t // 4 == s)
LABELS = torch.tensor([1, 2])


def random_plan(seed: int, steps: int = STEPS, sites: int = SITES) -> Plan:
    reuse = np.random.default_rng(seed).random((steps, sites)) < 0.4
    reuse[0] = False
    return Plan(reuse)


def alive(plan: Plan, step: int) -> int:
    return sum(first <= step <= last for first, last, _ in intervals(plan.reuse.tolist()))


def call(model: nn.Module, step: int, seed: int = 0) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(100 * seed + step))
    with torch.no_grad():
        return model(x, timestep=torch.full((2,), 900.0 - 10 * step), class_labels=LABELS)


def optimized(schedule: Schedule | Plan, *, turns: bool = True, **settings: Any) -> nn.Module:
    settings = {"cache": CacheConfig(dtype="native"), "backend": "eager", **settings}
    model = dqar_fx.optimize(make_small(), schedule, **settings)
    with mock.patch.object(plans, "step_table", step_table if turns else StepTable):
        call(model, 0)  # the table is made now
    dqar_fx.runtime(model).reset()
    return model


# -- lifetimes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_there_are_as_many_places_as_values_are_ever_alive_at_once(seed: int) -> None:
    plan = random_plan(seed, 20, 6)
    lives = intervals(plan.reuse.tolist())
    assert {(step, site) for step, _, site in lives} == {tuple(i) for i in np.argwhere(plan.stores).tolist()}
    given = places(lives, ["alike"] * 6)
    assert len(set(given.values())) == max(alive(plan, step) for step in range(20))
    kinds = ["a", "a", "b", "b", None, None]
    for found, kind in ((given, ["alike"] * 6), (places(lives, kinds), kinds)):
        for one in lives:
            for other in lives:
                if one < other and found[one] == found[other]:
                    assert one[1] < other[0] or other[1] < one[0]
                    assert one[2] == other[2] or kind[one[2]] == kind[other[2]] is not None


def test_a_site_stays_where_it_was() -> None:
    lives = intervals(Schedule.interval(STEPS, every=3).plan(SITES).reuse.tolist())
    assert all(place == site for (_, _, site), place in places(lives, ["alike"] * SITES).items())


@pytest.mark.parametrize(
    "schedule",
    [Schedule.interval(50), Schedule.taper(50), Schedule.linear(50), Schedule.linear(50, fraction=1.0, refresh=2),
     Schedule.phases(50), Schedule.always(50), Schedule.none(50)],
    ids=str,
)  # fmt: skip
def test_where_all_sites_are_alive_at_once_nothing_is_done(schedule: Schedule) -> None:
    assert type(step_table(schedule.plan(12), 0, 12)) is StepTable


@pytest.mark.parametrize(
    ("schedule", "cache"),
    [
        (STAGGERED, CacheConfig()),
        (THIRDS, CacheConfig(dtype="native")),
        (THIRDS, CacheConfig(target="kv")),
        (random_plan(0), CacheConfig()),
    ],
    ids=["staggered", "thirds", "thirds, kv", "random"],
)
def test_sites_that_take_turns_give_the_same_results_in_less_memory(
    schedule: Schedule | Plan, cache: CacheConfig
) -> None:
    model, apart = (optimized(schedule, turns=turns, cache=cache) for turns in (True, False))
    plan = schedule.plan(SITES)
    for seed in range(2):
        for step in range(STEPS):
            assert torch.equal(call(model, step, seed), call(apart, step, seed))
        stats, others = dqar_fx.runtime(model).stats, dqar_fx.runtime(apart).stats
        assert stats.decisions == others.decisions
        most = max(alive(plan, step) for step in range(STEPS))
        assert stats.cache_bytes * SITES == others.cache_bytes * most
    assert most == (1 if schedule is THIRDS else 2)  # and three without


def test_sites_of_other_shapes_do_not_share() -> None:
    class Halved(Small):
        """Its last block sees half of the tokens."""

        def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
            condition = (1 + 0.3 * self.labels(class_labels) + timestep[:, None] / 1000)[:, None]
            tokens = self.embed(x.reshape(len(x), 16, 16))
            for block in self.transformer_blocks[:2]:
                tokens = block(tokens, condition)
            return self.transformer_blocks[2](tokens[:, :8], condition)

    torch.manual_seed(0)
    model = dqar_fx.optimize(Halved().eval(), THIRDS, cache=CacheConfig(dtype="native"), backend="eager")
    for step in range(STEPS):
        call(model, step)
    assert dqar_fx.runtime(model).stats.reused == int(THIRDS.plan(SITES).reuse.sum())
    assert dqar_fx.runtime(model).stats.cache_bytes == 2 * 16 * 16 * 4 + 2 * 8 * 16 * 4


class Watch:
    """Checks that each site reads what it was the last to store itself, at the step that is said."""

    def __init__(self) -> None:
        self.stored: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self.reads = 0

    def __call__(self, run: Any) -> Any:
        def watched(graph: CapturedGraph, arguments: Any, outcomes: Any, store: Any, *rest: Any) -> Any:
            given = [id(b) for b in store.buffers if b is not None]
            assert len(given) == len(set(given))
            for site, outcome in enumerate(outcomes):
                if outcome is Outcome.REUSE:
                    step, value = self.stored[id(store), site]
                    assert store.step[site] == step
                    assert torch.equal(store.of(site)[0][0], value)
                    self.reads += 1
            result = run(graph, arguments, outcomes, store, *rest)
            for site, outcome in enumerate(outcomes):
                if outcome in STORING:
                    self.stored[id(store), site] = store.step[site], store.of(site)[0][0].clone()
            return result

        return watched


def calls(seed: int) -> Iterator[tuple[int, str]]:
    """Steps as nobody planned them: repeated, left out, begun anew, in two branches."""
    rng = random.Random(seed)
    step = 0
    for _ in range(60):
        yield step, rng.choice(("", "", "other"))
        step = rng.choice((step, *[step + 1] * 8, step + 2, 0, rng.randrange(STEPS))) % STEPS


@pytest.mark.parametrize("keep", [False, True])
def test_whatever_a_caller_does_nobody_reads_what_another_site_has_written(keep: bool) -> None:
    cache = CacheConfig(dtype="native", keep_buffers=keep)
    for plan in (STAGGERED, random_plan(0)):
        model = optimized(plan, cache=cache)
        runtime = dqar_fx.runtime(model)
        watch = Watch()
        with mock.patch.object(CapturedGraph, "run", watch(CapturedGraph.run)):
            for seed in range(3):
                with runtime.generation(STEPS):
                    for step, branch in calls(seed):
                        if seed % 2:
                            runtime.begin_step(step)
                        with runtime.branch(branch):
                            call(model, step)
                        if seed == 2 and step == 5:
                            with torch.no_grad():
                                model.embed.weight.mul_(1.0)  # other weights, as far as anybody knows
        assert watch.reads > 20


def test_values_of_the_plan_before_are_not_read_under_another() -> None:
    model = optimized(THIRDS, cache=CacheConfig(dtype="native", keep_buffers=True))
    runtime, watch = dqar_fx.runtime(model), Watch()
    with mock.patch.object(CapturedGraph, "run", watch(CapturedGraph.run)):
        for schedule in (Schedule.interval(STEPS), STAGGERED, random_plan(0), THIRDS):
            for step in range(STEPS):
                call(model, step)
            runtime.follow(schedule)
    assert watch.reads > 10


# -- dead stores -------------------------------------------------------------------------------------------------------


def outcomes_of(runtime: dqar_fx.Runtime) -> dict[tuple[str, int], list[Outcome]]:
    """By branch and site, what it did at each step."""
    found: dict[tuple[str, int], list[Outcome]] = {}
    for _, branch, _, outcomes, _ in runtime._generation().log:
        for site, outcome in enumerate(outcomes):
            found.setdefault((branch, site), []).append(outcome)
    return found


@pytest.mark.parametrize(
    "schedule",
    [THIRDS, Schedule.interval(STEPS, every=3, warmup=2), Schedule.linear(STEPS, warmup=2, fraction=1.0),
     Schedule.linear(STEPS, warmup=2, fraction=1.0, refresh=3),
     Schedule.phases(STEPS, refresh=2), Schedule.taper(STEPS, first=4, last=0.5), Schedule.always(STEPS),
     Schedule.none(STEPS), random_plan(1)],
    ids=str,
)  # fmt: skip
def test_every_store_is_read_at_the_next_step(schedule: Schedule | Plan) -> None:
    model = optimized(schedule)
    runtime = dqar_fx.runtime(model)
    with runtime.generation(STEPS):
        for step in range(STEPS):
            for branch in ("cond", "uncond"):
                with runtime.branch(branch):
                    call(model, step)
        done = outcomes_of(runtime)
    assert len(done) == 2 * SITES
    for each in done.values():
        for now, after in zip(each, [*each[1:], Outcome.COMPUTE], strict=True):
            assert (now is Outcome.STORE) == (now is not Outcome.REUSE and after is Outcome.REUSE)


GATES = [
    Gates(entropy=None, snr=None, max_reuse=1),
    Gates(entropy=EntropyGate(0.5), snr=None),  # blocks
    Gates(entropy=EntropyGate(100.0), snr=None),  # blocks nothing
    Gates(entropy=None, snr=None, change=ChangeGate(0.05)),
]


@pytest.mark.parametrize("gates", GATES, ids=str)
@pytest.mark.parametrize(
    "schedule", [Schedule.interval(STEPS, every=3, warmup=3), random_plan(1)]
)  # fmt: skip
def test_behind_gates_only_what_a_step_to_come_may_read_is_stored(schedule: Schedule | Plan, gates: Gates) -> None:
    model = optimized(schedule, gates=gates)
    for step in range(STEPS):
        call(model, step)
    plan = schedule.plan(SITES)
    done = outcomes_of(dqar_fx.runtime(model))
    found: Counter[str] = Counter()
    for (_, site), each in done.items():
        for step, outcome in enumerate(each):
            read = step + 1 < STEPS and bool(plan.reuse[step + 1, site])
            # What measures how much has changed reads what was stored before.
            compared = gates.change is not None and step + 1 < STEPS and each[step + 1] is Outcome.MEASURE
            if outcome in STORING:
                assert read or compared
                found["stored"] += 1
            elif outcome is not Outcome.REUSE:
                assert not read
                found["not stored"] += 1
    assert found["stored"]
    assert found["not stored"] or gates.change is not None
