"""Traces: what single reuses do to a model's samples, measured, for a policy to learn from (DQAR, R40).

A generation is drawn once with nothing reused; every reuse that the schedule would allow is then a *candidate*: its
features are noted as a policy would be told of them, at the time and with the delay of a real decision. The same
generation, from the same noise, is drawn again for each candidate that is to be measured, with that one reuse and
everything else computed. Two harms come of it:

* ``site_error``: how far the value that would have been read is from the one computed, relative to its size. One run
  tells it for all candidates of age 1. (Not known at the last steps, where nothing computes any more to be compared.)
* ``final_error``: ``|sample with - sample without| / |sample without|`` of the finished sample, "without" being the run
  that differs in nothing but this read. Costs one generation each.

Of age ``k > 1``: the site has read ``k - 1`` times before, and "without" is the run with these.

A file of traces is JSON lines: a header with the settings, then one line for each candidate. It is only ever appended
to, so a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dqar_fx.config import CacheConfig
from dqar_fx.errors import PolicyError
from dqar_fx.gates import Gates
from dqar_fx.optimize import optimize, restore, runtime
from dqar_fx.plan import Plan
from dqar_fx.policy import ALL_FEATURES, Array
from dqar_fx.schedule import Schedule

__all__ = ["Trace", "TraceFile", "Tracer", "Traces", "load"]

FORMAT = "dqar_fx.traces"
VERSION = 1
#: Of a header, what all files that are learned from together must agree in.
_SHARED = ("model", "features", "cache")
_STEP, _SITE = ALL_FEATURES.index("step"), ALL_FEATURES.index("site")


@dataclass(frozen=True, slots=True)
class Trace:
    """One candidate: a read of ``site`` at ``step``, in the generation of ``seed``.

    Attributes:
        seed: of the generation's noise.
        step: of the read, counted from 0.
        site: its number.
        age: of the value that is read, in steps.
        features: all of ``ALL_FEATURES``, in order; NaN where one is not known.
        site_error: relative error of the value, NaN where it was not measured.
        final_error: relative error of the final sample that this read adds, NaN where it was not measured.
    """

    seed: int
    step: int
    site: int
    age: int
    features: tuple[float, ...]
    site_error: float = math.nan
    final_error: float = math.nan


@dataclass(slots=True)
class Recorder:
    """Stands where a policy would: lets only those reads pass that it was told of, and notes what it was asked.

    Attributes:
        allowed: ``(step, site)`` of the reads that are let pass.
        seen: the features of every read that it was asked about, by ``(step, site)``; of several branches, the first.
    """

    allowed: frozenset[tuple[int, int]] = frozenset()
    seen: dict[tuple[int, int], tuple[float, ...]] = field(default_factory=dict)
    features: tuple[str, ...] = ALL_FEATURES
    min_probability: float = 0.5

    def probabilities(self, rows: Array) -> Array:
        """1 for what is allowed, else 0."""
        found = []
        for row in rows:
            place = int(row[_STEP]), int(row[_SITE])
            self.seen.setdefault(place, tuple(row.tolist()))
            found.append(float(place in self.allowed))
        return np.array(found)


class Tracer:
    """A model that is drawn with, again and again, to measure candidates. Use it in a ``with`` statement.

    Args:
        model: what is called at every step. Optimised while the tracer is open.
        draw: makes one generation from a seed, all of it, always from the same noise; the final sample.
        schedule: which reads are candidates: what it reuses.
        scheduler: of the model.
        cache: how stored values look.
        max_age: largest age of a candidate. Each age costs another generation for every candidate of age 1.
        backend: of ``optimize``.

    Raises:
        PolicyError: ``max_age`` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Callable[[int], Tensor],
        schedule: Schedule | Plan,
        *,
        scheduler: Any,
        cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen, so one default serves all calls
        max_age: int = 1,
        backend: str = "inductor",
    ) -> None:
        if max_age < 1:
            raise PolicyError(f"max_age is {max_age}: the age of what is read is at least 1 step.")
        self._model, self._draw, self._max_age = model, draw, max_age
        self._recorder = Recorder()
        self._settings: dict[str, Any] = {"scheduler": scheduler, "cache": cache, "backend": backend}
        self._schedule = schedule

    def __enter__(self) -> Tracer:
        gates = Gates(entropy=None, snr=None, policy=self._recorder)
        optimize(self._model, self._schedule, gates=gates, **self._settings)
        return self

    def __exit__(self, *_: object) -> None:
        restore(self._model)

    def candidates(self, seed: int) -> tuple[list[Trace], Tensor]:
        """All candidates of age 1 of one generation, their final error not measured; and its sample.

        Raises:
            PolicyError: the schedule reuses nothing, or the model's attentions are out of the gates' reach.
        """
        sample, seen, changes = self._run(seed, frozenset())
        traces = [
            Trace(seed, step, site, 1, features, changes.get((step, site), math.nan))
            for (step, site), features in sorted(seen.items())
        ]
        if not traces:
            raise PolicyError(
                f"the schedule {self._schedule} never reuses in this run, so there is nothing to trace. Use always or "
                f"interval."
            )
        return traces, sample

    def measure(self, trace: Trace, reference: Tensor) -> Iterator[Trace]:
        """The candidate of age 1, and its successors up to ``max_age`` or the schedule's next compute, measured.

        Args:
            trace: of ``candidates``.
            reference: the sample without any reuse.
        """
        site, before, error = trace.site, reference, trace.site_error
        reads: frozenset[tuple[int, int]] = frozenset()
        for age in range(1, self._max_age + 1):
            place = trace.step + age - 1, site
            reads |= {place}
            sample, seen, changes = self._run(trace.seed, reads)
            if age > 1 and (place not in seen or seen[place][ALL_FEATURES.index("age")] != age):
                return  # the schedule computes here
            yield Trace(trace.seed, *place, age, seen[place], error, _relative(sample, before))
            before, error = sample, changes.get((place[0] + 1, site), math.nan)

    def _run(
        self, seed: int, reads: frozenset[tuple[int, int]]
    ) -> tuple[Tensor, dict[tuple[int, int], tuple[float, ...]], dict[tuple[int, int], float]]:
        """One generation: its sample, what the recorder was asked, and how far results were from what was stored."""
        self._recorder.allowed, self._recorder.seen = reads, {}
        sample = self._draw(seed).detach().cpu()
        stats = runtime(self._model).stats
        # What is exact whatever the step is read anyway, and asks nobody.
        exact = {site.index for site in runtime(self._model).sites if site.lossless}
        seen = {place: row for place, row in self._recorder.seen.items() if place[1] not in exact}
        changes: dict[tuple[int, int], float] = {}
        for m in stats.measurements:
            if not math.isnan(m.change):  # of several branches, the one that is hit hardest
                changes[m.step, m.site] = max(m.change, changes.get((m.step, m.site), 0.0))
        return sample, seen, changes


