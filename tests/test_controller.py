"""The controller for loops driven by hand: what it decides and why, and that what is read is what was stored."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dqar_fx import (
    CacheConfig,
    CacheError,
    ChangeGate,
    Controller,
    EntropyGate,
    GateError,
    Gates,
    Plan,
    PlanError,
    RuntimeStateError,
    Schedule,
    SnrGate,
)
from dqar_fx.controller import Decision
from dqar_fx.gates import Candidate, Gate
from dqar_fx.metrics import attention_entropy

STEPS, SITES = 12, 6
ALWAYS = Schedule.always(STEPS)
X = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


def only(**gates: Any) -> Gates:
    """Gates of which none is there by default."""
    return Gates(**{"entropy": None, "snr": None, **gates})


def drive(controller: Controller, *, num_steps: int = STEPS, entropy: float | None = None, **step: Any) -> list[str]:
    """One generation; for each site a text with a letter for each step, ``#`` where it reused."""
    for t in range(num_steps):
        controller.begin_step(t, **step)
        for site in range(controller.plan.num_sites):
            if controller.should_reuse(site, entropy=entropy):
                controller.reuse(site)
            else:
                controller.commit(site, X)
    answers = [[d for d in controller.decisions if d.site == site] for site in range(controller.plan.num_sites)]
    return ["".join("#" if d else d.reason[0] for d in decisions) for decisions in answers]


def committed(controller: Controller, value: Any = X, **arguments: Any) -> Controller:
    """At step 1, with ``value`` stored at step 0."""
    controller.begin_step(0, snr=1.0)
    controller.commit(0, value, **arguments)
    controller.begin_step(1, snr=1.0)
    return controller


