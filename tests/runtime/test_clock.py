"""Every event of the clock's table, one test each."""

import math

import pytest

from dqar_fx.runtime.clock import Clock, Move

START, NEXT, SAME, REPEAT, UNKNOWN = Move.START, Move.NEXT, Move.SAME, Move.REPEAT, Move.UNKNOWN


def moves(clock: Clock, timesteps: list[float], branch: str = "") -> list[tuple[int, Move]]:
    ticks = [clock.at_timestep(t, branch) for t in timesteps]
    return [(t.step, t.move) for t in ticks]


def test_a_falling_timestep_counts_the_steps() -> None:
    assert moves(Clock(), [999, 800, 10, 0]) == [(0, START), (1, NEXT), (2, NEXT), (3, NEXT)]


def test_a_rise_begins_a_new_generation() -> None:
    assert moves(Clock(), [999, 800, 999, 800]) == [(0, START), (1, NEXT), (0, START), (1, NEXT)]


def test_time_that_runs_upwards_is_recognised_after_two_moves_and_remembered() -> None:
    clock = Clock()
    assert moves(clock, [0.0, 0.1, 0.2, 0.3]) == [(0, START), (0, START), (2, START), (3, NEXT)]
    assert moves(clock, [0.0, 0.1, 0.2]) == [(0, START), (1, NEXT), (2, NEXT)]
    clock.clear()
    assert moves(clock, [0.0, 0.1]) == [(0, START), (1, NEXT)]


def test_an_abandoned_run_does_not_turn_time_around() -> None:
    clock = Clock()
    assert moves(clock, [999, 800, 999, 800, 999, 800, 600])[-1] == (2, NEXT)


def test_another_branch_at_the_same_timestep_is_the_same_step() -> None:
    clock = Clock()
    seen = [clock.at_timestep(t, b) for t in (999, 800) for b in ("cond", "uncond")]
    assert [(t.step, t.move) for t in seen] == [(0, START), (0, SAME), (1, NEXT), (1, SAME)]


def test_the_same_timestep_in_the_same_branch_is_a_repeat() -> None:
    assert moves(Clock(), [999, 999, 800, 800]) == [(0, START), (0, REPEAT), (1, NEXT), (1, REPEAT)]


@pytest.mark.parametrize("value", [None, math.nan, (1.0, math.nan)])
def test_an_unreadable_timestep_has_no_step(value: object) -> None:
    clock = Clock()
    clock.at_timestep(999, "")
    assert clock.at_timestep(value, "").move is UNKNOWN  # type: ignore[arg-type]
    assert moves(clock, [800]) == [(1, NEXT)]


def test_samples_at_different_timesteps_have_no_direction() -> None:
    clock = Clock()
    assert moves(clock, [(9.0, 8.0), (8.0, 7.0), (8.0, 7.0)]) == [(0, START), (0, START), (0, REPEAT)]  # type: ignore[list-item]


def test_steps_given_by_hand() -> None:
    clock = Clock()
    seen = [clock.at_step(s, "") for s in (0, 1, 1, 4, 2)]
    assert [(t.step, t.move) for t in seen] == [(0, START), (1, NEXT), (1, REPEAT), (4, NEXT), (2, START)]


def test_other_timesteps_of_the_scheduler_are_another_generation() -> None:
    clock, first, second = Clock(), object(), object()
    clock.at_step(0, "", calendar=first)
    assert clock.at_step(1, "", calendar=first).move is NEXT
    assert clock.at_step(2, "", calendar=second).move is START


def test_clearing_begins_anew() -> None:
    clock = Clock()
    moves(clock, [999, 800])
    clock.clear()
    assert clock.step == -1
    assert moves(clock, [600, 500]) == [(0, START), (1, NEXT)]
