"""What depends on the timestep is computed for all steps at once, where these are known, and is right where not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, Schedule
from dqar_fx.graph.lower import Lowerer
from dqar_fx.runtime.timestep_values import Calendar, TimestepTable
from tests.counting import CountsProducts
from tests.graph.conftest import WIDTH, Attention, tokens
from tests.models import make_dit

STEPS = 6
BATCH = 2
#: Reuses the attention at one step: the others compute what the eager model computes.
REUSED = 4
SCHEDULE = Schedule.custom(STEPS, lambda step, *_: step == REUSED)

pytestmark = pytest.mark.usefixtures("fresh_inference")


@pytest.fixture(autouse=True)
def _as_if_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """``backend="eager"`` has nothing to gain, and computes step by step; here it stands for a compiler."""
    monkeypatch.setattr(Lowerer, "rounds_differently", True)


class Denoiser(nn.Module):
    """An attention and what a label and a timestep make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.attention = Attention()

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        time = timestep.reshape(-1, 1).float() / 100
        scale, shift = self.outer(F.silu(self.embed(time) + class_labels)).chunk(2, -1)
        return hidden_states + self.attention(hidden_states) * scale[:, None] + shift[:, None]

    def embed(self, time: Tensor) -> Tensor:
        return self.inner(time)


#: Products of a call: the attention's three (its projections, itself), and the timestep's two.
ATTENTION, TIMESTEP = 3, 2
#: Of each call of a run: all steps' values at the first, none later; the attention reused once.
RUN = [ATTENTION + TIMESTEP, *[ATTENTION] * 3, 0, ATTENTION]
ALONE = [ATTENTION + TIMESTEP] * 4 + [TIMESTEP, ATTENTION + TIMESTEP]


class Pair:
    """A model as it is, and optimised, with a scheduler; calls of both are compared."""

    def __init__(self, kind: type[Denoiser] = Denoiser, schedule: Schedule = SCHEDULE, **cache: Any) -> None:
        self.eager, self.mine = kind().eval(), kind().eval()
        self.mine.load_state_dict(self.eager.state_dict())
        self.scheduler = diffusers.DDIMScheduler()
        self.scheduler.set_timesteps(STEPS)
        dqar_fx.optimize(
            self.mine, schedule, cache=CacheConfig(dtype="native", **cache), backend="eager", scheduler=self.scheduler
        )
        self.runtime = dqar_fx.runtime(self.mine)
        self.latents = [tokens(BATCH) for _ in range(STEPS)]

    def call(self, step: int, labels: Tensor, told: Callable[[Tensor], Tensor], *, exact: bool = True) -> int:
        """One step of both, the timestep as ``told``; how many products the optimised one computed."""
        arguments = self.latents[step], told(self.scheduler.timesteps[step]), labels
        expected = self.eager(*arguments)
        with CountsProducts() as counter:
            found = self.mine(*arguments)
        self.scheduler.step(expected, self.scheduler.timesteps[step], self.latents[step])
        if exact:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return counter.products

    def run(self, labels: Tensor, told: Callable[[Tensor], Tensor] | None = None, *, anew: bool = True) -> list[int]:
        """A whole run; the products of each step."""
        if anew:
            self.scheduler.set_timesteps(STEPS)
        return [self.call(step, labels, told or expanded, exact=step != REUSED) for step in range(STEPS)]


def expanded(timestep: Tensor) -> Tensor:
    """As most pipelines tell it: a view into the scheduler's."""
    return timestep.expand(BATCH)