class TestDecisions:
    def test_by_the_schedule_alone(self) -> None:
        schedule = Schedule.interval(STEPS, every=3, warmup=2)
        assert drive(Controller(schedule, SITES)) == ["ww##s##s##s#"] * SITES
        assert drive(Controller(Schedule.phases(STEPS), SITES))[::3] == ["w###########", "wsss########"]

    def test_a_plan_is_followed_to_the_letter(self) -> None:
        plan = Schedule.interval(STEPS, every=4, warmup=0.25).plan(SITES)
        controller = Controller(plan, SITES)
        drive(controller)
        found = np.array([d.use for d in controller.decisions]).reshape(STEPS, SITES)
        assert Plan(found) == plan
        assert controller.stats.reused == plan.reuse.sum()
        assert controller.stats.reuse_ratio == plan.reuse_ratio

    def test_num_steps_replaces_that_of_the_schedule(self) -> None:
        assert Controller(Schedule.always(50), SITES, num_steps=STEPS).plan == ALWAYS.plan(SITES)
        with pytest.raises(PlanError, match="bound to its numbers"):
            Controller(ALWAYS.plan(SITES), SITES, num_steps=50)

    def test_steps_beyond_the_plan_compute(self) -> None:
        assert drive(Controller(ALWAYS, 1), num_steps=STEPS + 2) == ["w###########ss"]

    @pytest.mark.parametrize(
        ("gates", "expected"),
        [
            (only(), "w###########"),
            (only(max_age=6), "w######s####"),
            (only(max_age=2), "w##s##s##s##"),
            (only(max_age=0), "wsssssssssss"),
            (only(max_reuse=4), "w####b####b#"),
            (only(max_reuse=0), "wbbbbbbbbbbb"),
            (only(max_age=6, max_reuse=4), "w####b####b#"),
            (only(entropy=EntropyGate(2.0)), "w###########"),
            (only(entropy=EntropyGate(1.9)), "weeeeeeeeeee"),
            (only(entropy=EntropyGate(1.9, base_prompt_length=16)), "w###########"),
            (only(entropy=EntropyGate(1.9, base_prompt_length=16, adaptive=False)), "weeeeeeeeeee"),
            (only(entropy=EntropyGate(1.9, site_scales={0: 1.1})), "w###########"),
            (only(snr=SnrGate(low=0.6)), "wsssssssssss"),
            (only(snr=SnrGate(high=0.4)), "wsssssssssss"),
            (only(snr=SnrGate(low=0.5, high=0.5)), "w###########"),
            (only(change=ChangeGate(0.1)), "wc##########"),  # two values are needed to compare: steps 0 and 1
        ],
    )
    def test_every_knob_changes_them(self, gates: Gates, expected: str) -> None:
        assert drive(Controller(ALWAYS, SITES, gates=gates), entropy=1.9, snr=0.5, prompt_length=77)[0] == expected

    def test_the_deepest_third_may_need_a_higher_snr(self) -> None:
        gates = only(snr=SnrGate(low=0.1, deep_snr=1.0))
        assert [row[1] for row in drive(Controller(ALWAYS, SITES, gates=gates), snr=0.5)] == list("####ss")

    def test_each_gate_blocks_alone_and_the_first_gives_the_reason(self) -> None:
        """In DQAR's order; of all that could block, one less each time."""
        gates = Gates(entropy=EntropyGate(2.0), snr=SnrGate(low=0.5), max_age=3, max_reuse=1, change=ChangeGate(0.1))
        # age, reads, snr, entropy, change: all bad, then good one by one from the left
        bad: list[Any] = [5, 1, 0.1, 3.0, 0.5]
        good: list[Any] = [2, 0, 1.0, 1.0, 0.05]
        words = ["stale", "budget", "snr", "entropy", "change"]

        def ask(age: int, reads: int, snr: float, entropy: float, change: float) -> Decision:
            controller = Controller(ALWAYS, SITES, gates=gates)
            controller.begin_step(0, snr=1.0)
            controller.commit(0, X)
            for t in range(1, age):
                controller.begin_step(t, snr=1.0)
                if t <= reads:
                    controller.reuse(0)
            controller.begin_step(age, snr=snr)
            return controller.should_reuse(0, entropy=entropy, change=change)

        for first, word in enumerate(words):
            assert ask(*good[:first], *bad[first:]).reason == word
            assert ask(*good[:first], bad[first], *good[first + 1 :]).reason == word
        assert ask(*good) == Decision(True, "reuse", None, 2, "", 0)

    def test_warmup_schedule_empty_and_shape_come_before_the_gates(self) -> None:
        blocked = only(max_age=0, max_reuse=0, entropy=EntropyGate(0.0))
        controller = Controller(Schedule.linear(STEPS, warmup=2, fraction=1.0), SITES, gates=blocked)
        controller.begin_step(0)
        assert controller.should_reuse(0).reason == "warmup"
        controller.begin_step(4)
        assert controller.should_reuse(5).reason == "schedule"
        assert controller.should_reuse(0).reason == "empty"
        controller.commit(0, X)
        controller.begin_step(5)
        assert controller.should_reuse(0, like=X[:1]).reason == "shape"
        assert controller.should_reuse(0, like=X).reason == "stale"

    def test_a_decision_is_true_only_where_the_value_may_be_read(self) -> None:
        controller = committed(Controller(ALWAYS, SITES))
        yes, no = controller.should_reuse(0), controller.should_reuse(1)
        assert (bool(yes), yes.use, yes.action, yes.reason) == (True, True, "reuse", "reuse")
        assert (bool(no), no.use, no.action, no.reason) == (False, False, "compute", "empty")
        assert controller.decisions == [yes, no]

    def test_a_policy_tells_its_probability(self) -> None:
        class Policy:
            reason = "policy"

            def probability(self, candidate: Candidate) -> float:
                return 1 / (1 + candidate.measured.entropy)

            def allows(self, candidate: Candidate) -> bool:
                return self.probability(candidate) >= 0.5

        class WithPolicy(Gates):
            def cascade(self, *, with_snr: bool = True) -> tuple[Gate, ...]:
                return (*super().cascade(with_snr=with_snr), Policy())

        controller = committed(Controller(ALWAYS, SITES, gates=WithPolicy(entropy=None, snr=None, max_age=3)))
        assert controller.should_reuse(0, entropy=0.25) == Decision(True, "reuse", 0.8, 1, "", 0)
        assert controller.should_reuse(0, entropy=3.0) == Decision(False, "policy", 0.25, 1, "", 0)


