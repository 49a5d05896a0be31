"""A plan: the frozen table of which attention sites reuse their stored output, at every sampling step.

A schedule is the rule, a plan is what the rule says for one number of steps and one number of sites. Nothing here
needs torch, so a plan can be made, read and drawn where there is no model.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dqar_fx.errors import PlanError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Plan"]

FORMAT = "dqar_fx.plan"
VERSION = 1
COMPUTE, STORE, REUSE = ".", "+", "#"  # in a file, where stores follow from the rest, only the first and the last

# Colours for compute, compute + store and reuse. Blue and orange are Okabe and Ito's, which the common kinds of colour
# blindness tell apart; their brightness, and that of the light grey, differ enough for a black and white print too.
COLOURS = ("#0072B2", "#E69F00", "#E6E6E6")
MAX_CELLS_WITH_LINES = 12_000  # beyond it, lines between the cells cover more than the cells do


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Which attention sites compute and which read their stored output, at every step of one generation.

    Args:
        reuse: bool ``[T, S]``, True where site ``s`` reuses at step ``t``; T steps and S sites, both at least 1.
            Row 0 is all False, since nothing is stored yet. Copied, and read-only from then on.
        schedule: the text of the schedule that made the plan, if known. For people; it has no effect, and plans of
            different origin with the same table are equal.
        calibration: what a plan from ``calibrate`` was made for, and the error that was predicted and verified for it.
            Saved with the plan; ``optimize`` warns where it is used for something else.

    A plan can be given wherever a schedule can: :meth:`plan` returns it, if it fits.

    Raises:
        PlanError: the table has another dtype or number of axes, is empty, or reuses at step 0.
    """

    reuse: npt.NDArray[np.bool_]
    schedule: str | None = None
    calibration: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            reuse = np.asarray(self.reuse).copy()  # np.array(copy=True) warns for a tensor of torch
        except ValueError as error:
            raise PlanError(
                f"Plan.reuse is not a table ({error}). Give every step the same number of sites."
            ) from error
        if reuse.dtype != np.bool_:
            raise PlanError(f"Plan.reuse has dtype {reuse.dtype}, not bool. Convert it with astype(bool).")
        if reuse.ndim != 2 or 0 in reuse.shape:
            raise PlanError(
                f"Plan.reuse has shape {reuse.shape}. It must be [steps, sites], with at least one of each."
            )
        if reuse[0].any():
            sites = np.flatnonzero(reuse[0]).tolist()
            raise PlanError(
                f"Plan.reuse[0] reuses at sites {sites}: step 0 has nothing stored yet. Set row 0 to False."
            )
        object.__setattr__(self, "reuse", _read_only(reuse))

    @property
    def num_steps(self) -> int:
        """T, the number of steps of a generation."""
        return int(self.reuse.shape[0])

    @property
    def num_sites(self) -> int:
        """S, the number of attention sites."""
        return int(self.reuse.shape[1])

    @property
    def reuse_ratio(self) -> float:
        """The share of all ``T * S`` attentions that are read instead of computed, in [0, 1)."""
        return float(self.reuse.mean())

    @cached_property
    def age(self) -> npt.NDArray[np.int64]:
        """Int64 ``[T, S]``, in steps: 0 where computed, else the step minus the step of the value that is read."""
        steps = np.arange(self.num_steps, dtype=np.int64)[:, None]
        return _read_only(steps - np.maximum.accumulate(np.where(self.reuse, 0, steps), axis=0))

    @cached_property
    def stores(self) -> npt.NDArray[np.bool_]:
        """Bool ``[T, S]``: True where the site computes and a later step reads that value before the next compute."""
        stores = np.zeros_like(self.reuse)
        # Whatever is read at all is read at the very next step: a site that computes there stores anew.
        stores[:-1] = ~self.reuse[:-1] & self.reuse[1:]
        return _read_only(stores)

    @cached_property
    def _first_reuse(self) -> int:
        """The first step at which any site reuses, or T."""
        steps = np.flatnonzero(self.reuse.any(axis=1))
        return int(steps[0]) if steps.size else self.num_steps

    def reason(self, step: int, site: int) -> str:
        """Why a site does what it does at a step, in one word.

        Returns:
            ``reuse``; or, for a site that computes: ``warmup`` (no site has reused up to and including this step),
            ``stale`` (it reused at the step before: a refresh) or ``schedule`` (any other decision of the rule).

        Raises:
            PlanError: there is no such step or site.
        """
        if not (0 <= step < self.num_steps and 0 <= site < self.num_sites):
            raise PlanError(
                f"Plan.reason({step}, {site}) is outside of the plan. "
                f"Steps go from 0 to {self.num_steps - 1}, sites from 0 to {self.num_sites - 1}."
            )
        if self.reuse[step, site]:
            return "reuse"
        if step < self._first_reuse:
            return "warmup"
        return "stale" if self.reuse[step - 1, site] else "schedule"

    def plan(self, num_sites: int, num_steps: int | None = None) -> Plan:
        """The plan itself, if it fits; so that a plan can stand where a schedule is expected.

        Raises:
            PlanError: the model has another number of sites, or the generation another number of steps.
        """
        steps = self.num_steps if num_steps is None else num_steps
        if (num_sites, steps) != (self.num_sites, self.num_steps):
            raise PlanError(
                f"The plan is for {self.num_sites} sites and {self.num_steps} steps, but the run has {num_sites} sites "
                f"and {steps} steps. A Plan is bound to its numbers: plan anew, or give a Schedule, which adapts."
            )
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON that people can read: one string per step, one character per site.

        The file appears whole or not at all: it is written beside its place and then moved there.

        Returns:
            The path of the file.
        """
        # realpath: moving onto a symbolic link would put a file in place of the link.
        target = Path(os.path.realpath(path))
        document = {
            "format": FORMAT,
            "version": VERSION,
            "schedule": self.schedule,
            "num_steps": self.num_steps,
            "num_sites": self.num_sites,
            "legend": {COMPUTE: "compute", REUSE: "reuse"},
            "reuse": ["".join(REUSE if reused else COMPUTE for reused in row) for row in self.reuse],
        }
        if self.calibration is not None:
            document["calibration"] = dict(self.calibration)
        # Not tempfile: its files are readable by their owner only, and would stay so after the move.
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return Path(path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PlanError: the file is not a plan, is damaged, or comes from a newer version; the message names the path.
            OSError: the file cannot be opened.
        """
        text = Path(path).read_bytes()
        try:
            return _from_document(json.loads(text))
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end, or a PlanError
            raise PlanError(f"{os.fspath(path)} is not a plan that can be read: {error}") from error

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        title: str | None = None,
        size: tuple[float, float] = (9.0, 5.0),
        dpi: float = 150.0,
    ) -> Path | Figure:
        """Draw the plan: steps to the right, sites upwards, one cell for each decision. Needs no display.

        Args:
            path: where to save the picture; its ending (``.png``, ``.svg``, ``.pdf``) decides the format.
            title: replaces the text of the schedule above the picture.
            size: width and height in inches.
            dpi: pixels per inch; a PNG has ``size * dpi`` pixels.

        Returns:
            The path if one was given, else the matplotlib figure.
        """
        # Only who draws pays for the import. Figure, not pyplot: no display, no global state, no figure left open.
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator

        T, S = self.reuse.shape
        figure = Figure(figsize=size, dpi=dpi, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        axes = figure.add_subplot()
        codes = np.where(self.reuse, 2, np.where(self.stores, 1, 0))
        lines = "white" if T * S <= MAX_CELLS_WITH_LINES else "face"
        corners = (np.arange(T + 1) - 0.5, np.arange(S + 1) - 0.5)  # so that a cell is centred on its numbers
        axes.pcolormesh(
            *corners, codes.T, cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=2.5, edgecolors=lines, linewidth=0.5
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 4, 5, 10], min_n_ticks=1))
        axes.set(xlim=(-0.5, T - 0.5), ylim=(-0.5, S - 0.5), xlabel="step", ylabel="site (attention, in model order)")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        names = ("compute", "compute and store", "reuse")
        shares = (np.mean(codes == code) for code in range(3))
        patches = [
            Patch(facecolor=colour, label=f"{name} {share:.1%}")
            for name, colour, share in zip(names, COLOURS, shares, strict=True)
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=3 if size[0] >= 6 else 1, frameon=False)
        heading = title if title is not None else self.schedule or "Plan"
        oldest = f", at most {self.age.max()} steps old" if self.reuse.any() else ""
        text = f"{heading}\n{self.reuse_ratio:.1%} of {T} x {S} attentions reused{oldest}"
        axes.set_title(text, loc="left", fontsize="medium")
        if path is None:
            return figure
        figure.savefig(path)
        return Path(path)

    def __str__(self) -> str:
        """A picture of text: a row for each run of sites that do the same, a character for each step."""
        codes = np.where(self.reuse, REUSE, np.where(self.stores, STORE, COMPUTE))
        rows = ["".join(codes[:, site]) for site in range(self.num_sites)]
        lines, first = [], 0
        for row, run in groupby(rows):
            last = first + len(list(run)) - 1
            lines.append((f"{first}" if first == last else f"{first}-{last}", row))
            first = last + 1
        width = max(len(label) for label, _ in lines)
        head = f"{self.num_steps} steps x {self.num_sites} sites, {self.reuse_ratio:.1%} reused"
        legend = f"{COMPUTE} compute  {STORE} compute and store  {REUSE} reuse"
        return "\n".join([head, *(f"{label:>{width}} {row}" for label, row in lines), legend])

    def __repr__(self) -> str:
        origin = "" if self.schedule is None else f", schedule={self.schedule!r}"
        return f"<Plan: {self.num_steps} steps, {self.num_sites} sites, {self.reuse_ratio:.1%} reused{origin}>"

    def __eq__(self, other: object) -> bool:
        return np.array_equal(self.reuse, other.reuse) if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.reuse.shape, self.reuse.tobytes()))

    def __reduce__(self) -> tuple[Callable[..., Plan], tuple[Any, ...]]:
        # numpy's own copies and pickles are writable again; through the constructor they are not.
        return Plan, (self.reuse, self.schedule, self.calibration)


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array


