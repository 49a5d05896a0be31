"""The pictures of a sweep's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqar_fx.cli.sweep_rows import IMAGES, Row, image_file, name_of, number, on_the_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, told apart by all eyes.
COLOURS = {"linear": "#D55E00", "interval": "#0072B2", "taper": "#009E73", "exponential": "#CC79A7"}
OTHER, DARK = "#999999", "#222222"
#: Rows of images in the grid, the baseline's among them.
SHOWN = 7


def _new(columns: int = 1, *, height: float = 4.6) -> tuple[Figure, list[Axes]]:
    # Figure, not pyplot: no display, no global state, no figure left open.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(5.2 * columns + 3.2 * (columns == 1), height), dpi=140, layout=ConstrainedLayoutEngine())
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def pareto(rows: Sequence[Row]) -> Figure | None:
    """PSNR over the speed-up, counted in FLOP and measured."""
    known = [(row, psnr) for row in rows if (psnr := number(row, "psnr_db")) is not None]
    if not known:
        return None
    figure, panels = _new(2)
    front = on_the_front(rows)
    titles = (("flop_speedup", "speed-up, counted in FLOP"), ("measured_speedup", "speed-up, measured"))
    for axes, (key, title) in zip(panels, titles, strict=True):
        for rule in dict.fromkeys(row["rule"] for row, _ in known):
            for default, marker in ((True, "o"), (False, "x")):
                mine = [(row[key], psnr) for row, psnr in known if row["rule"] == rule and _is_default(row) is default]
                if mine:
                    label = rule if default else f"{rule}, other cache or gates"
                    axes.plot(
                        *zip(*mine, strict=True), marker, color=COLOURS.get(rule, OTHER), label=label, markersize=5,
                        alpha=0.8, linestyle="none",
                    )  # fmt: skip
        axes.set(xlabel=title)
        axes.grid(alpha=0.25)
    line = sorted((row["flop_speedup"], psnr) for row, psnr in known if row["key"] in front)
    panels[0].plot(*zip(*line, strict=True), "-", color=DARK, linewidth=0.9, zorder=0)
    panels[0].set(ylabel="PSNR to the images without reuse, dB")
    panels[1].axvline(1, color=DARK, linewidth=0.8, linestyle=":", zorder=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _is_default(row: Row) -> bool:
    return bool(row["cache"] == "int8:token" and row["gates"] == "none")


def heat(rows: Sequence[Row]) -> Figure | None:
    """Of DQAR's linear schedule: the Fréchet distance and the speed-up by warm-up and fraction."""
    import numpy as np

    table = {
        (row["warmup"], row["fraction"]): row
        for row in rows
        if row["rule"] == "linear" and row["refresh"] is None and not row["deep_first"] and _is_default(row)
    }
    warmups, fractions = (sorted({key[i] for key in table}) for i in range(2))
    if len(warmups) < 2 or len(fractions) < 2:
        return None
    figure, panels = _new(2, height=4.2)
    shown = (("FD to baseline", ("frechet", "to_baseline"), ".2f"), ("speed-up in FLOP", ("flop_speedup",), ".2f"))
    for axes, (title, path, form) in zip(panels, shown, strict=True):
        values = np.array(
            [[_or_nan(number(table[w, f], *path)) if (w, f) in table else np.nan for f in fractions] for w in warmups]
        )
        axes.imshow(values, cmap="viridis_r" if path[0] == "frechet" else "viridis", aspect="auto", origin="lower")
        for y, x in np.ndindex(values.shape):
            if np.isfinite(values[y, x]):
                axes.text(
                    x, y, format(values[y, x], form), ha="center", va="center", fontsize=9,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
                )  # fmt: skip
        axes.set_xticks(range(len(fractions)), [f"{f:g}" for f in fractions])
        axes.set_yticks(range(len(warmups)), [f"{w:g}" for w in warmups])
        axes.set(xlabel="fraction of the layers", ylabel="warm-up", title=title)
    return figure


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def steps(rows: Sequence[Row]) -> Figure | None:
    """The share of the attentions that is read at each step, of the best."""
    import numpy as np

    best = _best(rows)
    if not best:
        return None
    figure, (axes,) = _new(height=1.2 + 0.26 * len(best))
    table = np.array([row["reuse_by_step"] for row in best])
    axes.imshow(table, aspect="auto", cmap="Greys", vmin=0, vmax=1.25, interpolation="nearest")
    axes.set_yticks(range(len(best)), [name_of(row, short=True) for row in best], fontsize=8)
    axes.set(xlabel="step")
    axes.spines[:].set_visible(False)
    return figure