def _relative(value: Tensor, reference: Tensor) -> float:
    """``|value - reference| / |reference|``, L2 in float64."""
    difference = torch.linalg.vector_norm(value.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()).clamp(min=1e-30))


@dataclass(frozen=True, eq=False)
class Traces:
    """Many candidates, as arrays of one entry each.

    Attributes:
        features: float64 ``[n, len(ALL_FEATURES)]``.
        site_error: float64 ``[n]``, NaN where not measured.
        final_error: float64 ``[n]``, NaN where not measured.
        generation: int64 ``[n]``: candidates of one generation have the same number. Those of one seed are one.
        header: what they were recorded with.
    """

    features: Array
    site_error: Array
    final_error: Array
    generation: npt.NDArray[np.int64]
    header: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.generation)

    @staticmethod
    def of(traces: Iterable[Trace], header: dict[str, Any] | None = None) -> Traces:
        """From single ones."""
        rows = list(traces)
        return Traces(
            np.array([row.features for row in rows], dtype=np.float64).reshape(len(rows), len(ALL_FEATURES)),
            np.array([row.site_error for row in rows], dtype=np.float64),
            np.array([row.final_error for row in rows], dtype=np.float64),
            np.array([row.seed for row in rows], dtype=np.int64),
            header or {},
        )

    def column(self, name: str) -> Array:
        """One feature, ``[n]``."""
        return self.features[:, ALL_FEATURES.index(name)]