class TestMeasurements:
    @pytest.mark.parametrize("kind", [float, np.float32, torch.tensor, lambda value: torch.full((3,), value)])
    def test_a_number_or_one_for_each_sample(self, kind: Callable[[float], Any]) -> None:
        controller = committed(Controller(ALWAYS, SITES, gates=only(entropy=EntropyGate(2.0))))
        assert controller.should_reuse(0, entropy=kind(1.5))
        assert not controller.should_reuse(0, entropy=kind(2.5))
        assert not controller.should_reuse(0, entropy=kind(math.nan))

    @pytest.mark.parametrize("per_sample", [False, True])
    def test_the_mean_of_a_batch_or_every_sample(self, per_sample: bool) -> None:
        controller = committed(Controller(ALWAYS, SITES, gates=only(entropy=EntropyGate(2.0), per_sample=per_sample)))
        assert bool(controller.should_reuse(0, entropy=torch.tensor([1.0, 2.5]))) is not per_sample

    def test_the_entropy_of_the_commit_serves_until_there_is_a_newer_one(self) -> None:
        gates = only(entropy=EntropyGate(2.0))
        assert committed(Controller(ALWAYS, SITES, gates=gates), entropy=1.5).should_reuse(0)
        assert committed(Controller(ALWAYS, SITES, gates=gates), entropy=lambda: X[:, 0, 0] * 0).should_reuse(0)
        controller = committed(Controller(ALWAYS, SITES, gates=gates), entropy=2.5)
        assert controller.should_reuse(0).reason == "entropy"
        assert controller.should_reuse(0, entropy=1.5)
        assert committed(Controller(ALWAYS, SITES, gates=gates)).should_reuse(0).reason == "entropy"

    def test_nothing_is_measured_that_no_gate_asks_for(self) -> None:
        def measure() -> float:
            raise AssertionError("measured in vain")

        controller = committed(Controller(ALWAYS, SITES, gates=only(max_age=3)), entropy=measure)
        assert controller.should_reuse(0, entropy=measure)
        gates = only(entropy=EntropyGate(2.0), max_reuse=0)
        assert committed(Controller(ALWAYS, SITES, gates=gates)).should_reuse(0, entropy=measure).reason == "budget"
        controller = Controller(Schedule.none(STEPS), SITES, gates=only(entropy=EntropyGate(2.0)))
        assert not committed(controller, entropy=measure).should_reuse(0, entropy=measure)

    def test_the_change_is_measured_against_what_was_stored(self) -> None:
        new = X * torch.tensor([1.0, 1.25])[:, None, None]  # by 0 and 0.2 of its size: 0.1 on average

        def ask(**gate: Any) -> Decision:
            native = CacheConfig(dtype="native")
            controller = committed(Controller(ALWAYS, SITES, gates=only(change=ChangeGate(**gate)), cache=native))
            controller.commit(0, new)
            controller.begin_step(2)
            return controller.should_reuse(0)

        assert ask(threshold=0.101)
        assert not ask(threshold=0.099)
        assert ask(threshold=0.201, per_sample=True)
        assert not ask(threshold=0.199, per_sample=True)

    def test_zeros_that_stay_zeros_have_not_changed(self) -> None:
        controller = committed(Controller(ALWAYS, SITES, gates=only(change=ChangeGate(0.0))), X * 0)
        controller.commit(0, X * 0)
        controller.begin_step(2)
        assert controller.should_reuse(0)

    def test_with_buffers_kept_a_value_is_not_compared_with_itself(self) -> None:
        cache = CacheConfig(keep_buffers=True)
        controller = committed(Controller(ALWAYS, SITES, gates=only(change=ChangeGate(0.5)), cache=cache))
        controller.commit(0, -X)
        controller.begin_step(2)
        assert controller.should_reuse(0).reason == "change"

    def test_a_chosen_gate_on_snr_asks_for_it_and_the_default_one_is_left_out(self) -> None:
        with pytest.raises(GateError, match=r"begin_step\(0\) got no snr.*snr=metrics\.snr.*Gates\(snr=None\)"):
            Controller(ALWAYS, SITES, gates=Gates(snr=SnrGate(low=0.2))).begin_step(0)
        assert drive(Controller(ALWAYS, 1, gates=Gates()), entropy=1.0) == ["w###########"]
        assert drive(Controller(ALWAYS, 1, gates=Gates()), entropy=1.0, snr=0.01) == ["wsssssssssss"]
        assert drive(Controller(ALWAYS, 1, gates=Gates()), entropy=1.0, snr=math.nan) == ["wsssssssssss"]


