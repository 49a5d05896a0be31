"""The search for plans, against trying out every plan there is."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from dqar_fx.calibration.rules import rule_frontier, rules
from dqar_fx.calibration.solve import (
    best_runs,
    best_runs_of_each_size,
    between,
    frontier,
    predict,
    run_costs,
)
from dqar_fx.plan import Plan
from dqar_fx.schedule import Schedule

T, S, A, N = 7, 3, 3, 5


@pytest.fixture
def c() -> npt.NDArray[np.float64]:
    found = np.random.default_rng(0).normal(size=(N, T, S, A + 1)) ** 3
    found[..., 0] = 0
    for step in range(T):
        found[:, step, :, step + 1 :] = 0
    return found


def cost_of(c: npt.NDArray[np.float64], steps: tuple[bool, ...], sites: list[int]) -> float:
    """By the definition: within a run errors add up, between runs their squares do."""
    total, error, computed = 0.0, np.zeros(N), 0
    for step in range(T):
        if not steps[step]:
            total += float((error**2).mean())
            error, computed = np.zeros(N), step
        else:
            if step - computed > A:
                return float("inf")
            error = error + c[:, step, sites, step - computed].sum(1)
    return total + float((error**2).mean())


ALL = [(False, *rest) for rest in itertools.product((False, True), repeat=T - 1)]


@pytest.mark.parametrize("gain", [1e-6, 0.1, 1.0, 30.0, 1e6])
def test_runs_are_the_best_there_are_for_a_gain(c: npt.NDArray[np.float64], gain: float) -> None:
    costs = run_costs(c, [0, 2])
    best = min(ALL, key=lambda steps: cost_of(c, steps, [0, 2]) - gain * sum(steps))
    assert best_runs(costs, gain).tolist() == list(best)


def test_runs_are_the_best_there_are_of_each_size(c: npt.NDArray[np.float64]) -> None:
    found = best_runs_of_each_size(run_costs(c, [0, 1, 2]))
    for size, steps in enumerate(found, 1):
        least = min(cost_of(c, other, [0, 1, 2]) for other in ALL if sum(other) == size)
        assert steps.sum() == size
        assert cost_of(c, tuple(steps.tolist()), [0, 1, 2]) == pytest.approx(least)
    assert len(found) == T - 1 - (T - 1) // (A + 1)  # no age above A


def test_a_prediction_adds_up_all_that_is_reused(c: npt.NDArray[np.float64]) -> None:
    reuse = np.zeros((T, S), bool)
    reuse[2:4, 1] = reuse[5, 0] = True
    expected = c[:, 2, 1, 1] + c[:, 3, 1, 2] + c[:, 5, 0, 1]
    assert predict(c, reuse) == pytest.approx(float((expected**2).mean()))
    assert predict(c, np.zeros((T, S), bool)) == 0


@pytest.mark.parametrize("groups", [[[0, 1, 2]], [[0], [1], [2]], [[0, 2], [1]]])
def test_a_frontier_goes_from_little_to_much(c: npt.NDArray[np.float64], groups: list[list[int]]) -> None:
    work = [0.1 * len(group) for group in groups]
    found = frontier(c, groups, work, "name")
    saved = [candidate.saved for candidate in found]
    assert saved == sorted(saved)
    assert saved[-1] > 0.15
    for candidate in found:
        assert candidate.squared_error == predict(c, candidate.reuse)
        assert candidate.saved == pytest.approx(candidate.reuse.mean(0) @ np.full(S, 0.1))
        for group in groups:
            assert (candidate.reuse[:, group] == candidate.reuse[:, group[:1]]).all()


def test_what_is_exact_is_read_at_every_step(c: npt.NDArray[np.float64]) -> None:
    for candidate in frontier(c, [[0, 2]], [0.2], "all", exact=[1]):
        assert candidate.reuse[1:, 1].all()


def test_of_the_rules_those_are_left_that_no_other_beats(c: npt.NDArray[np.float64]) -> None:
    found = rule_frontier(c, lambda reuse: float(reuse.mean()), exact=[1])
    every = [rule.plan(S).reuse for rule in rules(T)]
    for candidate in found:
        assert Schedule.parse(candidate.groups).plan(S).reuse[:, [0, 2]].tolist() == candidate.reuse[:, [0, 2]].tolist()
        assert candidate.reuse[1:, 1].all()
        for reuse in every:
            exact = reuse.copy()
            exact[1:, 1] = True
            if reuse.any() and Plan(reuse).age.max() <= A and exact.mean() >= candidate.saved:
                assert predict(c, reuse) >= candidate.squared_error
    assert [a.saved for a in found] == sorted({a.saved for a in found})


def test_between_two_neighbours_one_site_after_the_other_goes_further(c: npt.NDArray[np.float64]) -> None:
    less, more = frontier(c, [[0, 1, 2]], [0.3], "all")[2:4]
    steps = between(c, less, more)
    assert len(steps) == S - 1
    for number, candidate in enumerate(steps, 1):
        further = [s for s in range(S) if (candidate.reuse[:, s] == more.reuse[:, s]).all()]
        assert len(further) == number
        assert less.saved < candidate.saved < more.saved
