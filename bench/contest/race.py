"""Contenders against each other: processes that stay alive and are told in turn to sample once.

Each has its own process, so peaks, graphs and settings do not mix; and they take turns, A B C A B C, so a drift of the
machine hits all alike. The compiled model without a cache takes part in every group, and speeds are ratios to it within
a group's rounds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch

from contest import contenders

#: Said of what the budget left no time for.
TOO_LATE = "not run: the time given with --budget was used up"
COMMAND = Path(__file__).parents[1] / "peers.py"


class Failed(Exception):
    """A contender that could not be measured; the message says why."""


class Process:
    """One contender's process.

    Args:
        job: what it is to be, as ``child.Child`` reads it.
        folder: for its log and its sample.
        cache: of Inductor's and Triton's compiled code.
        patience: seconds to wait for an answer.
    """

    def __init__(self, job: Mapping[str, Any], folder: Path, cache: Path, patience: float) -> None:
        self.name, self.patience = str(job["contender"]), patience
        stem = f"{job['model']}-{job['contender']}".replace("@", "-")
        self.sample = folder / f"{stem}.pt"
        self.log = folder / f"{stem}.log"
        environment = {
            **os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton"),
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        command = [sys.executable, str(COMMAND), "--child", json.dumps({**job, "sample": str(self.sample)})]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
            )
        self._ready = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._ready.register(self._process.stdout, selectors.EVENT_READ)

    def tell(self, command: str) -> None:
        """Ask for something; ``answer`` has what comes of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except OSError:  # it is gone; answer() says so
            return

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            Failed: it reports an error, died, or took too long.
        """
        assert self._process.stdout is not None
        if not self._ready.select(self.patience):
            self.kill()
            raise Failed(f"no answer in {self.patience:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"its process ended with {self._process.wait()}; the end of its log: {self._last_words()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Failed(found["error"])
        return found

    def ask(self, command: str) -> dict[str, Any]:
        """Tell and wait."""
        self.tell(command)
        return self.answer()

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text().splitlines() if line.strip()]
        return lines[-1][:200] if lines else "(empty)"

    def kill(self) -> None:
        """End it, however it stands."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let it end by itself, or end it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(60)
        except (OSError, subprocess.TimeoutExpired):
            self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()


@dataclass
class Entry:
    """What is known of a contender so far."""

    name: str
    process: Process | None = None
    cache: Path | None = None
    first_s: float | None = None
    second_first_s: float | None = None
    #: Seconds of each round, those of the baseline in the same rounds, and milliseconds of each step in each.
    seconds: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def alive(self) -> bool:
        """Whether it can go on."""
        return not self.failure


