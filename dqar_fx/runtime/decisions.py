"""What the sites of one generation did and why, as records and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dqar_fx.errors import RuntimeStateError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Reasons in the order in which they are asked, with a colour each. Okabe and Ito's colours and greys: the common kinds
#: of colour blindness tell them apart.
COLOURS = {
    "reuse": "#E6E6E6",
    "warmup": "#0072B2",
    "schedule": "#56B4E9",
    "empty": "#000000",
    "new-generation": "#4D4D4D",
    "shape": "#7F7F7F",
    "stale": "#009E73",
    "budget": "#F0E442",
    "snr": "#CC79A7",
    "entropy": "#E69F00",
    "change": "#D55E00",
    "policy": "#8C564B",
    "shared": "#C5E0B4",
}


class Decision(NamedTuple):
    """What one site did in one call, and why."""

    step: int
    branch: str
    site: int
    action: str
    reason: str


class Measured(NamedTuple):
    """What one site measured in one call, for the gates that asked.

    ``entropy`` is in nats a row (or as ``EntropyGate.normalize`` says), ``change`` and ``difference`` (from another
    branch of guidance) relative; NaN where not asked for.
    """

    step: int
    branch: str
    site: int
    entropy: float
    change: float
    difference: float = math.nan


def plot(
    decisions: Sequence[Decision],
    path: str | Path | None = None,
    *,
    title: str = "",
    size: tuple[float, float] = (9.0, 5.0),
) -> Path | Figure:
    """Draw decisions: steps to the right, sites upwards, coloured by reason; one panel for each branch.

    Args:
        decisions: of one generation.
        path: where to save the picture; its ending decides the format. None gives back the figure.
        title: above the picture.
        size: width and height in inches.

    Raises:
        RuntimeStateError: there are none.
    """
    # Only who draws pays for the import. Figure, not pyplot: no display, no global state, no figure left open.
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    decisions = [d for d in decisions if d.step >= 0]
    if not decisions:
        raise RuntimeStateError("there is nothing to draw: no step has run. Call the model first.")
    branches = sorted({d.branch for d in decisions})
    first = min(d.step for d in decisions)
    steps, sites = max(d.step for d in decisions) - first + 1, max(d.site for d in decisions) + 1
    names = list(COLOURS)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    panels = figure.subplots(1, len(branches), sharey=True, squeeze=False)[0]
    for axes, branch in zip(panels, branches, strict=True):
        table = np.full((sites, steps), np.nan)
        for d in decisions:
            if d.branch == branch:
                table[d.site, d.step - first] = names.index(d.reason)
        corners = (np.arange(steps + 1) + first - 0.5, np.arange(sites + 1) - 0.5)
        axes.pcolormesh(
            *corners, table, cmap=ListedColormap([COLOURS[name] for name in names]), vmin=-0.5, vmax=len(names) - 0.5,
            edgecolors="white" if steps * sites <= 12_000 else "face", linewidth=0.5,
        )  # fmt: skip
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        axes.set(xlabel="step", title=branch)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    panels[0].set_ylabel("site (attention, in model order)")
    counts = {name: sum(d.reason == name for d in decisions) for name in names}
    patches = [
        Patch(facecolor=COLOURS[name], label=f"{name} {count / len(decisions):.1%}")
        for name, count in counts.items()
        if count
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 5), frameon=False)
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize="medium")
    if path is None:
        return figure
    figure.savefig(path, dpi=150)
    return Path(path)