class TestGenerations:
    @pytest.mark.parametrize("step", [0, 3, 4])
    def test_step_0_a_repeat_and_a_step_back_forget_everything(self, step: int) -> None:
        controller = Controller(ALWAYS, SITES)
        drive(controller, num_steps=5)
        assert controller.stats.cache_bytes > 0
        controller.begin_step(step)
        assert controller.stats.cache_bytes == controller.stats.reused == controller.stats.computed == 0
        assert controller.decisions == []
        assert not controller.should_reuse(0)
        with pytest.raises(RuntimeStateError, match="nothing is stored"):
            controller.reuse(0)

    def test_two_in_a_row_are_alike(self) -> None:
        controller = Controller(ALWAYS, SITES, gates=only(max_reuse=4))
        assert drive(controller) == drive(controller) == ["w####b####b#"] * SITES
        assert controller.stats.reused == 9 * SITES

    @pytest.mark.parametrize("levels", [[999, 500, 1, 999], [0.0, 0.5, 1.0, 0.0]])
    def test_a_noise_level_that_turns_round_tells_a_step_that_was_counted_on(self, levels: list[float]) -> None:
        controller = Controller(ALWAYS, SITES)
        for step, timestep in enumerate(levels):
            controller.begin_step(step, timestep=timestep)
            assert bool(controller.should_reuse(0)) is (0 < step < 3)
            controller.commit(0, X)
        assert [d.reason for d in controller.decisions] == ["empty"]

    def test_levels_that_repeat_are_one_generation(self) -> None:
        """Samplers of second order evaluate one level twice."""
        controller = Controller(ALWAYS, SITES)
        for step, timestep in enumerate([999, 500, 500, 1]):
            controller.begin_step(step, timestep=timestep)
            controller.commit(0, X)
        assert controller.stats.computed == 4

    def test_steps_may_be_left_out(self) -> None:
        controller = committed(Controller(ALWAYS, SITES, gates=only(max_age=6)))
        controller.begin_step(6)
        assert controller.should_reuse(0)
        controller.begin_step(7)
        assert controller.should_reuse(0).reason == "stale"

    def test_controllers_share_nothing(self) -> None:
        one, other = Controller(ALWAYS, SITES), Controller(ALWAYS, SITES)
        committed(one)
        other.begin_step(1)
        assert one.should_reuse(0)
        assert other.should_reuse(0).reason == "empty"

    def test_reset_frees_what_is_stored(self) -> None:
        controller = committed(Controller(ALWAYS, SITES))
        controller.reset()
        assert controller.stats.cache_bytes == 0
        with pytest.raises(RuntimeStateError, match=r"begin_step\(0\)"):
            controller.should_reuse(0)