@pytest.fixture
def labels() -> Tensor:
    return torch.randn(BATCH, WIDTH)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From which step on values were computed, each time they were."""
    steps: list[int] = []
    inner = TimestepTable._computed

    def watched(self: TimestepTable, ahead: Any, arguments: Sequence[Any]) -> Any:
        steps.append(ahead.index)
        return inner(self, ahead, arguments)

    monkeypatch.setattr(TimestepTable, "_computed", watched)
    return steps


@pytest.mark.parametrize(
    "told",
    [
        expanded,
        lambda t: t,
        lambda t: t[None],
        lambda t: t.repeat(BATCH),  # by value, from here on
        lambda t: t.repeat(BATCH).float(),
        lambda t: (t / 1000).expand(BATCH),
        lambda t: (1 - t / 1000).repeat(BATCH),
        lambda t: (t / 1000).to(torch.bfloat16).repeat(BATCH),
    ],
)
def test_all_steps_at_once(told: Callable[[Tensor], Tensor], labels: Tensor) -> None:
    models = Pair()
    assert models.run(labels, told) == RUN
    assert models.run(labels.flip(0), told) == RUN  # another generation, from its first step on


def test_timesteps_that_are_not_the_schedulers_are_computed_with(labels: Tensor) -> None:
    models = Pair()
    assert models.run(labels, lambda t: t.repeat(BATCH) * 2) == ALONE
    assert models.runtime.graphs[0].timed is None


def test_a_graph_that_was_captured_with_known_timesteps_is_given_others(labels: Tensor) -> None:
    models = Pair()
    models.run(labels)
    assert models.run(labels, lambda t: t.repeat(BATCH) * 2) == ALONE
    each = torch.arange(BATCH)
    assert models.run(labels, lambda t: t + each) == ALONE  # one for each sample
    assert models.run(labels) == RUN


def test_what_the_values_follow_from_may_change(labels: Tensor, computed: list[int]) -> None:
    models = Pair()
    models.scheduler.set_timesteps(STEPS)
    for step in range(2):
        models.call(step, labels, expanded)
    other = labels * 2
    models.call(2, other, expanded)
    other += 1  # written into
    models.call(3, other, expanded)
    assert computed == [0, 2, 3]
    models.run(labels)
    computed.clear()
    models.scheduler.set_timesteps(STEPS)
    models.call(0, labels, expanded)
    for model in (models.eager, models.mine):
        model.outer.weight.mul_(-1)
    models.call(1, labels, expanded)
    for model in (models.eager, models.mine):
        model.inner.bias = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
    models.call(2, labels, expanded)
    assert computed == [0, 1, 2]


def test_the_schedulers_timesteps_may_change(labels: Tensor, computed: list[int]) -> None:
    models = Pair()
    models.run(labels)
    computed.clear()
    models.scheduler.set_timesteps(STEPS)
    models.call(0, labels, expanded)
    models.scheduler.timesteps[1:] += 3  # in place
    models.call(1, labels, expanded)
    models.call(2, labels, expanded)
    models.scheduler.set_timesteps(STEPS + 2)
    for step in range(STEPS):
        models.call(step, labels, expanded, exact=step != REUSED)
    assert computed == [0, 1, 0]


def test_a_run_may_begin_in_the_middle_and_again(labels: Tensor, computed: list[int]) -> None:
    models = Pair()
    for step in (2, 3, 5):
        models.call(step, labels, expanded)
    assert models.run(labels, anew=False) == RUN
    assert computed == [2, 0]


def test_labels_that_are_made_anew_at_every_step_do_not_cost_all_steps_each_time(
    labels: Tensor, computed: list[int]
) -> None:
    models = Pair()
    for _ in range(2):
        models.scheduler.set_timesteps(STEPS)
        computed.clear()
        for step in range(STEPS):
            models.call(step, labels.clone(), expanded, exact=step != REUSED)
        assert computed == [0, 1, 2]
    assert models.run(labels) == RUN


def test_each_branch_has_its_own(labels: Tensor, computed: list[int]) -> None:
    models = Pair()
    both = {"cond": labels, "uncond": torch.zeros_like(labels)}
    with models.runtime.generation(STEPS):
        for step in range(STEPS):
            for name, given in both.items():
                with models.runtime.branch(name):
                    models.call(step, given, expanded, exact=step != REUSED)
    assert computed == [0, 0]


def test_memory_is_reported_and_freed(labels: Tensor) -> None:
    models = Pair()
    models.scheduler.set_timesteps(STEPS)
    models.call(0, labels, expanded)
    row = BATCH * 2 * WIDTH * 4
    found = models.runtime.report().to_dict()["timestep_values"]
    assert (found["values"], found["bytes"]) == (1, STEPS * row)
    layers = (models.mine.inner, models.mine.outer)
    assert found["weight_bytes_per_step"] == sum(w.numel() * 4 for layer in layers for w in layer.parameters())
    assert "computed for all steps at once: 1 values" in str(models.runtime.report())
    site = BATCH * models.latents[0][0].numel() * 4
    for step in range(1, REUSED):
        models.call(step, labels, expanded)
    assert models.runtime.stats.cache_bytes == STEPS * row + site
    models.run(labels)
    (held,) = models.runtime._generation()._stores.values()
    assert held.store.rows is None  # the run is over


@pytest.mark.parametrize(
    ("schedule", "cache"), [(Schedule.none(STEPS), {}), (SCHEDULE, {"lossless": False})], ids=["baseline", "off"]
)
def test_a_baseline_and_who_switches_it_off_compute_at_every_step(
    schedule: Schedule, cache: dict[str, Any], labels: Tensor, computed: list[int]
) -> None:
    models = Pair(schedule=schedule, **cache)
    assert models.run(labels)[:REUSED] == ALONE[:REUSED]
    assert not computed
    assert not models.runtime.report().to_dict()["timestep_values"]["values"]


def test_backends_that_compute_as_torch_does_compute_at_every_step(
    labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    models = Pair()
    assert models.run(labels) == ALONE


class Unbatched(Denoiser):
    """Writes what differs from step to step into what does not, which ``vmap`` refuses."""

    def embed(self, time: Tensor) -> Tensor:
        return torch.zeros(BATCH, WIDTH).add_(self.inner(time))


def test_what_cannot_be_computed_for_all_steps_is_computed_for_each(labels: Tensor, computed: list[int]) -> None:
    models = Pair(Unbatched)
    assert models.run(labels)[1:] == ALONE[1:]
    assert models.run(labels) == ALONE
    assert computed == [0]  # tried once


def test_inputs_whose_writes_are_not_counted_are_not_relied_on(labels: Tensor, computed: list[int]) -> None:
    models = Pair()
    models.run(labels)
    computed.clear()
    with torch.inference_mode():
        models.run(labels.clone())
    assert not computed
    assert models.run(labels) == RUN


def test_more_steps_than_memory_was_meant_for(labels: Tensor, computed: list[int]) -> None:
    models = Pair()
    models.run(labels)
    graph = models.runtime.graphs[0]
    assert graph.timed is not None
    assert graph.hoisting is not None
    graph.hoisting._table._max_steps = STEPS - 1
    assert models.run(labels) == [*ALONE[:1], ATTENTION + TIMESTEP, *RUN[2:]]


def test_a_calendar_is_held_with_what_was_made_of_it() -> None:
    """Another tensor in the memory of one that is gone is another calendar."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    from dqar_fx.runtime.identity import SchedulerIdentity

    identity = SchedulerIdentity(scheduler)
    calendar = Calendar(identity)
    first = calendar.find(torch.tensor([int(scheduler.timesteps[2])]))
    assert first is not None
    assert (first.index, first.calendar) == (2, scheduler.timesteps)
    scheduler.set_timesteps(STEPS - 1)
    second = calendar.find(torch.tensor([int(scheduler.timesteps[2])]))
    assert second is not None
    assert second.calendar is scheduler.timesteps
    assert len(second.timesteps) == STEPS - 1
    assert calendar.find(3.0) is None
    assert calendar.find(torch.empty(0)) is None
    assert calendar.find(torch.tensor([float("nan")])) is None
    identity.release()


@pytest.mark.parametrize("backend", ["inductor"])
def test_a_model_of_diffusers_compiled(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    eager, mine = make_dit(), make_dit()
    scheduler = diffusers.DDIMScheduler()
    schedule = Schedule.custom(STEPS, lambda step, site, *_: step == REUSED and site == 0)
    dqar_fx.optimize(mine, schedule, cache=CacheConfig(dtype="native"), scheduler=scheduler, backend=backend)
    labels = torch.tensor([1, 3])
    for shift in (0, 1):
        scheduler.set_timesteps(STEPS)
        for step, timestep in enumerate(scheduler.timesteps):
            x = torch.randn(BATCH, 4, 8, 8)
            call = {"timestep": timestep.expand(BATCH), "class_labels": labels + shift, "return_dict": False}
            (found,), (expected,) = mine(x, **call), eager(x, **call)
            if step != REUSED:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    runtime = dqar_fx.runtime(mine)
    assert runtime.stats.captures == 1
    report = runtime.report().to_dict()["timestep_values"]
    assert report["values"] == 4  # three blocks, and the last layer
    assert report["weight_share"] > 0.4
