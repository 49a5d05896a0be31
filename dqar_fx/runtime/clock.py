"""Which step of which generation is this call? Identity is a value, never a count of calls.

The clock is told what a call carries (a step number given by hand, a position in the scheduler's timesteps, or the
timestep itself, and whether its conditioning is that of the calls before) and answers with a ``Tick``. What each event
does:

====================================== ==================================================================
event                                  answer
====================================== ==================================================================
first call                             step 0 of a new generation (or the scheduler's position)
the timestep moves on                  the next step
the timestep moves back                step 0 of a new generation; a model whose time runs upwards is
                                       recognised after two moves in a row, from then on for good
same step, another branch              the same step
same step, same branch                 a *repeat*: it cannot be told whose values are stored (a second-order
                                       sampler, a restarted run), so the branch forgets them, computes and stores
                                       nothing
the same, with another conditioning    the branch forgets its values and stores new ones, to be read at the next
                                       step by a call so conditioned (a run restarted after one call); guidance in
                                       two calls without names comes back to the first, and so forgets these too
a step is left out                     that step; values older than planned are not read (the cache checks)
a timestep for each sample or token    they move on together if some fall and none rises; otherwise a new
                                       generation
an unknown or NaN timestep             no step: compute, store nothing
another set of timesteps (scheduler)   a new generation
next step, another conditioning        a new generation: runs that take turns, or one that begins in the middle
                                       of the schedule where another was abandoned
the same values, in other memory       a loop that makes its inputs anew: the next step; but where a prompt's
                                       embedding is, for the first time, and the latents are other noise, nothing
                                       stored is read
another conditioning, of other shapes  the step goes on, but nothing stored is read: guidance was switched off,
                                       or it is another run (both judged only where no generation is entered by hand)
another shape, dtype or device         another captured graph, or other sizes: its store is empty
changed weights                        the step goes on, everything stored is forgotten
another thread                         has a clock of its own
an exception, leaving a generation     the clock is cleared: what follows is a new generation
====================================== ==================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from dqar_fx.runtime.conditioning import Relation

NEW_GENERATION = "new-generation"


class Move(Enum):
    """How a call relates to the one before it."""

    START = "start"  # a new generation
    DOUBT = "doubt"  # it may be one: the step goes on, nothing stored is read
    NEXT = "next"  # another step of the same generation
    SAME = "same"  # the same step, another branch
    REPEAT = "repeat"  # the same step and branch again
    UNKNOWN = "unknown"  # no identity


@dataclass(frozen=True, slots=True)
class Tick:
    """Where a call stands: ``step`` counts from 0, -1 when unknown; ``reason`` is why stored values are not read."""

    step: int
    move: Move
    reason: str = ""


#: The value of a timestep: one number, or one per sample (or token) where they differ.
Timestep = float | tuple[float, ...]


class Clock:
    """Turns what calls carry into steps. One per generation (explicit) or per thread (implicit)."""

    def __init__(self) -> None:
        self._rising = False  # the direction of time outlives a generation: it is a property of the model
        self._moves_against = 0
        self.clear()

    def clear(self) -> None:
        """Forget where we are; the next call starts a generation."""
        self._step = -1
        self._timestep: Timestep | None = None
        self._calendar: object = None
        self._branches: set[str] = set()

    @property
    def step(self) -> int:
        """The step of the last call, -1 before the first."""
        return self._step

    def at_step(self, step: int, branch: str, *, calendar: object = None) -> Tick:
        """A call whose step is known: given by hand, or its position in ``calendar`` (the scheduler's timesteps)."""
        if calendar is not self._calendar or self._step < 0 or step < self._step:
            return self._start(step, branch, calendar=calendar)
        return self._advance(step, branch)

    def at_timestep(self, timestep: Timestep | None, branch: str) -> Tick:
        """A call of which only the timestep is known."""
        if timestep is None or _is_nan(timestep):
            return Tick(-1, Move.UNKNOWN)
        before = self._timestep
        if self._step < 0 or before is None:
            return self._start(0, branch, timestep=timestep)
        if timestep == before:
            return self._advance(self._step, branch)
        rises = _rises(before, timestep)
        if rises is None:  # no common direction: only exact repetition can be recognised
            return self._start(0, branch, timestep=timestep)
        if rises == self._rising:
            self._moves_against = 0
            self._timestep = timestep
            return self._advance(self._step + 1, branch)
        self._moves_against += 1
        if self._moves_against < 2:
            return self._start(0, branch, timestep=timestep)
        # Twice in a row: time runs the other way in this model. What was stored on the way was stored in doubt.
        self._rising, self._moves_against = not self._rising, 0
        return self._start(2, branch, timestep=timestep)

    def doubt(self, tick: Tick, branch: str, relation: Relation) -> Tick:
        """The call of ``tick`` had another conditioning than the last call of its branch (see the table)."""
        if tick.move is Move.REPEAT or relation is not Relation.OTHER:
            return Tick(tick.step, Move.DOUBT, "shape" if relation is Relation.SHAPE else NEW_GENERATION)
        # By the timestep alone, steps are counted from where a run begins; a scheduler's position holds anyway.
        step = 0 if self._timestep is not None else tick.step
        self._start(step, branch, timestep=self._timestep, calendar=self._calendar)
        return Tick(step, Move.START, NEW_GENERATION)

    def _start(self, step: int, branch: str, *, timestep: Timestep | None = None, calendar: object = None) -> Tick:
        self._step, self._timestep, self._calendar, self._branches = step, timestep, calendar, {branch}
        return Tick(step, Move.START)

    def _advance(self, step: int, branch: str) -> Tick:
        if step > self._step:
            self._step, self._branches = step, {branch}
            return Tick(step, Move.NEXT)
        if branch in self._branches:
            return Tick(step, Move.REPEAT)
        self._branches.add(branch)
        return Tick(step, Move.SAME)


def _rises(before: Timestep, after: Timestep) -> bool | None:
    """Whether time went up from ``before`` to ``after`` (which differ); None if some went up and some down."""
    if isinstance(before, float) and isinstance(after, float):
        return after > before
    befores = before if isinstance(before, tuple) else (before,)
    afters = after if isinstance(after, tuple) else (after,)
    if len(befores) != len(afters):
        length = max(len(befores), len(afters))
        if 1 not in (len(befores), len(afters)):
            return None
        befores, afters = ((*x,) * (length // len(x)) for x in (befores, afters))
    pairs = list(zip(befores, afters, strict=True))
    if all(b <= a for b, a in pairs):
        return True
    return False if all(b >= a for b, a in pairs) else None


def _is_nan(timestep: Timestep) -> bool:
    return any(map(math.isnan, timestep)) if isinstance(timestep, tuple) else math.isnan(timestep)