class TestBranches:
    def test_each_has_values_and_counts_of_its_own(self) -> None:
        controller = Controller(ALWAYS, SITES, gates=only(max_reuse=1), cache=CacheConfig(dtype="native"))
        controller.begin_step(0)
        controller.commit(0, X, "cond")
        controller.commit(0, -X, branch="uncond")
        controller.begin_step(1)
        assert controller.should_reuse(0, "cond")
        assert torch.equal(controller.reuse(0, "cond"), X)
        controller.begin_step(2)
        assert controller.should_reuse(0, "cond").reason == "budget"
        assert controller.should_reuse(0, "uncond")
        assert torch.equal(controller.reuse(0, "uncond"), -X)
        assert controller.should_reuse(0).reason == "empty"
        with pytest.raises(RuntimeStateError, match=r"only for branch 'cond', 'uncond'"):
            controller.reuse(0)

    def test_calls_that_cannot_be_told_apart_compute(self) -> None:
        """Guidance in two calls without names: neither may read what the other has stored."""
        controller = Controller(ALWAYS, SITES)
        answers = []
        for step in range(4):
            controller.begin_step(step)
            for value in (X, -X):
                answers.append(controller.should_reuse(0).reason)
                controller.commit(0, value)
        assert answers == ["warmup", "warmup", *["repeat"] * 6]

    def test_a_second_call_that_comes_later_computes_too(self) -> None:
        controller = committed(Controller(ALWAYS, SITES))
        assert controller.should_reuse(0)
        controller.reuse(0)
        assert controller.should_reuse(0).reason == "repeat"
        controller.commit(0, -X)
        controller.begin_step(2)
        assert controller.should_reuse(0).reason == "repeat"  # whose value it is, nobody knows


