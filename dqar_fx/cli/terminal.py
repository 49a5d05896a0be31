"""What the commands write: results on standard output, progress on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def say(text: str = "") -> None:
    """A line of the command's result, as it is: wrapped by nobody."""
    sys.stdout.write(f"{text}\n")


class Bar:
    """One progress bar whose text changes; where standard error is no terminal, a line for each new text."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=steps)

    def tell(self, text: str) -> None:
        """Say what is going on from here."""
        self._progress.update(self._task, description=text)
        if not self._progress.console.is_terminal:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self) -> None:
        """One step is done."""
        self._progress.advance(self._task)


@contextmanager
def bar(steps: int) -> Iterator[Bar]:
    """A progress bar of so many sampling steps on standard error; it disappears when it is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
    )
    # Without a terminal nothing can be redrawn: `Bar` writes lines instead.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, steps)
