"""What a sweep shows: a table, pictures, and one page that holds both."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
PAGE = "report.html"
# Okabe and Ito's, told apart by all eyes.
COLOURS = {"linear": "#D55E00", "interval": "#0072B2", "taper": "#009E73", "exponential": "#CC79A7"}
OTHER = "#999999"
#: Rows in the printed table; the page and the file have all.
SHOWN = 30
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } p { max-width: 48rem; }
img { max-width: 100%; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; cursor: pointer; } th:first-child, td:first-child { text-align: left; }
tr.best td { background: #eef7f2; } code { background: #f4f4f4; padding: 0 .25rem; }
"""
# Sorts the table by the column that is clicked; numbers are in data-value.
_SCRIPT = """
document.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
  const body = document.querySelector("tbody"), rows = [...body.rows];
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const up = head.dataset.up !== "yes"; head.dataset.up = up ? "yes" : "no";
  rows.sort((a, b) => (isNaN(value(a)) ? value(a).localeCompare(value(b)) : value(a) - value(b)) * (up ? 1 : -1));
  rows.forEach(row => body.append(row));
}));
"""


def number(row: Row, *names: str) -> float | None:
    """A number of a row, or the middle of an interval; None where it was not measured."""
    value: Any = row
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("value")
    return None if value is None else float(value)


COLUMNS: tuple[tuple[str, Callable[[Row], float | None], str], ...] = (
    ("reused", lambda row: number(row, "reuse_ratio"), ".1%"),
    ("speed-up in FLOP", lambda row: number(row, "flop_speedup"), ".3f"),
    ("measured", lambda row: number(row, "measured_speedup"), ".2f"),
    ("PSNR dB", lambda row: number(row, "psnr_db"), ".1f"),
    ("SSIM", lambda row: number(row, "ssim"), ".4f"),
    ("FD to baseline", lambda row: number(row, "frechet", "to_baseline"), ".4f"),
    ("FD to real", lambda row: number(row, "frechet", "to_real"), ".3f"),
    ("right class", lambda row: number(row, "agreement"), ".1%"),
)


def name_of(row: Row) -> str:
    """The row as it is called in table and pictures."""
    parts = [row["schedule"], row["cache"], *([row["gates"]] if row["gates"] != "none" else [])]
    return " | ".join(parts)


def on_the_front(rows: Sequence[Row]) -> set[str]:
    """Keys of the rows that no other beats in both PSNR and work saved."""
    best, found = -1.0, set()
    for row in sorted(rows, key=lambda row: (-row["flop_speedup"], -(number(row, "psnr_db") or 0))):
        psnr = number(row, "psnr_db")
        if psnr is not None and psnr > best:
            best = psnr
            found.add(row["key"])
    return found


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def make_table(rows: Sequence[Row]) -> str:
    """The rows that no other beats, from little to much saved."""
    from tabulate import tabulate

    front = on_the_front(rows)
    chosen = sorted((row for row in rows if row["key"] in front), key=lambda row: row["flop_speedup"])[-SHOWN:]
    lines = [[name_of(row), *(_cell(get(row), form) for _, get, form in COLUMNS)] for row in chosen]
    headers = [f"best of {len(rows)}", *(name for name, _, _ in COLUMNS)]
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=("left", *["right"] * len(COLUMNS)))


def write_report(rows: Sequence[Row], settings: Mapping[str, Any], folder: Path) -> Path:
    """Pictures beside the records, and a page that holds them, the table, and how it was measured."""
    from dqar_fx.calibration.records import write

    pictures = {
        "pareto.png": (_pareto(rows), "What reuse costs", _PARETO),
        "heat.png": (_heat(rows), "DQAR's schedule: warm-up by fraction", _HEAT),
        "steps.png": (
            _steps(rows),
            "When it is reused",
            "Share of the attentions read at each step, of the best plans.",
        ),
    }
    sections = []
    for name, (figure, title, text) in pictures.items():
        if figure is None:
            continue
        figure.savefig(folder / name)
        data = base64.b64encode((folder / name).read_bytes()).decode()
        sections.append(
            f'<h2>{html.escape(title)}</h2><p>{text}</p><img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{data}">'
        )
    page = _page(rows, settings, sections)
    write(folder / PAGE, lambda file: file.write_text(page, encoding="utf-8"))
    return folder / PAGE