def _from_document(document: Any) -> Plan:
    """The plan in a decoded file. Trusts nothing: people edit these files, and copies of them get cut short."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlanError(f'it has no "format": "{FORMAT}". Write plans with Plan.save.')
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise PlanError(f'"version" is {version!r}, not a positive whole number.')
    if version > VERSION:
        raise PlanError(f"it has version {version}, and this dqar_fx reads up to {VERSION}. Update dqar_fx.")
    schedule = document.get("schedule")
    if schedule is not None and not isinstance(schedule, str):
        raise PlanError(f'"schedule" is {schedule!r}, neither text nor null.')
    rows = document.get("reuse")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, str) for row in rows):
        raise PlanError(f'"reuse" must be a list with one string of "{COMPUTE}" and "{REUSE}" for each step.')
    for step, row in enumerate(rows):
        if strange := set(row) - {COMPUTE, REUSE}:
            raise PlanError(f'"reuse"[{step}] holds {sorted(strange)}; only "{COMPUTE}" and "{REUSE}" have a meaning.')
        if len(row) != len(rows[0]):
            raise PlanError(f'"reuse"[{step}] has {len(row)} sites, but "reuse"[0] has {len(rows[0])}.')
    for key, found in (("num_steps", len(rows)), ("num_sites", len(rows[0]))):
        if document.get(key) != found:
            raise PlanError(f'"{key}" is {document.get(key)!r}, but "reuse" has {found}. Correct one of them.')
    calibration = document.get("calibration")
    if calibration is not None and not isinstance(calibration, dict):
        raise PlanError(f'"calibration" is {calibration!r}, neither an object nor null.')
    return Plan(
        np.array([[character == REUSE for character in row] for row in rows], dtype=bool), schedule, calibration
    )
