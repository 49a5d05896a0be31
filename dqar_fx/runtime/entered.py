"""Generations entered by hand, and which of them the calling code is in."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import Any, Generic, TypeVar

from dqar_fx.errors import RuntimeStateError
from dqar_fx.runtime.generation import Generation

Owner = TypeVar("Owner")


class Entered(Generic[Owner]):
    """A generation as a context manager; remembers the frame of the ``with`` statement for as long as it is open.

    Args:
        owner: what entering gives: the runtime.
        generation: what is entered.
        on_exit: called with the generation when it has been left and freed.
    """

    def __init__(self, owner: Owner, generation: Generation, on_exit: Callable[[Generation], None]) -> None:
        self.owner = owner
        self.generation = generation
        self.frame: FrameType | None = None
        self.may_be_suspended = False
        self._on_exit = on_exit

    def __enter__(self) -> Owner:
        if self in open_generations.get():
            raise RuntimeStateError("this generation is entered already. Make another: runtime.generation(num_steps).")
        self.frame = sys._getframe(1)
        self.may_be_suspended = bool(self.frame.f_code.co_flags & inspect.CO_GENERATOR)
        open_generations.set((*open_generations.get(), self))
        return self.owner

    def __exit__(self, *_: object) -> None:
        open_generations.set(tuple(other for other in open_generations.get() if other is not self))
        self.frame = None
        self.generation.free()
        self._on_exit(self.generation)


#: Entered and not left, innermost last. A context variable, so that threads and asyncio tasks (and
#: ``asyncio.to_thread``) each see their own.
open_generations: ContextVar[tuple[Entered[Any], ...]] = ContextVar("dqar_fx_generations", default=())


def entered_by(owner: object) -> Generation | None:
    """The generation of ``owner`` that the calling code is in; None if it has entered none."""
    mine: list[Entered[object]] = [each for each in open_generations.get() if each.owner is owner]
    if not mine:
        return None
    if len(mine) == 1 and not mine[0].may_be_suspended:
        return mine[0].generation
    # Nested, or generators that take turns: of those, only the one that runs now has its frame on the stack.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for each in reversed(mine):
            if each.frame is frame:
                return each.generation
        frame = frame.f_back
    # A generator has entered it and stands still: it may be a context manager around us, or a loop that has nothing to
    # do with us. What the call is conditioned on has to tell.
    mine[-1].generation.is_shared = True
    return mine[-1].generation
