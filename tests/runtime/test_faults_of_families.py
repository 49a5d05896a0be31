"""Never a wrong image, for each family of models: after any fault, a generation is the one that a new model gives.

One capture per family serves all tests. What a generation must be comes from the eager model, its attentions replayed
by the plan, so it owes nothing to the runtime that is tested.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dqar_fx
from dqar_fx import CacheConfig, Schedule
from dqar_fx.runtime.entered import open_generations
from dqar_fx.runtime.program import CapturedGraph
from tests.families import DIT, FAMILIES, NUM_STEPS, SD3, Family, replaying

#: One step of warm-up: what the first call of a run stored is what its second call would read.
SCHEDULE = Schedule.interval(NUM_STEPS, every=3, warmup=1)
REUSED = (False, True, True, False, True)  # by step, at every site


@dataclass(frozen=True, slots=True)
class Subject:
    """An optimised model, and the eager models that say what it must give."""

    family: Family
    model: nn.Module
    eager: nn.Module
    quantized: bool = False

    @classmethod
    def of(cls, family: Family, dtype: str) -> Subject:
        model = family.optimized(SCHEDULE, cache=CacheConfig(dtype=dtype))
        return cls(family, model, family.make(), quantized=dtype == "int8")

    @property
    def runtime(self) -> Any:
        return dqar_fx.runtime(self.model)

    @property
    def reused(self) -> list[bool]:
        """What the last generation did in each of its calls."""
        sites = self.family.sites
        actions = [d.action == "reuse" for d in self.runtime.stats.decisions]
        calls = [actions[i : i + sites] for i in range(0, len(actions), sites)]
        assert all(len(set(call)) == 1 and len(call) == sites for call in calls)
        return [call[0] for call in calls]

    def loop(self, **run: Any) -> Iterator[Tensor]:
        return self.family.loop(self.model, **run)

    def sample(self, **run: Any) -> Tensor:
        return self.family.sample(self.model, **run)

    def clean(self, reused: Sequence[bool] = REUSED, **run: Any) -> Tensor:
        """What a new model gives."""
        with replaying(self.eager, reused, quantized=self.quantized):
            return self.family.sample(self.eager, **run)

    def abandon(self, calls: int, **run: Any) -> None:
        """The first ``calls`` calls of a run, which then nobody ends."""
        loop = self.loop(**run)
        for _ in range(calls):
            next(loop)

    def assert_clean(self, **run: Any) -> None:
        """A generation now reuses as planned, and equals a clean one bit for bit."""
        got = self.sample(**run)
        run.pop("between", None)
        # Only its own calls: one that begins where another was abandoned after one call goes on with that one's log.
        assert self.reused[-len(got) :] == list(REUSED[: len(got)])
        assert torch.equal(got, self.clean(**run))

    def assert_computes(self, step: int, x: Tensor, given: dict[str, Tensor]) -> None:
        """A call now is what the eager model gives."""
        got = self.family.call(self.model, step, x, given=given)
        assert torch.equal(got, self.family.call(self.eager, step, x, given=given))


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def shared(request: pytest.FixtureRequest) -> Subject:
    subject = Subject.of(request.param, "native")
    subject.assert_clean(seed=9, prompt=9)  # captured; two threads that capture at once are another matter
    return subject


@pytest.fixture
def subject(shared: Subject) -> Subject:
    shared.runtime.reset()
    return shared


def test_a_clean_run_reuses_and_that_shows(subject: Subject) -> None:
    subject.assert_clean(seed=1, prompt=1)
    clean = subject.clean(seed=1, prompt=1)
    plain = subject.family.sample(subject.eager, seed=1, prompt=1)
    others = [subject.clean(seed=2, prompt=1), subject.clean(seed=1, prompt=2)]
    for step in range(1, NUM_STEPS):  # so that no fault could go unseen
        assert not torch.equal(clean[step], plain[step])
    assert not any(torch.equal(clean, other) for other in others)


# -- a run that does not come to its end ----------------------------------------------------------------------------


@pytest.mark.parametrize("after", range(1, NUM_STEPS))
def test_an_abandoned_generation_leaves_nothing(subject: Subject, after: int) -> None:
    subject.abandon(after, seed=1, prompt=1)
    subject.assert_clean(seed=2, prompt=2)


def test_a_run_with_the_conditioning_of_an_abandoned_one_reads_nothing_of_it(subject: Subject) -> None:
    for after in range(2, NUM_STEPS):
        subject.abandon(after, seed=1, prompt=1)
        subject.assert_clean(seed=2, prompt=1)


@pytest.mark.parametrize(("after", "first"), [(1, 1), (2, 2), (1, 3), (3, 1), (4, 4)])
def test_a_run_that_starts_mid_schedule_reads_nothing_of_an_abandoned_one(
    subject: Subject, after: int, first: int
) -> None:
    subject.abandon(after, seed=1, prompt=1)
    subject.assert_clean(seed=2, prompt=2, steps=range(first, NUM_STEPS))


def test_the_same_prompt_mid_schedule_reads_nothing_of_an_abandoned_run(subject: Subject) -> None:
    subject.abandon(2, seed=1, prompt=1)  # two calls: the run has shown that its conditioning stays where it is
    subject.assert_clean(seed=2, prompt=1, steps=range(2, NUM_STEPS))


def test_a_run_told_to_start_mid_schedule_reads_nothing_of_an_abandoned_one(subject: Subject) -> None:
    begin_step = subject.runtime.begin_step
    subject.sample(seed=1, prompt=1, steps=range(3), between=begin_step)  # holds the value of step 0 ...
    got = subject.sample(seed=2, prompt=2, steps=range(1, NUM_STEPS), between=begin_step)  # ... which step 1 would read
    reused = [False, True, False, True]
    assert subject.reused == reused
    assert torch.equal(got, subject.clean(reused, seed=2, prompt=2, steps=range(1, NUM_STEPS)))
    subject.assert_clean(seed=3, prompt=3, between=begin_step)


class FailsAt(TorchDispatchMode):
    """Lets ``operators`` run and fails at the next; counts those that ran."""

    def __init__(self, operators: float = float("inf")) -> None:
        super().__init__()
        self.left, self.ran = operators, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or Dynamo would step aside for as long as the mode is active

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if self.ran >= self.left:
            raise MemoryError
        self.ran += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("at", [0, 1])  # where it stores, where it reads
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_an_exception_inside_the_model_leaves_nothing(subject: Subject, at: int, part: float) -> None:
    subject.abandon(at, seed=1, prompt=1)
    family, given, x = subject.family, subject.family.conditioning(prompt=2), subject.family.noise(seed=2)
    for step in range(at):
        family.call(subject.model, step, x, given=given)
    with FailsAt() as counts:
        family.call(subject.model, at, x, given=given)
    subject.runtime.reset()
    for step in range(at):
        family.call(subject.model, step, x, given=given)
    with pytest.raises(MemoryError), FailsAt(int(part * counts.ran)):
        family.call(subject.model, at, x, given=given)
    subject.assert_computes(at + 1, x, given)  # the caller goes on: nothing half written is read
    subject.assert_clean(seed=3, prompt=3)


def test_an_input_that_the_model_refuses_leaves_nothing(subject: Subject) -> None:
    given, x = subject.family.conditioning(prompt=1), subject.family.noise(seed=1)
    subject.family.call(subject.model, 0, x, given=given)
    with pytest.raises(RuntimeError):  # while it is captured: no graph of it ever runs
        subject.family.call(subject.model, 1, x[:, :-1] if x.ndim > 3 else x[..., :-1], given=given)  # fewer channels
    subject.assert_computes(2, x, given)
    subject.assert_clean(seed=2, prompt=2)


def test_an_exception_between_store_and_use_leaves_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    given, x = subject.family.conditioning(prompt=1), subject.family.noise(seed=1)
    run = CapturedGraph.run
    monkeypatch.setattr(CapturedGraph, "run", lambda *args: (run(*args), 1 / 0))
    with pytest.raises(ZeroDivisionError):  # the values are written, the caller never saw the result
        subject.family.call(subject.model, 0, x, given=given)
    monkeypatch.undo()
    subject.assert_computes(1, x, given)
    subject.assert_clean(seed=2, prompt=2)


def test_an_exception_in_the_loop_frees_its_generation(subject: Subject) -> None:
    given, x = subject.family.conditioning(prompt=1), subject.family.noise(seed=1)

    def interrupted() -> None:
        with subject.runtime.generation(NUM_STEPS):
            subject.family.call(subject.model, 0, x, given=given)
            assert subject.runtime.stats.cache_bytes > 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert subject.runtime.stats.cache_bytes == 0
    subject.assert_computes(1, x, given)
    with subject.runtime.generation(NUM_STEPS):
        subject.assert_computes(1, x, given)
        subject.assert_clean(seed=2, prompt=2)


# -- other inputs ---------------------------------------------------------------------------------------------------

# The first pair is captured for each; the second shares the capture whose sizes are symbols.
BATCHES = pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 4)])
SIZES = pytest.mark.parametrize(("before", "after"), [(8, 12), (12, 10)])


@BATCHES
def test_another_batch_in_the_middle_computes(subject: Subject, before: int, after: int) -> None:
    assert_other_in_the_middle_computes(subject, {"batch": before}, {"batch": after})


@SIZES
def test_another_size_in_the_middle_computes(subject: Subject, before: int, after: int) -> None:
    assert_other_in_the_middle_computes(subject, {"size": before}, {"size": after})


def assert_other_in_the_middle_computes(subject: Subject, before: dict[str, int], after: dict[str, int]) -> None:
    subject.assert_clean(prompt=1, **before)  # both are captured: nothing but the runtime tells them apart
    subject.assert_clean(prompt=1, **after)
    subject.runtime.reset()
    given = subject.family.conditioning(prompt=1, **before)
    subject.family.call(subject.model, 0, subject.family.noise(**before), given=given)
    others = subject.family.conditioning(prompt=1, **after)
    # What has one shape for both stays the same tensor, as in a run that changes its resolution on the way.
    given = {name: given[name] if given[name].shape == other.shape else other for name, other in others.items()}
    x = subject.family.noise(**after)
    subject.assert_computes(1, x, given)
    assert {d.reason for d in subject.runtime.stats.decisions if d.step == 1} == {"shape"}
    subject.assert_clean(seed=2, prompt=2, **before)


@BATCHES
def test_another_batch_between_generations(subject: Subject, before: int, after: int) -> None:
    for batch in (before, after, before):
        subject.assert_clean(seed=1, prompt=1, batch=batch)


@SIZES
def test_another_size_between_generations(subject: Subject, before: int, after: int) -> None:
    for size in (before, after, before):
        subject.assert_clean(seed=1, prompt=1, size=size)


def assert_nan_latents_stay_in_their_generation(subject: Subject) -> None:
    poison = torch.full_like(subject.family.noise(), torch.nan)
    assert subject.sample(start=poison, prompt=1).isnan().all()  # and are never hidden
    assert subject.reused == list(REUSED)
    subject.assert_clean(seed=1, prompt=1)
    subject.abandon(1, start=poison, prompt=1)
    subject.assert_clean(seed=1, prompt=2)


def test_nan_latents_stay_in_their_generation(subject: Subject) -> None:
    assert_nan_latents_stay_in_their_generation(subject)


@pytest.mark.parametrize("family", [DIT, SD3], ids=["DiT", "SD3"])  # one value for each attention, and two
def test_nan_latents_stay_in_their_generation_where_values_are_quantized(family: Family) -> None:
    assert_nan_latents_stay_in_their_generation(Subject.of(family, "int8"))


# -- several runs at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [(1, 1), (1, 2)])
def test_two_threads_each_give_what_they_give_alone(subject: Subject, prompts: tuple[int, int]) -> None:
    barrier = threading.Barrier(2, timeout=60)

    def work(seed: int, prompt: int) -> Tensor:
        try:  # in step, so that each call of one lies between two of the other
            return subject.sample(between=lambda step: barrier.wait(), seed=seed, prompt=prompt)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(2) as threads:
        runs = [(seed, prompt) for seed, prompt in enumerate(prompts)]
        got = list(threads.map(work, *zip(*runs, strict=True)))
    for result, (seed, prompt) in zip(got, runs, strict=True):
        assert torch.equal(result, subject.clean(seed=seed, prompt=prompt))
    subject.assert_clean(seed=3, prompt=1)


@pytest.mark.parametrize("prompts", [(1, 1), (1, 2)])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_two_generations_that_take_turns_each_give_what_they_give_alone(
    subject: Subject, prompts: tuple[int, int], ahead: int
) -> None:
    def entered(seed: int) -> Iterator[Tensor]:
        with subject.runtime.generation(NUM_STEPS):
            yield from subject.loop(seed=seed, prompt=prompts[seed])

    first, second = entered(0), entered(1)
    got: tuple[list[Tensor], list[Tensor]] = ([next(first) for _ in range(ahead)], [])
    for _ in range(NUM_STEPS - ahead):
        got[0].append(next(first))
        got[1].append(next(second))
    got[1].extend(second)
    assert not list(first)
    for seed, result in enumerate(got):
        assert torch.equal(torch.stack(result), subject.clean(seed=seed, prompt=prompts[seed]))
    assert not open_generations.get()
    subject.assert_clean(seed=3, prompt=1)


def test_two_runs_that_take_turns_without_a_word_compute_and_never_mix(subject: Subject) -> None:
    plain = [subject.family.sample(subject.eager, seed=seed, prompt=seed) for seed in (1, 2)]
    for step, (a, b) in enumerate(zip(*(subject.loop(seed=s, prompt=s) for s in (1, 2)), strict=True)):
        assert torch.equal(a, plain[0][step])
        assert torch.equal(b, plain[1][step])
    assert subject.runtime.stats.reused == 0
    subject.assert_clean(seed=3, prompt=3)


Denoiser = Callable[[int, Tensor], Tensor]


def guided(family: Family, cond: Denoiser, uncond: Denoiser) -> Tensor:
    """Guidance in two calls a step: what both gave."""
    x, out = family.noise(seed=1), []
    for step in range(NUM_STEPS):
        c, u = cond(step, x), uncond(step, x)
        x = x - 0.2 * (u + 2 * (c - u))
        out += [c, u]
    return torch.stack(out)


@pytest.mark.parametrize("prompts", [(1, 2), (1, 1)])
def test_named_branches_have_stores_of_their_own(subject: Subject, prompts: tuple[int, int]) -> None:
    family, runtime = subject.family, subject.runtime

    def branch(name: str, prompt: int) -> Denoiser:
        given = family.conditioning(prompt=prompt)

        def call(step: int, x: Tensor) -> Tensor:
            with runtime.branch(name):
                return family.call(subject.model, step, x, given=given)

        return call

    got = guided(family, branch("cond", prompts[0]), branch("uncond", prompts[1]))
    assert subject.reused == [reused for reused in REUSED for _ in range(2)]
    assert {d.branch for d in runtime.stats.decisions} == {"cond", "uncond"}
    # The oracle: two models, one for each branch.
    cond, uncond = family.make(), family.make()
    with replaying(cond, REUSED), replaying(uncond, REUSED):
        alone = guided(family, *(plainly(family, m, p) for m, p in zip((cond, uncond), prompts, strict=True)))
    assert torch.equal(got, alone)
    subject.assert_clean(seed=2, prompt=3)


def plainly(family: Family, model: nn.Module, prompt: int) -> Denoiser:
    """A branch without a name."""
    given = family.conditioning(prompt=prompt)
    return lambda step, x: family.call(model, step, x, given=given)


@pytest.mark.parametrize("prompts", [(1, 2), (1, 1)])
def test_unnamed_branches_compute(subject: Subject, prompts: tuple[int, int]) -> None:
    family = subject.family
    got = guided(family, *(plainly(family, subject.model, prompt) for prompt in prompts))
    assert torch.equal(got, guided(family, *(plainly(family, subject.eager, prompt) for prompt in prompts)))
    assert subject.runtime.stats.reused == 0
    assert f"{NUM_STEPS} calls came at a step that had been called already" in str(subject.runtime.report())
    subject.assert_clean(seed=2, prompt=3)


# -- what else may happen in the middle -----------------------------------------------------------------------------


@contextmanager
def changed_weights(how: str, *models: nn.Module) -> Iterator[None]:
    """The values of the last attention are doubled, in each of ``models``."""
    projections = [[m for name, m in model.named_modules() if name.endswith("to_v")][-1] for model in models]
    before = [projection.weight for projection in projections]
    with torch.no_grad():
        for projection in projections:
            if how == "in place":
                projection.weight.mul_(2)
            else:
                new = nn.Parameter(projection.weight * 2)
                while new._version < projection.weight._version:
                    new.mul_(1)  # written into as often: the count of writes does not give it away
                projection.weight = new
    try:
        yield
    finally:
        for projection, weight in zip(projections, before, strict=True):
            if how == "in place":
                with torch.no_grad():
                    weight.mul_(0.5)
            projection.weight = weight


@pytest.mark.parametrize("how", ["in place", "replaced"])
@pytest.mark.parametrize("at", [1, 2])
def test_weights_changed_in_the_middle_are_noticed(subject: Subject, how: str, at: int) -> None:
    given, x = subject.family.conditioning(prompt=1), subject.family.noise(seed=1)
    for step in range(at):
        subject.family.call(subject.model, step, x, given=given)
    assert subject.reused == list(REUSED[:at])
    with changed_weights(how, subject.model, subject.eager):
        subject.assert_computes(at, x, given)
        changed = subject.clean(seed=2, prompt=2)
        subject.assert_clean(seed=2, prompt=2)
        subject.abandon(1, seed=2, prompt=2)
    subject.assert_clean(seed=2, prompt=2)  # changed back, in the middle again
    assert not torch.equal(subject.clean(seed=2, prompt=2), changed)


def test_weights_changed_back_in_the_middle_are_noticed_too(subject: Subject) -> None:
    given, x = subject.family.conditioning(prompt=1), subject.family.noise(seed=1)
    with changed_weights("in place", subject.model):
        subject.family.call(subject.model, 0, x, given=given)
    subject.assert_computes(1, x, given)


#: Planned for seven steps, by the same rule: 0, 3 and 6 compute.
SKIPPING = {
    "one that reuses": ([0, 2, 3, 4], [False, True, False, True]),
    "one that stores": ([0, 1, 2, 4, 5], [False, True, True, False, True]),  # at 4 the value of 0 is stale
    "the first": ([1, 2, 3, 4], [False, True, False, True]),
    "all of a period": ([0, 1, 5, 6], [False, True, False, False]),
}


@pytest.mark.parametrize("steps", SKIPPING)
def test_a_step_that_is_skipped_makes_no_value_older_than_planned(subject: Subject, steps: str) -> None:
    made, reused = SKIPPING[steps]
    with subject.runtime.generation(7):
        got = subject.sample(seed=1, prompt=1, steps=made, between=subject.runtime.begin_step)
        assert subject.reused == reused
        assert [d.step for d in subject.runtime.stats.decisions[:: subject.family.sites]] == made
    assert torch.equal(got, subject.clean(reused, seed=1, prompt=1, steps=made))
    subject.assert_clean(seed=2, prompt=2)
