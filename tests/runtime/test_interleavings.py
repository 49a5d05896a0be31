"""Random interleavings of runs against a model of the truth: nothing that one run stored is ever read by another.

The model under test hands back what its attentions give for latents that say who they are: every value read from the
cache names the run, the branch and the step that stored it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn

import dqar_fx
from dqar_fx import CacheConfig, Schedule
from dqar_fx.runtime.program import CapturedGraph
from dqar_fx.runtime.runtime import Runtime

STEPS = 6
SCHEDULE = Schedule.interval(STEPS, every=3, warmup=1)
PLAN = SCHEDULE.plan(2)
STEP_BASE = 8  # > STEPS; a call's latents are all run * 2 * STEP_BASE + branch * STEP_BASE + step
BRANCHES = ("cond", "uncond")


class Attention(nn.Module):
    """Gives every token the mean of all: the latents' own value, exactly, where all tokens are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unsqueeze(1)
        return self.out(torch.nn.functional.scaled_dot_product_attention(q * 0, q * 0, q).squeeze(1))


class Echo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        zero = 0 * (timestep.sum() + context.sum())
        return self.attn1(x) + zero, self.attn2(x) + zero


@dataclass
class Run:
    """One sampling run as its caller sees it; ``next`` makes one step."""

    number: int
    thread: int
    explicit: bool
    steps: Iterator[None]
    done: int = 0
    undisturbed: bool = True
    followed: list[bool] = field(default_factory=list)


@functools.cache
def optimized() -> tuple[nn.Module, Runtime]:
    model = dqar_fx.optimize(Echo().eval(), SCHEDULE, cache=CacheConfig(dtype="native"), backend="eager")
    return model, dqar_fx.runtime(model)


class Interleavings(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.runtime = optimized()  # one for all examples: what one leaves behind, the next must not read
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)]
        self.runs: list[Run] = []
        self.count = 0
        self.wrong: list[str] = []

    def teardown(self) -> None:
        for run in self.runs:
            self.threads[run.thread].submit(run.steps.close).result()  # type: ignore[attr-defined]
        for thread in self.threads:
            thread.shutdown()

    def call(self, run: Run, step: int, branch: int, batch: int, contexts: list[Tensor]) -> None:
        mine = (run.number * 2 + branch) * STEP_BASE
        x = torch.full((batch, 2, 4), float(mine + step))
        timestep = torch.full((batch,), 900.0 - 100 * step)
        with torch.no_grad(), self.runtime.branch(BRANCHES[branch]) if len(contexts) > 1 else nullcontext():
            outputs = self.model(x, timestep, contexts[branch])
        for site, output in enumerate(outputs):
            values = set(output.flatten().tolist())
            source = values.pop() - mine
            if values or output.shape != x.shape or not 0 <= source <= step:
                self.wrong.append(
                    f"run {run.number} step {step} site {site}: read {source + mine} (its own are {mine} + step)"
                )
            run.followed.append(source == step - PLAN.age[step, site])

    def sampling(self, run: Run, first: int, batch: int, guided: bool) -> Iterator[None]:
        contexts = [torch.full((batch, 1), float(run.number * 2 + b)) for b in range(1 + guided)]
        with self.runtime.generation(STEPS) if run.explicit else nullcontext():
            for step in range(first, STEPS):
                for branch in range(len(contexts)):
                    self.call(run, step, branch, batch, contexts)
                yield

    @rule(
        thread=st.sampled_from([0, 0, 1]), explicit=st.sampled_from([False, False, True]),
        batch=st.sampled_from([1, 1, 2]), guided=st.booleans(), first=st.sampled_from([0, 0, 0, 2]),
    )  # fmt: skip
    def begin(self, thread: int, explicit: bool, batch: int, guided: bool, first: int) -> None:
        self.count += 1
        run = Run(self.count, thread, explicit, iter(()), done=first, undisturbed=first == 0)
        run.steps = self.sampling(run, first, batch, guided)
        self.runs.append(run)

    @precondition(lambda self: self.runs)
    @rule(which=st.integers(0, 7), how_many=st.integers(1, STEPS))
    def go_on(self, which: int, how_many: int) -> None:
        run = self.runs[which % len(self.runs)]
        for _ in range(how_many):
            self.disturb(run)
            if self.threads[run.thread].submit(next, run.steps, "end").result() == "end":
                self.runs.remove(run)
                if run.undisturbed:
                    assert all(run.followed), f"run {run.number} was undisturbed and did not reuse what its plan says"
                break
            run.done += 1

    def disturb(self, run: Run) -> None:
        """A run without a generation of its own may be taken for any other of its thread that is under way."""
        for other in self.runs:
            if other is not run and other.thread == run.thread and other.done and not run.explicit:
                other.undisturbed = False
                run.undisturbed &= not other.explicit  # it may take our calls for its own

    @precondition(lambda self: self.runs)
    @rule(which=st.integers(0, 7))
    def abandon(self, which: int) -> None:
        run = self.runs.pop(which % len(self.runs))
        self.threads[run.thread].submit(run.steps.close).result()  # type: ignore[attr-defined]

    @rule(thread=st.integers(0, 1))
    def fail(self, thread: int) -> None:
        def broken() -> None:
            fails = mock.patch.object(CapturedGraph, "run", side_effect=MemoryError)
            with fails, pytest.raises(MemoryError), torch.no_grad():
                self.model(torch.zeros(1, 2, 4), torch.tensor([500.0]), torch.zeros(1, 1))

        for run in self.runs:
            if run.thread == thread:
                run.undisturbed = False
        self.threads[thread].submit(broken).result()

    @rule()
    def change_a_weight(self) -> None:
        with torch.no_grad():
            self.model.attn1.out.weight.mul_(1.0)  # the same values, another version
        for run in self.runs:
            run.undisturbed = False

    @invariant()
    def nothing_was_read_that_another_run_stored(self) -> None:
        assert not self.wrong


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_the_echo_says_who_stored_what_it_reads() -> None:
    model = dqar_fx.optimize(Echo().eval(), Schedule.always(3), cache=CacheConfig(dtype="native"), backend="eager")
    context, read = torch.zeros(1, 1), []
    with torch.no_grad():
        for step in range(3):
            outputs = model(torch.full((1, 2, 4), 40.0 + step), torch.tensor([900.0 - step]), context)
            read.append([set(o.flatten().tolist()) for o in outputs])
    assert read == [[{40.0}, {40.0}]] * 3
