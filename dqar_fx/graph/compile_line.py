"""A line in the terminal for as long as something is compiled: minutes may pass, and a user should know at what."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CLEAR = "\r\x1b[K"


@contextmanager
def compile_line(number: int, seconds: float) -> Iterator[None]:
    """Inside, the last line of a terminal says that piece ``number`` is compiled, after ``seconds`` for those before.

    On standard error, and only if that is a terminal.
    """
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield
        return
    before = f", {seconds:.0f} s so far" if number > 1 else ""
    stream.write(f"{_CLEAR}dqar_fx: compiling piece {number}{before} ...")
    stream.flush()
    try:
        yield
    finally:
        stream.write(_CLEAR)
        stream.flush()