class TestValues:
    @pytest.mark.parametrize("granularity", ["token", "tensor", "channel"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_int8_comes_back_within_half_a_scale(self, granularity: str, dtype: torch.dtype) -> None:
        value = X.to(dtype)
        controller = committed(Controller(ALWAYS, SITES, cache=CacheConfig(granularity=granularity)), value)
        assert controller.should_reuse(0, like=value)
        read = controller.reuse(0)
        assert (read.dtype, read.shape) == (dtype, X.shape)
        error = (read.float() - value.float()).abs().max()
        assert 0 < error <= value.float().abs().max() / 254 + torch.finfo(dtype).eps * 4
        scales = {"token": 2 * 8, "tensor": 2, "channel": 2 * 16}[granularity]
        assert controller.stats.cache_bytes == X.numel() + 4 * scales

    def test_per_head_and_with_zeros(self) -> None:
        value = torch.cat([torch.zeros(1, 4, 8, 16), torch.randn(1, 4, 8, 16)]).half()
        controller = committed(Controller(ALWAYS, SITES, cache=CacheConfig(granularity="head")), value)
        read = controller.reuse(0)
        assert torch.equal(read[0], value[0])
        assert controller.stats.cache_bytes == value.numel() + 4 * 2 * 4

    def test_native_is_exact_of_any_dtype_and_a_tuple_stays_one(self) -> None:
        values = (X.double(), torch.arange(6).view(2, 3), X.transpose(1, 2))
        controller = committed(Controller(ALWAYS, SITES, cache=CacheConfig(dtype="native")), values)
        assert controller.should_reuse(0, like=values)
        read = controller.reuse(0)
        assert isinstance(read, tuple)
        for new, old in zip(read, values, strict=True):
            assert torch.equal(new, old)
            assert (new.dtype, new.stride()) == (old.dtype, old.stride())

    @pytest.mark.parametrize("dtype", ["int8", "native"])
    def test_what_is_handed_in_and_out_is_not_what_is_kept(self, dtype: str) -> None:
        value = X.clone()
        controller = committed(Controller(ALWAYS, SITES, cache=CacheConfig(dtype=dtype)), value)
        value.zero_()
        first = controller.reuse(0)
        expected = first.clone()
        first.add_(1)
        assert torch.equal(controller.reuse(0), expected)
        assert (expected - X).abs().max() < 0.05

    def test_nan_stays_seen(self) -> None:
        value = X.clone()
        value[1, 2, 3] = math.nan
        read = committed(Controller(ALWAYS, SITES), value).reuse(0)
        assert read[1, 2].isnan().all()
        assert read[0].isfinite().all()

    def test_commit_hands_back_the_fresh_value(self) -> None:
        controller = Controller(ALWAYS, SITES)
        controller.begin_step(0)
        assert controller.commit(0, X) is X

    def test_nothing_is_stored_that_is_never_read(self) -> None:
        for schedule in (Schedule.none(STEPS), Schedule.custom(STEPS, lambda step, site, *_: site == 3)):
            controller = Controller(schedule, SITES)
            controller.begin_step(0)
            for site in range(SITES):
                controller.commit(site, X)
            stored = {key for key in range(SITES) if schedule.plan(SITES).reuse[:, key].any()}
            assert controller.stats.cache_bytes == len(stored) * (X.numel() + 4 * 16)
        controller.begin_step(STEPS - 1)
        controller.commit(3, X)  # the last step: nobody reads it
        assert controller.stats.cache_bytes == 0

    def test_buffers_are_kept_at_their_addresses_if_asked(self) -> None:
        def addresses(controller: Controller) -> set[int]:
            drive(controller, num_steps=3)
            entries = controller._generation.entries.values()
            return {part.data_ptr() for entry in entries for value in entry.values for part in value.parts}

        keeping = Controller(ALWAYS, SITES, cache=CacheConfig(keep_buffers=True))
        assert addresses(keeping) == addresses(keeping)
        read = [committed(keeping, value).reuse(0) for value in (X, -X, X[:1])]
        assert torch.equal(read[0], -read[1])
        assert read[2].shape == X[:1].shape

    def test_on_the_host(self) -> None:
        read = committed(Controller(ALWAYS, SITES, cache=CacheConfig(device="cpu")), X).reuse(0)
        assert read.device == X.device
        assert (read - X).abs().max() < 0.05

    def test_stored_in_inference_mode_read_with_gradients(self) -> None:
        controller = Controller(ALWAYS, SITES, cache=CacheConfig(dtype="native"))
        controller.begin_step(0)
        with torch.inference_mode():
            controller.commit(0, X + 0)
        controller.begin_step(1)
        weight = torch.ones(16, requires_grad=True)
        (controller.reuse(0) * weight).sum().backward()
        assert weight.grad is not None
        assert torch.allclose(weight.grad, X.sum((0, 1)))


class TestRefused:
    def test_another_shape_dtype_or_number_of_exits_computes(self) -> None:
        controller = committed(Controller(ALWAYS, SITES))
        for like in (X[:1], X[:, :4], X.half(), X.to("meta"), (X, X)):
            assert controller.should_reuse(0, like=like).reason == "shape"
            with pytest.raises(RuntimeStateError, match=r"stored is torch\.float32 \[2, 8, 16\] on cpu, asked for is"):
                controller.reuse(0, like=like)
        assert controller.should_reuse(0, like=X)

    def test_reading_where_nothing_is_stored(self) -> None:
        controller = Controller(ALWAYS, SITES)
        controller.begin_step(1)
        with pytest.raises(RuntimeStateError, match=r"reuse\(2, ''\) at step 1: nothing is stored\. .*compute"):
            controller.reuse(2)

    @pytest.mark.parametrize("call", [lambda c: c.should_reuse(0), lambda c: c.commit(0, X), lambda c: c.reuse(0)])
    def test_before_the_first_step(self, call: Callable[[Controller], Any]) -> None:
        with pytest.raises(RuntimeStateError, match=r"Call begin_step\(0\)"):
            call(Controller(ALWAYS, SITES))

    @pytest.mark.parametrize("site", [-1, SITES, True, "0"])
    def test_a_site_that_is_not_there(self, site: Any) -> None:
        controller = committed(Controller(ALWAYS, SITES))
        for call in (controller.should_reuse, controller.reuse, lambda s: controller.commit(s, X)):
            with pytest.raises(PlanError, match=r"no site .*6, numbered from 0"):
                call(site)

    @pytest.mark.parametrize("step", [-1, 1.0, True, None])
    def test_a_step_that_is_none(self, step: Any) -> None:
        with pytest.raises(RuntimeStateError, match=r"an int that counts from 0"):
            Controller(ALWAYS, SITES).begin_step(step)

    def test_a_prompt_length_that_is_none(self) -> None:
        with pytest.raises(GateError, match=r"prompt_length is -1\. Give"):
            Controller(ALWAYS, SITES).begin_step(0, prompt_length=-1)

    @pytest.mark.parametrize("value", [None, [X], (), (X, None)])
    def test_what_is_no_tensor(self, value: Any) -> None:
        controller = committed(Controller(ALWAYS, SITES))
        with pytest.raises(CacheError, match=r"commit\(1\) got .*Give a tensor"):
            controller.commit(1, value)

    def test_what_cannot_be_quantised_leaves_nothing_old_behind(self) -> None:
        controller = committed(Controller(ALWAYS, SITES))
        with pytest.raises(CacheError, match="floating point"):
            controller.commit(0, X.long())
        assert controller.should_reuse(0).reason == "empty"


def test_as_its_docstring_shows() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(16, 48) / 4 for _ in range(SITES)]

    def attention(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x @ weight).chunk(3, -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v), attention_entropy(q[:, None], k[:, None])

    def sample(controller: Controller | None) -> Tensor:
        x = X
        for step in range(STEPS):
            if controller is not None:
                controller.begin_step(step)
            for site, weight in enumerate(weights):
                if controller is not None and controller.should_reuse(site, like=x):
                    y = controller.reuse(site)
                else:
                    y, entropy = attention(x, weight)
                    if controller is not None:
                        y = controller.commit(site, y, entropy=entropy)
                x = x + y / (STEPS * SITES)
        return x

    schedule = Schedule.interval(STEPS, every=3)
    expected = sample(None)
    controller = Controller(schedule, SITES, gates=Gates(entropy=EntropyGate(math.log(8))))
    result = sample(controller)
    assert controller.stats.reused == schedule.plan(SITES).reuse.sum()
    assert 0 < (result - expected).norm() / expected.norm() < 0.05
    assert torch.equal(sample(Controller(schedule, SITES, gates=Gates(entropy=EntropyGate(0.5)))), expected)
    assert torch.equal(sample(Controller(Schedule.none(STEPS), SITES)), expected)


def test_importing_it_imports_no_diffusers() -> None:
    code = "import sys, dqar_fx.controller; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_four_bits_and_groups_come_back_within_half_a_scale() -> None:
    controller = Controller(Schedule.always(3), 1, cache=CacheConfig(dtype="int4", group=4))
    x = torch.randn(2, 5, 10)
    controller.begin_step(0)
    controller.commit(0, x)
    controller.begin_step(1)
    assert controller.should_reuse(0, like=x)
    largest = torch.nn.functional.pad(x, (0, 2)).unflatten(-1, (3, 4)).abs().amax(-1)
    scale = (largest / 7).repeat_interleave(4, -1)[..., :10]
    assert ((controller.reuse(0) - x).abs() <= scale / 2 + 1e-6).all()
    assert controller.stats.cache_bytes == 2 * 5 * (5 + 3 * 4)


def test_a_dtype_each_for_keys_and_values_is_refused() -> None:
    with pytest.raises(CacheError, match=r"a pair for keys and values.*Use one dtype"):
        Controller(Schedule.always(3), 1, cache=CacheConfig("kv", ("native", "int8")))