def bars(rows: Sequence[Row]) -> Figure | None:
    """The speed-up of the best: counted in FLOP, and measured."""
    best = _best(rows)
    if not best:
        return None
    figure, (axes,) = _new(height=1.4 + 0.3 * len(best))
    places = range(len(best))
    axes.barh(places, [row["flop_speedup"] for row in best], color="#dddddd", label="counted in FLOP")
    measured = [row["measured_speedup"] for row in best]
    spread = [row.get("measured_speedups") or [row["measured_speedup"]] for row in best]
    around = [
        [middle - min(middle, *each) for middle, each in zip(measured, spread, strict=True)],
        [max(middle, *each) - middle for middle, each in zip(measured, spread, strict=True)],
    ]
    axes.barh(
        places, measured, height=0.4, color="#0072B2", label="measured (line: single runs)", xerr=around,
        error_kw={"ecolor": DARK, "capsize": 2},
    )  # fmt: skip
    axes.axvline(1, color=DARK, linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [name_of(row, short=True) for row in best], fontsize=8)
    axes.set(xlabel="times as fast as the baseline", xlim=(0, None))
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def _best(rows: Sequence[Row]) -> list[Row]:
    """The rows on the front, from little to much saved."""
    front = on_the_front(rows)
    return sorted((row for row in rows if row["key"] in front), key=lambda row: row["flop_speedup"])


def grid(rows: Sequence[Row], folder: Path) -> Figure | None:
    """The same seed with the baseline, with some of the best, and with DQAR's schedule."""
    import numpy as np
    from PIL import Image

    best = [row for row in _best(rows) if image_file(folder, row["key"]).exists()]
    published = [row for row in rows if row["schedule"].startswith("linear:") and row["refresh"] is None]
    published = [row for row in published if _is_default(row) and image_file(folder, row["key"]).exists()]
    places = sorted({round(i * (len(best) - 1) / (SHOWN - 3)) for i in range(SHOWN - 2)}) if best else []
    chosen = [best[i] for i in places]
    chosen += sorted(published, key=lambda row: row["flop_speedup"])[-1:]
    baseline = folder / IMAGES / "baseline.png"
    if not chosen or not baseline.exists():
        return None
    lines: list[tuple[str, Path]] = [("nothing reused", baseline)]
    for row in {row["key"]: row for row in chosen}.values():
        psnr = number(row, "psnr_db")
        loss = "identical" if psnr is None else f"{psnr:.1f} dB"
        text = f"{name_of(row, short=True)}\n{number(row, 'reuse_ratio'):.0%} reused, {loss}"
        lines.append((text, image_file(folder, row["key"])))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 0.9 * len(lines) + 0.1), dpi=140)
    for i, (text, path) in enumerate(lines):
        with Image.open(path) as image:
            pixels = np.asarray(image)
        height = 1 / len(lines)
        axes = figure.add_axes((0.27, 1 - (i + 1) * height + 0.04 * height, 0.72, 0.92 * height))
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="bicubic" if pixels.ndim == 2 else "nearest")
        axes.set_anchor("W")
        axes.set_axis_off()
        figure.text(0.26, 1 - (i + 0.5) * height, text, ha="right", va="center", fontsize=8, color=DARK)
    return figure


def attention(measured: Mapping[str, Any]) -> Figure | None:
    """Entropy, and how far a result is from that of the step before, by step and site."""
    import numpy as np

    figure, panels = _new(2, height=3.8)
    shown = (("entropy", "entropy, nats", "viridis"), ("change", "change from the step before", "magma"))
    for axes, (key, title, colours) in zip(panels, shown, strict=True):
        table = np.array([[_or_nan(v) for v in row] for row in measured[key]], dtype=float).T
        image = axes.imshow(table, aspect="auto", cmap=colours, origin="lower", interpolation="nearest")
        axes.set(xlabel="step", ylabel="site", title=title)
        figure.colorbar(image, ax=axes)
    return figure


def mismatch(measured: Mapping[str, Any]) -> Figure | None:
    """What fresh queries see of old keys, and what it costs beside reading the whole result."""
    import numpy as np

    maps, age = measured["maps"], measured["age"]
    if maps is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 3.7), dpi=140, layout="constrained")
    panels = list(figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.9]))
    fresh, stale = np.array(maps["fresh"]), np.array(maps["stale"])
    most = float(max(fresh.max(), stale.max()))
    difference = stale - fresh
    for axes, title, table, colours, low, high in (
        (panels[0], "fresh queries, fresh keys", fresh, "Greys", 0.0, most),
        (panels[1], f"fresh queries, keys {age} steps old", stale, "Greys", 0.0, most),
        (panels[2], f"difference (at most {np.abs(difference).max():.2g})", difference, "RdBu", -most / 4, most / 4),
    ):
        axes.imshow(table, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[], xlabel="key")
    panels[0].set_ylabel("query")
    axes = panels[3]
    for key, label, colour in (
        ("stale_output", "the result is read", "#0072B2"),
        ("stale_keys", "keys and values are read", "#D55E00"),
    ):
        table = np.array([[_or_nan(v) for v in row] for row in measured[key]], dtype=float)
        known = [i for i in range(len(table)) if np.isfinite(table[i]).any()]
        axes.plot(known, [float(np.nanmean(table[i])) for i in known], color=colour, label=label)
    axes.set(xlabel="step", ylim=(0, None), title=f"error of an attention whose stored part is {age} steps old")
    axes.title.set_fontsize(9)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
