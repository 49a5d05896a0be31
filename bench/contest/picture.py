"""The picture of a comparison: how long a generation takes, and what error that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Inches of one bar, and of everything else in a panel.
BAR, REST = 0.27, 1.15
OURS, PEERS, PLAIN = "#1f6f8b", "#c9803c", "#9a9a9a"


def colour(row: dict[str, Any]) -> str:
    """Ours, a peer, or no cache."""
    name = row["cache"]
    return PLAIN if name in ("none", "dqar-none") else OURS if name.startswith("dqar") else PEERS


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each model: time of a generation over the compiled baseline's, and relative error beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch
    from matplotlib.ticker import NullFormatter

    models: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("speedup"):
            models.setdefault(row["model"], []).append(row)
    if not models:
        return
    heights = [BAR * len(mine) + REST for mine in models.values()]
    figure, axes = plt.subplots(
        len(models), 2, figsize=(10, sum(heights) + 0.4), squeeze=False, sharey="row",
        gridspec_kw={"width_ratios": (3, 2), "height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for (times, errors), (model, mine) in zip(axes, models.items(), strict=True):
        mine = sorted(mine, key=lambda row: -row["speedup"])
        places = range(len(mine))
        relative = [1 / row["speedup"] for row in mine]
        times.barh(places, relative, color=[colour(row) for row in mine], height=0.72)
        times.axvline(1, color="black", linewidth=0.8)
        for place, row, length in zip(places, mine, relative, strict=True):
            bound = 1 / row["bound"]
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.2}
            beside = max(length, bound if bound < 1 else 0)  # or the mark of the bound would strike it through
            times.annotate(
                f"{length:.2f}", (beside, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
                bbox=paper,
            )  # fmt: skip
            if bound < 1:
                times.plot([bound, bound], [place - 0.36, place + 0.36], color="black", linewidth=1.6)
        times.set_yticks(list(places), [row["case"] for row in mine], fontsize=8)
        times.set_xlim(0, max([1, *relative]) * 1.12)
        times.invert_yaxis()
        times.set_title(f"{model}: {mine[0]['title']}, {mine[0]['steps']} steps", fontsize=9, loc="left")
        times.set_xlabel("time of a generation / that of the baseline", fontsize=8)
        shown = [(place, row["rel_error"]) for place, row in enumerate(mine) if row.get("rel_error")]
        if shown:
            errors.scatter(
                [error for _, error in shown], [place for place, _ in shown], s=22, zorder=2,
                color=[colour(mine[place]) for place, _ in shown],
            )  # fmt: skip
            errors.set_xscale("log")
            decades = [math.log10(error) for _, error in shown]
            errors.set_xlim(10 ** math.floor(min(decades)), 10 ** (math.floor(max(decades)) + 1))
            errors.xaxis.set_minor_formatter(NullFormatter())
        errors.grid(linewidth=0.4, alpha=0.6)
        errors.set_xlabel("relative error to the same without a cache (no dot: equal)", fontsize=8)
        for axis in (times, errors):
            axis.tick_params(axis="x", labelsize=8)
            axis.tick_params(axis="y", length=0)
            axis.spines[["top", "right"]].set_visible(False)
    kinds = {"dqar_fx": OURS, "others": PEERS, "no cache": PLAIN}
    keys = [Patch(color=paint, label=label) for label, paint in kinds.items()]
    keys.append(plt.Line2D([], [], color="black", linewidth=1.6, label="bound by FLOP"))
    figure.legend(handles=keys, loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
