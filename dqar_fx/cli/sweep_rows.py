"""The records of a sweep: how they are called, what is read from them, which are the best."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
#: How many generations of a configuration are timed, each beside one of the baseline.
PAIRS = 4
#: Folder, beside the records, of the first images of each.
IMAGES = "images"


def number(row: Row, *names: str) -> float | None:
    """A number of a row, or the middle of an interval; None where it was not measured."""
    value: Any = row
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("value")
    return None if value is None else float(value)


def name_of(row: Row, *, short: bool = False) -> str:
    """The row as it is called in table and pictures; ``short``: without what is as usual."""
    schedule = short_schedule(row["schedule"]) if short else row["schedule"]
    cache = [] if short and row["cache"] == "int8:token" else [row["cache"]]
    gates = [] if row["gates"] == "none" else [row["gates"]]
    return " | ".join([schedule, *cache, *gates])


def short_schedule(text: str) -> str:
    """``taper:steps=50,first=8.0,warmup=0.0`` -> ``taper(first=8.0)``: without what is as usual."""
    kind, _, rest = text.partition(":")
    usual = ("steps=", "warmup=0.0", "deep_first=False", "refresh=None")
    parts = [part for part in rest.split(",") if part and not part.startswith(usual)]
    kept = [part for part in parts if (kind, part) != ("interval", "fraction=1.0")]
    return f"{kind}({', '.join(kept)})" if kept else kind


def on_the_front(rows: Sequence[Row]) -> set[str]:
    """Keys of the rows that no other beats in both PSNR and work saved."""
    best, found = -1.0, set()
    for row in sorted(rows, key=lambda row: (-row["flop_speedup"], -(number(row, "psnr_db") or 0))):
        psnr = number(row, "psnr_db")
        if psnr is not None and psnr > best:
            best = psnr
            found.add(row["key"])
    return found


def file_name(key: str) -> str:
    """What stands for a configuration in the names of files."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def image_file(folder: Path, key: str) -> Path:
    """Where the first images of a configuration are."""
    return folder / IMAGES / f"{file_name(key)}.png"