class TraceFile:
    """A file that is appended to.

    Args:
        path: of the file; begun if it is not there.
        settings: what the traces are recorded with; a file that was begun with others is refused.

    Raises:
        PolicyError: the file is no file of traces, or was begun with other settings.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.path = Path(path)
        header = {"format": FORMAT, "version": VERSION, "features": list(ALL_FEATURES), **settings}
        #: What is in it: ``(seed, step, site, age)`` -> the candidate, as it was last written.
        self.known: dict[tuple[int, int, int, int], Trace] = {}
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return
        text = self.path.read_text(encoding="utf-8")
        if not text.endswith("\n"):  # it was interrupted while it wrote a line
            text = text[: text.rfind("\n") + 1]
            self.path.write_text(text, encoding="utf-8")
        found, traces = _parse(text, self.path)
        different = sorted(key for key in header.keys() | found.keys() if header.get(key) != found.get(key))
        if different:
            raise PolicyError(
                f"{self.path} was begun with other settings ({', '.join(different)}: "
                f"{', '.join(repr(found.get(key)) for key in different)}). Give another --output, or the same settings."
            )
        self.known = {(t.seed, t.step, t.site, t.age): t for t in traces}

    def append(self, traces: Iterable[Trace]) -> None:
        """Write them behind the others; one that is there already counts as it was last written."""
        traces = list(traces)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(_line(trace) for trace in traces)
        self.known.update({(t.seed, t.step, t.site, t.age): t for t in traces})


def load(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Traces:
    """Read files of traces; of a candidate that comes several times, the last counts.

    Raises:
        PolicyError: a file is malformed (the message names the line), or files do not belong together.
        OSError: a file cannot be opened.
    """
    names = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    if not names:
        raise PolicyError("load() was given no file of traces. dqar-fx trace writes one.")
    known: dict[tuple[int, int, int, int], Trace] = {}
    headers = []
    for path in names:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise PolicyError(f"{path} cannot be read ({error.strerror}). dqar-fx trace writes such files.") from error
        header, traces = _parse(text, path)
        headers.append(header)
        known.update({(t.seed, t.step, t.site, t.age): t for t in traces})
        for key in _SHARED:
            if header.get(key) != headers[0].get(key):
                raise PolicyError(
                    f"{path} and {names[0]} do not belong together: their {key} is {header.get(key)!r} and "
                    f"{headers[0].get(key)!r}. Train on traces of one model and one way to store."
                )
    return Traces.of(known.values(), headers[0])


def _line(trace: Trace) -> str:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no NaN

    record = {
        "seed": trace.seed, "step": trace.step, "site": trace.site, "age": trace.age,
        "features": [number(value) for value in trace.features],
        "site_error": number(trace.site_error), "final_error": number(trace.final_error),
    }  # fmt: skip
    return json.dumps(record) + "\n"


def _parse(text: str, path: Path) -> tuple[dict[str, Any], list[Trace]]:
    """Header and candidates. Trusts nothing."""
    first, *lines = text.splitlines() or [""]
    try:
        header = json.loads(first)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise PolicyError(f"{path} is not a file of traces: its first line is no header. dqar-fx trace writes one.")
    if header.get("version") != VERSION or header.get("features") != list(ALL_FEATURES):
        raise PolicyError(f"{path} was written by another version of dqar_fx. Trace anew.")
    return header, [_read(line, f"{path}, line {number}") for number, line in enumerate(lines, 2)]


def _read(line: str, where: str) -> Trace:
    try:
        return _trace(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PolicyError(f"{where} is no trace ({error!r}). Remove it, or trace anew.") from error


def _trace(record: Any) -> Trace:
    def number(value: Any) -> float:
        return math.nan if value is None else float(value)

    features = tuple(number(value) for value in record["features"])
    if len(features) != len(ALL_FEATURES):
        raise ValueError(f"{len(features)} features")
    seed, step, site, age = (int(record[key]) for key in ("seed", "step", "site", "age"))
    return Trace(seed, step, site, age, features, number(record["site_error"]), number(record["final_error"]))
