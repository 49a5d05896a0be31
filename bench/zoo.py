"""What the pass finds in every transformer of diffusers, and whether reuse is what a replay of the attentions gives.

Each class is built small, run eagerly, with nothing reused, and with every attention reused at every other step; the
last is compared, bit for bit, with the eager model whose attentions are replayed (``tests/zoo``). ``exits``: tensors
that leave each site. ``left``: calls of ``scaled_dot_product_attention`` that belong to no site; ``refused``: what was
found and is left computing. ``bound``: how much faster a call that reuses every site can be at most, counted in FLOP at
this (small) size. ``published``: the same at the size that the class has by default, which is that of the model it was
written for; counted on tensors without data.

    python bench/zoo.py                            # all classes, 15 to 30 minutes on one core
    python bench/zoo.py --classes 'Flux*' 'Wan*'
    python bench/zoo.py --published                # minutes more for each class
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import common
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tests`, which is not installed

from dqar_fx import CacheConfig, Schedule
from dqar_fx.explanation import explain
from tests.zoo.case import Case, check
from tests.zoo.test_zoo import CASES, EXCLUDED

COLUMNS = ("class", "sites", "exits", "captures", "breaks", "pieces", "left", "refused", "bound", "ok")


def run(name: str, case: Case) -> dict[str, Any]:
    """The row of one class; a failure is part of it."""
    started = time.perf_counter()
    try:
        found: dict[str, Any] = {**asdict(check(case)), "ok": "yes"}
    except Exception as error:  # whatever it is, the next class is looked at
        message = (str(error).strip().splitlines() or [""])[0]
        found = {"ok": f"no: {type(error).__name__}: {message}"}
    return {"class": name, "note": case.note, **found, "seconds": round(time.perf_counter() - started, 1)}


def published_bound(name: str) -> float | str:
    """The bound at the default configuration of the class, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(explain(name, Schedule.always(), CacheConfig())["limit"])
    except Exception as error:  # not every class has a configuration by default, or inputs that names tell
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def measured(cases: dict[str, Case], published: bool) -> Iterator[dict[str, Any]]:
    """All rows in turn, with a progress bar on standard error."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for name, case in cases.items():
            progress.update(task, description=name)
            row = run(name, case)
            if published and ":" not in name:
                row["published"] = published_bound(name)
            if not console.is_terminal:
                line = f"{name}: {row['ok']} ({row['seconds']} s)"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            progress.advance(task)
            yield row


def shown(row: dict[str, Any], columns: tuple[str, ...]) -> list[Any]:
    """One line of the table; exits as ``2 x 19 + 1 x 38``."""
    counts = Counter(row.get("exits", ()))
    text = {**row, "exits": " + ".join(f"{exits} x {sites}" for exits, sites in counts.items())}
    if isinstance(row.get("published"), str):
        text["published"] = ""
    return [text.get(column) for column in columns]


def main(argv: list[str] | None = None) -> None:
    """Run the classes asked for, write the records, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", default=["*"], help="patterns of class names")
    parser.add_argument("--published", action="store_true", help="also the bound at each class's default size")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "zoo.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # tiny models: threads that wait for each other cost more than the work

    def wanted(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in args.classes)

    cases = {name: case for name, case in sorted(CASES.items()) if wanted(name)}
    rows = list(measured(cases, args.published))
    rows += [{"class": name, "ok": f"excluded: {reason}"} for name, reason in sorted(EXCLUDED.items()) if wanted(name)]
    where = {
        "machine": common.machine(torch.device("cpu")), "torch": torch.__version__, "commit": common.commit(),
        "date": str(date.today()),
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
    columns = (*COLUMNS, "published") if args.published else COLUMNS
    print(tabulate([shown(row, columns) for row in rows], headers=columns, floatfmt=".2f"))
    good = sum(row["ok"] == "yes" for row in rows)
    print(f"{good} of {len(cases)} as an eager replay, bit for bit; {len(rows) - len(cases)} excluded. {where}")


if __name__ == "__main__":
    main()