class Race:
    """All contenders on one model.

    Args:
        settings: what every job has in common: model, steps, schedule, device, dtype, small, blocks, threads.
        baseline: the contender that takes part in every group, and that speeds are ratios to.
        rounds: timed generations of each.
        group: how many stay alive at a time, beside the baseline.
        jobs: how many compile at a time; with more than one, compile times are not those of a machine of its own.
        second: also start each compiled one again, with what the first process compiled.
        patience: seconds to wait for anything.
        deadline: ``time.monotonic()`` after which no contender is begun.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        baseline: str,
        rounds: int,
        group: int,
        jobs: int,
        second: bool,
        patience: float,
        deadline: float,
    ) -> None:
        self.settings, self.baseline, self.rounds, self.group = dict(settings), baseline, rounds, group
        self.jobs, self.second, self.patience, self.deadline = jobs, second, patience, deadline

    def run(self, names: Sequence[str], say: Any = print) -> list[Entry]:
        """Measure all of them; a contender that fails is an entry with its reason."""
        self.say = say
        with tempfile.TemporaryDirectory(prefix="dqar-peers-") as folder:
            self.folder = Path(folder)
            baseline = Entry(self.baseline)
            entries = [Entry(name) for name in names if name != self.baseline]
            try:
                self._start([baseline])
                for first in range(0, len(entries), self.group):
                    self._group(baseline, entries[first : first + self.group])
                if baseline.alive and not baseline.seconds:
                    self._rounds(baseline, [])
                self._finish([baseline])
                self._compare([baseline, *entries])
                return [baseline, *entries]
            finally:
                for entry in [baseline, *entries]:
                    if entry.process is not None:
                        entry.process.kill()

    def _group(self, baseline: Entry, entries: Sequence[Entry]) -> None:
        self._start(entries)
        self._rounds(baseline, entries)
        self._finish(entries)

    def _open(self, entry: Entry) -> Process:
        assert entry.cache is not None
        return Process({**self.settings, "contender": entry.name}, self.folder, entry.cache, self.patience)

    def _start(self, entries: Sequence[Entry]) -> None:
        """Their processes, built side by side; then the first generations, which compile, ``jobs`` at a time."""
        for entry in entries:
            entry.cache = Path(tempfile.mkdtemp(prefix="inductor-", dir=self.folder))
            if time.monotonic() > self.deadline:
                entry.failure = TOO_LATE
            else:
                entry.process = self._open(entry)
        for entry in entries:
            if entry.process is not None:
                with self._watch(entry):
                    entry.found.update(entry.process.answer())
        for first in range(0, len(entries), self.jobs):
            chunk = [e for e in entries[first : first + self.jobs] if e.alive and e.process is not None]
            if time.monotonic() > self.deadline:
                for entry in chunk:
                    entry.failure = TOO_LATE
                continue
            for entry in chunk:
                assert entry.process is not None
                entry.process.tell("generate")
            for entry in chunk:
                with self._watch(entry):
                    assert entry.process is not None
                    entry.first_s = float(entry.process.answer()["seconds"])
                    self.say(f"  {entry.name}: first generation {entry.first_s:.1f} s")

    def _rounds(self, baseline: Entry, entries: Sequence[Entry]) -> None:
        """One round to warm up, then the timed ones; each begins with another contender."""
        for number in range(self.rounds + 1):
            runners = [e for e in (baseline, *entries) if e.alive]
            seconds: dict[str, float] = {}
            for place in range(len(runners)):
                entry = runners[(place + number) % len(runners)]
                assert entry.process is not None
                with self._watch(entry):
                    found = entry.process.ask("generate")
                    seconds[entry.name] = found["seconds"]
                    if number:
                        entry.seconds.append(found["seconds"])
                        entry.steps.append(found["steps_ms"])
            if number and baseline.name in seconds:
                for entry in runners:
                    if entry.name in seconds:
                        entry.baseline.append(seconds[baseline.name])

    def _finish(self, entries: Sequence[Entry]) -> None:
        """What is no speed, the end of the processes, and the second ones."""
        for entry in entries:
            if entry.process is None:
                continue
            if entry.alive:
                with self._watch(entry):
                    entry.found.update(entry.process.ask("finish"))
                    entry.found["output"] = torch.load(entry.process.sample)
                    self.say(f"  {entry.name}: {common.median(entry.seconds):.2f} s a generation")
            entry.process.close()
            entry.process = None
        if self.second:
            self._again([entry for entry in entries if entry.alive and "@" in entry.name])
        for entry in entries:
            if entry.cache is not None:
                shutil.rmtree(entry.cache, ignore_errors=True)

    def _again(self, entries: Sequence[Entry]) -> None:
        """The first generation of second processes, which find what the first ones compiled."""
        opened = {entry.name: self._open(entry) for entry in entries}
        try:
            for process in opened.values():
                process.answer()
            for entry in entries:
                entry.second_first_s = float(opened[entry.name].ask("generate")["seconds"])
        except Failed as failure:
            self.say(f"  second process: {failure}")
        finally:
            for process in opened.values():
                process.close()

    @contextlib.contextmanager
    def _watch(self, entry: Entry) -> Iterator[None]:
        """Make a failure the entry's reason."""
        try:
            yield
        except Failed as failure:
            entry.failure = str(failure)
            self.say(f"  {entry.name}: {failure}")

    def _compare(self, entries: Sequence[Entry]) -> None:
        """Errors against the same without its cache, and agreement of equal plans."""
        outputs = {e.name: e.found["output"] for e in entries if "output" in e.found}
        for entry in entries:
            if entry.name not in outputs:
                continue
            own = outputs[entry.name]
            plain = next((name for name in contenders.references(entry.name) if name in outputs), None)
            if plain is not None:
                entry.found["reference"] = plain
                entry.found["rel_error"] = common.relative_error(own, outputs[plain])
                entry.found["psnr_db"] = psnr(own, outputs[plain])
            pab = outputs.get("pab")
            if pab is not None and contenders.split(entry.name)[0].follows_plan:
                entry.found["to_pab"] = common.relative_error(own, pab)
                entry.found["bitwise_pab"] = bool(torch.equal(own, pab))


def psnr(value: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB, the peak being the range of the reference; None where both are equal."""
    error = float((value.double() - reference.double()).square().mean())
    span = float(reference.max() - reference.min())
    return 10 * math.log10(span**2 / error) if error else None


def rows(entries: Sequence[Entry], settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One record for each contender."""
    for entry in entries:
        found = entry.found
        kind, _, way = entry.name.partition("@")
        row: dict[str, Any] = {
            "case": entry.name, "model": settings["model"], "title": found.get("title"), "cache": kind, "compiled": way,
            **{key: settings[key] for key in ("steps", "schedule", "dtype", "small")}, "runs": len(entry.seconds),
        }  # fmt: skip
        if entry.failure or not entry.seconds:
            yield {**row, "note": entry.failure or "not measured"}
            continue
        warm = common.median(entry.seconds)
        ratios = [base / own for own, base in zip(entry.seconds, entry.baseline, strict=False)]
        per_step = [common.median(times) for times in zip(*entry.steps, strict=True)]
        work = found["flop_steps"]
        computed = [ms for ms, flop in zip(per_step, work, strict=True) if flop == max(work)]
        reused = [ms for ms, flop in zip(per_step, work, strict=True) if flop < max(work)]
        speedup = common.median(ratios) if ratios else None
        compiled = bool(way)
        row |= {
            "cold_s": max(entry.first_s - warm, 0.0) if compiled and entry.first_s is not None else None,
            "second_s": max(entry.second_first_s - warm, 0.0) if entry.second_first_s is not None else None,
            "compute_ms": common.median(computed), "reuse_ms": common.median(reused) if reused else None,
            "generation_s": warm, "iqr_s": common.interquartile(entry.seconds), "speedup": speedup,
            "speedup_rounds": ratios,
            **{key: found.get(key) for key in (
                "captures", "breaks", "recompiles", "cache_mib", "peak_mib", "rel_error", "psnr_db", "reuse", "bound",
                "reference", "to_pab", "bitwise_pab", "note")},
            "host_ms": common.median(per_step) if found.get("host_bound") else found["host_ms"],
            "of_bound": speedup / found["bound"] if speedup is not None else None,
        }  # fmt: skip
        yield row