_PARETO = (
    "Each point is one configuration: work saved, counted in FLOP, against the PSNR of its images to those of the same "
    "seeds without reuse. Up and to the right is better; the line joins those that no other beats in both."
)
_STEPS = "Share of the attentions that are read at each step (black: all), of the configurations on the line above."
_HEAT = (
    "The linear schedule without a refresh: after the warm-up ever more layers reuse, up to the fraction. Its stored "
    "values get up to most of a run old. Left: Fr&eacute;chet distance to the baseline's images (lower is better); "
    "right: the speed-up in FLOP."
)


def _page(rows: Sequence[Row], settings: Mapping[str, Any], sections: Sequence[str]) -> str:
    front = on_the_front(rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("configuration", *(name for name, _, _ in COLUMNS)))
    body = []
    for row in sorted(rows, key=lambda row: -row["flop_speedup"]):
        cells = [f"<td>{html.escape(name_of(row))}</td>"]
        for _, get, form in COLUMNS:
            value = get(row)
            cells.append(f'<td data-value="{value if value is not None else -1}">{_cell(value, form)}</td>')
        body.append(f"<tr{' class=best' if row['key'] in front else ''}>{''.join(cells)}</tr>")
    machine = settings["machine"]
    origin = (
        f"{settings['images']} images of each of {len(rows)} configurations, the same seeds for all; "
        f"{settings['model']}, {settings['steps']} steps, guidance {settings['guidance']:g}; compiled with "
        f"{settings['backend']}, on {machine.get('device_name', machine.get('device', '?'))}."
    )
    features = next((row["frechet"]["features"] for row in rows if row.get("frechet")), None)
    distance = f"FD: Fr&eacute;chet distance of {html.escape(features)}. " if features else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>dqar-fx sweep</title><style>{_STYLE}</style>'
        f"<h1>Attention reuse: {len(rows)} configurations of {html.escape(str(settings['model']))}</h1>"
        f"<p>{html.escape(origin)}</p>{''.join(sections)}<h2>All of them</h2><p>{distance}Shaded: no other saves as "
        f"much at a higher PSNR. <em>measured</em>: seconds of one generation against one of the baseline right after "
        f"it; a single pair, so noisy. Click a heading to sort.</p>"
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>"
        f"{''.join(body)}</tbody></table></div><script>{_SCRIPT}</script></html>\n"
    )


def _new(columns: int = 1, *, height: float = 4.6) -> tuple[Figure, list[Axes]]:
    # Figure, not pyplot: no display, no global state, no figure left open.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(5.2 * columns + 3.2 * (columns == 1), height), dpi=140, layout=ConstrainedLayoutEngine())
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _pareto(rows: Sequence[Row]) -> Figure | None:
    points = [(row, number(row, "psnr_db")) for row in rows]
    known = [(row, psnr) for row, psnr in points if psnr is not None]
    if not known:
        return None
    figure, (axes,) = _new()
    for rule in dict.fromkeys(row["rule"] for row, _ in known):
        mine = [(row["flop_speedup"], psnr) for row, psnr in known if row["rule"] == rule]
        axes.plot(*zip(*mine, strict=True), "o", color=COLOURS.get(rule, OTHER), label=rule, markersize=5, alpha=0.8)
    front = on_the_front(rows)
    line = sorted((row["flop_speedup"], psnr) for row, psnr in known if row["key"] in front)
    axes.plot(*zip(*line, strict=True), "-", color="#222222", linewidth=0.9, zorder=0)
    axes.set(xlabel="speed-up, counted in FLOP", ylabel="PSNR to the images without reuse, dB")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _heat(rows: Sequence[Row]) -> Figure | None:
    import numpy as np

    table = {
        (row["warmup"], row["fraction"]): row
        for row in rows
        if row["rule"] == "linear" and row["refresh"] is None and not row["deep_first"] and row["gates"] == "none"
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


def _steps(rows: Sequence[Row]) -> Figure | None:
    import numpy as np

    front = on_the_front(rows)
    best = sorted((row for row in rows if row["key"] in front), key=lambda row: row["flop_speedup"])
    if not best:
        return None
    figure, (axes,) = _new(height=1.2 + 0.26 * len(best))
    table = np.array([row["reuse_by_step"] for row in best])
    axes.imshow(table, aspect="auto", cmap="Greys", vmin=0, vmax=1.25, interpolation="nearest")
    axes.set_yticks(range(len(best)), [row["schedule"] for row in best], fontsize=7)
    axes.set(xlabel="step")
    axes.spines[:].set_visible(False)
    return figure
