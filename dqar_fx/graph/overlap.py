"""Pieces for the CPU, compiled while the C++ compiler still works on those before.

Inductor writes a piece's kernels in Python, hands each to a C++ compiler in a process of its own, and waits for them,
for a third of the time that a piece takes. Where several pieces are needed anyway, it need not wait before the last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile

#: With these on, Inductor runs what it compiles while it compiles.
RUNS_AT_ONCE = (
    "max_autotune", "max_autotune_gemm", "max_autotune_pointwise", "coordinate_descent_tuning", "benchmark_kernel",
    "benchmark_fusion", "benchmark_combo_kernel", "freezing", "cpp_wrapper",
)  # fmt: skip

_Wait = Callable[[AsyncCompile, dict[str, Any]], None]


class _PerThread(threading.local):
    pending: list[tuple[AsyncCompile, dict[str, Any]]] | None = None


_thread = _PerThread()
_lock = threading.Lock()
_users = 0
_waits: _Wait = AsyncCompile.wait


def is_possible() -> bool:
    """True if nothing that Inductor compiles here is run before it is asked for."""
    return not any(getattr(config, name, False) for name in RUNS_AT_ONCE)


@contextmanager
def overlapping() -> Iterator[None]:
    """Inside, what this thread compiles must not be called; on leaving, all of it has been waited for.

    Raises:
        RuntimeError: on leaving: a compiler failed, as Inductor says it.
    """
    _thread.pending = []
    _patch(1)
    try:
        yield
    finally:
        pending, _thread.pending = _thread.pending, None
        _patch(-1)
        for compilers, names in pending:
            compilers.wait(names)


def _patch(change: int) -> None:
    """Have compilers ask ``_wait`` for as long as anybody overlaps."""
    global _users, _waits  # noqa: PLW0603  # as what is replaced is torch's, for all threads
    with _lock:
        if not _users:
            _waits = AsyncCompile.wait
        _users += change
        AsyncCompile.wait = _wait if _users else _waits  # type: ignore[assignment, method-assign]


def _wait(compilers: AsyncCompile, names: dict[str, Any]) -> None:
    if _thread.pending is None:
        _waits(compilers, names)
    else:
        _thread.pending.append((compilers, names))
