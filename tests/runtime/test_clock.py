"""Every event of the clock's table, one test each."""

import math

import pytest

from dqar_fx.runtime.clock import Clock, Move, Tick
from dqar_fx.runtime.conditioning import Relation

START, DOUBT, NEXT = Move.START, Move.DOUBT, Move.NEXT
SAME, REPEAT, UNKNOWN = Move.SAME, Move.REPEAT, Move.UNKNOWN


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


def test_timesteps_of_several_samples_or_tokens_move_on_together() -> None:
    clock = Clock()
    assert moves(clock, [(9.0, 8.0), (8.0, 7.0), (8.0, 6.0), (8.0, 6.0)]) == [
        (0, START),
        (1, NEXT),
        (2, NEXT),
        (2, REPEAT),
    ]  # type: ignore[list-item]
    assert moves(Clock(), [9.0, (0.0, 8.0), (0.0, 7.0)]) == [(0, START), (1, NEXT), (2, NEXT)]  # type: ignore[list-item]


def test_timesteps_that_part_begin_anew() -> None:
    assert moves(Clock(), [(9.0, 8.0), (8.0, 9.0), (1.0, 2.0, 3.0)]) == [(0, START)] * 3  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("relation", "expected"),
    [
        (Relation.OTHER, Tick(0, START, "new-generation")),
        (Relation.EARLIER, Tick(2, DOUBT, "new-generation")),
        (Relation.SHAPE, Tick(2, DOUBT, "shape")),
    ],
)
def test_another_conditioning_at_the_next_step(relation: Relation, expected: Tick) -> None:
    clock = Clock()
    moves(clock, [9.0, 8.0])
    assert clock.doubt(clock.at_timestep(7.0, ""), "", relation) == expected
    assert clock.at_timestep(6.0, "") == Tick(expected.step + 1, NEXT)


def test_another_conditioning_at_the_same_step_keeps_the_step() -> None:
    clock = Clock()
    moves(clock, [9.0, 8.0])
    assert clock.doubt(clock.at_timestep(8.0, ""), "", Relation.OTHER) == Tick(1, DOUBT, "new-generation")
    assert clock.at_timestep(7.0, "") == Tick(2, NEXT)


def test_a_doubted_position_of_the_scheduler_stays_a_position() -> None:
    clock, calendar = Clock(), object()
    clock.at_step(4, "", calendar=calendar)
    tick = clock.doubt(clock.at_step(5, "", calendar=calendar), "", Relation.OTHER)
    assert tick == Tick(5, START, "new-generation")


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
