"""What ``tune`` found: as a table, as numbers, and as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dqar_fx.errors import TuningError
from dqar_fx.tuning.choice import SiteChoice
from dqar_fx.tuning.timing import Estimate

FORMAT, VERSION = "dqar_fx.tuning", 1
MIB = 2**20
#: Kinds of steps that are timed besides those of the schedule.
EAGER, COMPILED, NOTHING, READING = STEPS = ("eager", "torch.compile", "nothing reused", "all reused")


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCost:
    """What one site costs, in milliseconds, each a median over the rounds.

    Attributes:
        index, path, kind: of the site.
        compute_ms, read_ms: of the compiled pieces that are others when the site is read and everything else is read.
        store_ms: what storing adds to computing.
        reads, stores: how often a generation does either, by the schedule.
        saved_ms: in a generation: ``reads * (compute_ms - read_ms) - stores * store_ms``, with its notch.
    """

    index: int
    path: str
    kind: str
    compute_ms: float
    read_ms: float
    store_ms: float
    reads: int
    stores: int
    saved_ms: Estimate

    @property
    def pays(self) -> bool:
        """False if reuse costs more than it saves, and that is no noise: the whole notch of ``saved_ms`` is a loss."""
        return self.saved_ms.high >= 0

    @property
    def reason(self) -> str:
        """Why it does not pay; "" if it does."""
        if self.pays:
            return ""
        stored = f", {self.store_ms:.3g} ms to store" if self.stores and self.store_ms > 0 else ""
        return f"reuse does not pay here ({self.compute_ms:.3g} ms to compute, {self.read_ms:.3g} ms to read{stored})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What reuse saves in one model on one device, as measured; ``str`` gives tables.

    Attributes:
        model: its class.
        schedule, cache: what it was measured with.
        num_steps: of a generation.
        rounds: how often each thing was timed.
        device, torch_version: what it was measured on.
        costs: of each site; empty where sites were not measured.
        sites: which of them may reuse: give it to ``optimize(..., sites=tuning.sites)``.
        step_ms: milliseconds of a whole call of the model, by its kind: ``"torch.compile"``, ``"nothing reused"``,
            ``"all reused"`` (all that are kept), and perhaps ``"eager"``.
        schedule_ms: of a step of the schedule with the sites that are kept, on average over a generation.
        against: what ``speedup`` compares with, one of the kinds above.
        speedup: of a whole generation: the measured times of its different steps, each as often as it occurs.
        reuse_ratio: the share of all attentions that are read, with the sites that are kept.
        cache_bytes: what these store.
        rounding_error: relative L2 difference of the model's output when these are read that were stored by the very
            same call: what the cache by itself loses. (What reuse over steps loses, depends on the schedule.)
    """

    model: str
    schedule: str
    cache: str
    num_steps: int
    rounds: int
    device: str
    torch_version: str
    costs: tuple[SiteCost, ...]
    sites: SiteChoice
    step_ms: Mapping[str, Estimate]
    schedule_ms: Estimate
    against: str
    speedup: Estimate
    reuse_ratio: float
    cache_bytes: int
    rounding_error: float

    @property
    def pays(self) -> bool:
        """True if any site is kept."""
        return bool(self.sites.kept)

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts."""
        found = asdict(self)
        found["costs"] = [{**asdict(cost), "pays": cost.pays} for cost in self.costs]
        found["sites"] = {
            "num_sites": self.sites.num_sites,
            "kept": list(self.sites.kept),
            "left": {str(site): why for site, why in self.sites.left.items()},
        }
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON; returns the path."""
        document = {"format": FORMAT, "version": VERSION, **self.to_dict()}
        Path(path).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return Path(path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Tuning:
        """Read what ``save`` wrote.

        Raises:
            TuningError: it is not a tuning, is damaged, or comes from a newer version; the message names the path.
            OSError: the file cannot be opened.
        """
        text = Path(path).read_bytes()
        try:
            found = json.loads(text)
            if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
                raise TuningError(f'it has no "format": "{FORMAT}". Write tunings with Tuning.save.')
            if (version := found.pop("version", None)) != VERSION:
                raise TuningError(f"it has version {version}, and this dqar_fx reads version {VERSION}. Tune anew.")
            left = {int(site): str(why) for site, why in found["sites"]["left"].items()}
            costs = [{key: value for key, value in cost.items() if key != "pays"} for cost in found["costs"]]
            return Tuning(
                **{
                    **found,
                    "costs": tuple(SiteCost(**{**cost, "saved_ms": Estimate(**cost["saved_ms"])}) for cost in costs),
                    "sites": SiteChoice(found["sites"]["num_sites"], left),
                    "step_ms": {kind: Estimate(**ms) for kind, ms in found["step_ms"].items()},
                    "schedule_ms": Estimate(**found["schedule_ms"]),
                    "speedup": Estimate(**found["speedup"]),
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TuningError(f"{os.fspath(path)} is not a tuning that can be read: {error}") from error

    def __str__(self) -> str:
        head = (
            f"{self.model} on {self.device}, torch {self.torch_version}: {self.schedule}, {self.num_steps} steps, "
            f"cache {self.cache}; medians of {self.rounds} rounds"
        )
        lines = [head]
        if self.costs:
            rows = [
                [c.index, c.path, c.kind, f"{c.compute_ms:.4g}", f"{c.read_ms:.4g}", f"{c.store_ms:.3g}", c.reads,
                 f"{c.saved_ms.median:.4g}", f"{c.saved_ms.low:.4g} to {c.saved_ms.high:.4g}",
                 "yes" if self.sites.left.get(c.index) is None else "no"]
                for c in self.costs
            ]  # fmt: skip
            headers = [
                "site",
                "path",
                "kind",
                "compute ms",
                "read ms",
                "+ store ms",
                "reads",
                "saved ms",
                "notch",
                "kept",
            ]
            lines += ["", tabulate(rows, headers=headers, disable_numparse=True)]
        base = self.step_ms[self.against].median
        rows = [
            [kind, f"{ms.median:.4g}", f"{ms.low:.4g} to {ms.high:.4g}", f"{base / ms.median:.3f}x"]
            for kind, ms in self.step_ms.items()
        ]
        own, gain = self.schedule_ms, self.speedup
        rows.append(["the schedule", f"{own.median:.4g}", f"{own.low:.4g} to {own.high:.4g}", f"{gain.median:.3f}x"])
        lines += ["", tabulate(rows, headers=["step", "ms", "notch", "speed-up"], disable_numparse=True)]
        reused = (
            f"{len(self.sites.kept)} of {self.sites.num_sites} sites reuse: {self.reuse_ratio:.1%} of all attentions, "
            f"cache {self.cache_bytes / MIB:.2f} MiB, whose rounding changes the output by {self.rounding_error:.2g}"
        )
        whole = (
            f"a generation of {self.num_steps} steps: {gain.median:.3f}x as fast as {self.against} "
            f"({gain.low:.3f} to {gain.high:.3f})"
        )
        return "\n".join([*lines, "", reused, whole])
