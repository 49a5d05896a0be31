"""The gates, each alone: what it lets pass, what it blocks, and what it refuses to be made of."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dqar_fx import ChangeGate, CrossBranch, DqarError, EntropyGate, GateError, Gates, SnrGate
from dqar_fx.gates import AgeGate, BudgetGate, Candidate, Measurement

NAN = math.nan


def with_entropy(entropy: float, largest: float | None = None, **others: Any) -> Candidate:
    return Candidate(measured=Measurement(entropy, entropy if largest is None else largest), **others)


def with_change(change: float, largest: float | None = None) -> Candidate:
    return Candidate(measured=Measurement(change=change, change_max=change if largest is None else largest))


class TestEntropyGate:
    @pytest.mark.parametrize("threshold", [0.5, 2.0, 2.5])
    @pytest.mark.parametrize("base", [16, 64, 77])
    @pytest.mark.parametrize("length", [1, 4, 16, 77, 120, 300, 512, 4096])
    def test_the_limit_grows_with_the_root_of_the_prompt_up_to_twice_the_threshold(
        self, threshold: float, base: int, length: int
    ) -> None:
        expected = threshold * (length / base) ** 0.5 if length <= 4 * base else 2 * threshold
        assert EntropyGate(threshold, base_prompt_length=base).limit(length) == pytest.approx(expected, rel=1e-12)

    def test_without_a_prompt_the_limit_is_the_threshold(self) -> None:
        assert EntropyGate(2.5).limit() == EntropyGate(2.5).limit(None) == EntropyGate(2.5).limit(0) == 2.5
        assert EntropyGate(2.5).limit(77) == 2.5
        assert EntropyGate(2.5, adaptive=False).limit(512) == 2.5

    def test_the_entropy_must_be_strictly_below(self) -> None:
        gate = EntropyGate(2.0)
        assert gate.allows(with_entropy(math.nextafter(2.0, 0)))
        assert not gate.allows(with_entropy(2.0))
        assert not EntropyGate(0.0).allows(with_entropy(0.0))

    def test_what_was_not_measured_or_is_nan_blocks(self) -> None:
        for gate in (EntropyGate(2.0), EntropyGate(math.inf), EntropyGate(2.0, per_sample=True)):
            assert not gate.allows(Candidate())
            assert not gate.allows(with_entropy(NAN))
        assert not EntropyGate(2.0, per_sample=True).allows(with_entropy(1.0, NAN))

    def test_the_prompt_of_the_candidate_decides(self) -> None:
        assert EntropyGate(2.0).allows(with_entropy(3.0, prompt_length=308))
        assert not EntropyGate(2.0).allows(with_entropy(3.0, prompt_length=77))
        assert not EntropyGate(2.0, adaptive=False).allows(with_entropy(3.0, prompt_length=308))
        assert EntropyGate(2.0, base_prompt_length=16).allows(with_entropy(3.0, prompt_length=77))

    def test_per_sample_looks_at_the_largest(self) -> None:
        candidate = with_entropy(1.0, 2.5)
        assert EntropyGate(2.0).allows(candidate)
        assert not EntropyGate(2.0, per_sample=True).allows(candidate)

    def test_single_sites_may_have_limits_of_their_own(self) -> None:
        gate = EntropyGate(2.0, site_scales={3: 0.5, 4: 1.5})
        assert [gate.allows(with_entropy(1.5, site=site)) for site in (2, 3, 4)] == [True, False, True]
        assert [gate.allows(with_entropy(2.5, site=site)) for site in (2, 3, 4)] == [False, False, True]
        assert gate.allows(with_entropy(5.9, site=4, prompt_length=512))  # 1.5 times twice the threshold

    def test_unit_and_rows_tell_what_has_to_be_measured(self) -> None:
        assert Gates().measures == {"entropy:row:256"}
        assert Gates(entropy=EntropyGate(0.9, normalize="keys", rows=None)).measures == {"entropy:keys:"}
        assert Gates(entropy=EntropyGate(rows=64)).measures == {"entropy:row:64"}

    def test_a_limit_that_no_entropy_can_reach_lets_pass_what_was_not_measured(self) -> None:
        assert EntropyGate(2.1).allows(Candidate(entropy_bound=math.log(8)))
        assert not EntropyGate(2.0).allows(Candidate(entropy_bound=math.log(8)))
        assert EntropyGate(1.01, normalize="keys").allows(Candidate())
        assert not EntropyGate(1.0, normalize="keys").allows(Candidate())


class TestSnrGate:
    def test_bounds_are_inclusive(self) -> None:
        gate = SnrGate(low=0.1, high=10)
        answers = [gate.allows(Candidate(snr=snr)) for snr in (0.0, 0.0999, 0.1, 1.0, 10.0, 10.001, math.inf)]
        assert answers == [False, False, True, True, True, False, False]
        assert SnrGate().allows(Candidate(snr=math.inf))
        assert SnrGate(low=1, high=1).allows(Candidate(snr=1.0))

    def test_an_unknown_ratio_blocks(self) -> None:
        assert not SnrGate(low=0).allows(Candidate())
        assert not SnrGate(low=0).allows(Candidate(snr=NAN))

    @pytest.mark.parametrize("num_sites", [1, 6, 28])
    def test_the_deepest_third_may_need_more(self, num_sites: int) -> None:
        gate = SnrGate(low=0.1, deep_snr=1.0)
        for site in range(num_sites):
            is_deep = site >= 2 * num_sites / 3
            assert gate.allows(Candidate(snr=0.5, site=site, num_sites=num_sites)) is not is_deep
            assert gate.allows(Candidate(snr=1.0, site=site, num_sites=num_sites))
            assert not gate.allows(Candidate(snr=0.05, site=site, num_sites=num_sites))


def test_ages_up_to_the_limit_pass() -> None:
    assert [AgeGate(6).allows(Candidate(age=age)) for age in (0, 5, 6, 7)] == [True, True, True, False]


def test_a_value_is_read_as_often_as_the_budget_says() -> None:
    assert [BudgetGate(2).allows(Candidate(reuses=reuses)) for reuses in (0, 1, 2)] == [True, True, False]
    assert not BudgetGate(0).allows(Candidate())


def test_changes_up_to_the_threshold_pass() -> None:
    gate = ChangeGate(0.25)
    assert [gate.allows(with_change(change)) for change in (0.0, 0.25, 0.26, NAN)] == [True, True, False, False]
    assert not gate.allows(Candidate())
    assert gate.allows(with_change(0.2, 0.3))
    assert not ChangeGate(0.25, per_sample=True).allows(with_change(0.2, 0.3))


def test_branches_share_up_to_the_threshold() -> None:
    sharing = CrossBranch(0.25)
    measured = [Measurement(difference=d, difference_max=d) for d in (0.0, 0.25, 0.26, NAN)]
    assert [sharing.allows(m) for m in measured] == [True, True, False, False]
    assert not CrossBranch(math.inf).allows(Measurement())
    uneven = Measurement(difference=0.2, difference_max=0.3)
    assert sharing.allows(uneven)
    assert not CrossBranch(0.25, per_sample=True).allows(uneven)
    assert Gates(cross_branch=sharing).sharing is sharing
    assert Gates(cross_branch=sharing, per_sample=True).sharing == CrossBranch(0.25, per_sample=True)
    assert Gates().sharing is None
    assert Gates(entropy=None, snr=None, cross_branch=sharing).cascade() == ()  # it blocks nothing
    assert str(sharing) == "CrossBranch(0.25)"


class TestGates:
    def test_the_cheap_questions_come_first(self) -> None:
        gates = Gates(max_age=6, max_reuse=2, change=ChangeGate(0.1))
        assert [gate.reason for gate in gates.cascade()] == ["stale", "budget", "snr", "entropy", "change"]
        assert [gate.reason for gate in gates.cascade(with_snr=False)] == ["stale", "budget", "entropy", "change"]

    def test_a_gate_that_is_none_is_left_out(self) -> None:
        assert Gates(entropy=None, snr=None).cascade() == ()
        assert Gates(entropy=None, snr=None).measures == frozenset()
        assert Gates(entropy=None, snr=None, change=ChangeGate(0.1)).measures == {"change"}

    def test_each_alone_can_block(self) -> None:
        gates = Gates(max_age=6, max_reuse=2, change=ChangeGate(0.1))
        good = Candidate(age=1, snr=1.0, measured=Measurement(1.0, 1.0, 0.05, 0.05))
        bad = {
            "stale": replace(good, age=7),
            "budget": replace(good, reuses=2),
            "snr": replace(good, snr=0.01),
            "entropy": replace(good, measured=Measurement(3.0, 3.0, 0.05, 0.05)),
            "change": replace(good, measured=Measurement(1.0, 1.0, 0.5, 0.5)),
        }
        assert all(gate.allows(good) for gate in gates.cascade())
        for reason, candidate in bad.items():
            assert [gate.reason for gate in gates.cascade() if not gate.allows(candidate)] == [reason]

    def test_per_sample_is_handed_on(self) -> None:
        candidate = Candidate(measured=Measurement(1.0, 3.0, 0.05, 0.5))
        gates = Gates(snr=None, change=ChangeGate(0.1))
        assert [gate.allows(candidate) for gate in gates.cascade()] == [True, True]
        assert [gate.allows(candidate) for gate in replace(gates, per_sample=True).cascade()] == [False, False]

    def test_frozen(self) -> None:
        with pytest.raises(AttributeError):
            Gates().max_age = 3  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: EntropyGate(-1.0), r"EntropyGate\.threshold is -1\.0\. Give"),
        (lambda: EntropyGate(NAN), r"EntropyGate\.threshold is nan\. Give"),
        (lambda: EntropyGate("2"), r"EntropyGate\.threshold is '2'\. Give"),  # type: ignore[arg-type]
        (lambda: EntropyGate(base_prompt_length=0), r"EntropyGate\.base_prompt_length is 0\. Give"),
        (lambda: EntropyGate(base_prompt_length=7.5), r"base_prompt_length is 7\.5\. Give"),  # type: ignore[arg-type]
        (lambda: EntropyGate(rows=0), r"EntropyGate\.rows is 0\. Give"),
        (lambda: EntropyGate(normalize="sum"), r"EntropyGate\.normalize is 'sum'\. Use 'row'.*'keys'"),
        (lambda: EntropyGate(site_scales={2: -0.5}), r"EntropyGate\.site_scales\[2\] is -0\.5\. Give"),
        (lambda: SnrGate(low=-0.1), r"SnrGate\.low is -0\.1\. Give"),
        (lambda: SnrGate(high=NAN), r"SnrGate\.high is nan\. Give"),
        (lambda: SnrGate(deep_snr=-1), r"SnrGate\.deep_snr is -1\. Give"),
        (lambda: SnrGate(low=2, high=1), r"low=2, high=1.*Give low <= high"),
        (lambda: ChangeGate(-0.1), r"ChangeGate\.threshold is -0\.1\. Give"),
        (lambda: ChangeGate(NAN), r"ChangeGate\.threshold is nan\. Give"),
        (lambda: Gates(max_age=-1), r"Gates\.max_age is -1\. Give"),
        (lambda: Gates(max_age=2.5), r"Gates\.max_age is 2\.5\. Give"),  # type: ignore[arg-type]
        (lambda: Gates(max_reuse=-1), r"Gates\.max_reuse is -1\. Give"),
        (lambda: Gates(max_reuse=True), r"Gates\.max_reuse is True\. Give"),
        (lambda: Gates(entropy=2.0), r"Gates\.entropy is 2\.0\. Give a EntropyGate"),  # type: ignore[arg-type]
        (lambda: Gates(snr=SnrGate), r"Gates\.snr is <class .*Give a SnrGate"),  # type: ignore[arg-type]
        (lambda: CrossBranch(-0.1), r"CrossBranch\.threshold is -0\.1\. Give"),
        (lambda: CrossBranch(NAN), r"CrossBranch\.threshold is nan\. Give"),
        (lambda: CrossBranch(0.1, refresh=0), r"CrossBranch\.refresh is 0\. Give an int of at least 1"),
        (lambda: Gates(cross_branch=0.1), r"Gates\.cross_branch is 0\.1\. Give a CrossBranch"),  # type: ignore[arg-type]
        (lambda: Gates(change=0.1), r"Gates\.change is 0\.1\. Give a ChangeGate"),  # type: ignore[arg-type]
    ],
)
def test_a_limit_without_meaning_is_refused_by_name_and_value(make: Any, named: str) -> None:
    with pytest.raises(GateError, match=named) as caught:
        make()
    assert isinstance(caught.value, DqarError)
    assert isinstance(caught.value, ValueError)
