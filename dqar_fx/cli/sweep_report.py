"""What a sweep shows: a table, pictures, and one page that holds both."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dqar_fx.cli import sweep_pictures
from dqar_fx.cli.sweep_rows import PAIRS, Row, name_of, number, on_the_front, short_schedule

PAGE = "report.html"
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
document.querySelectorAll("#all th").forEach((head, column) => head.addEventListener("click", () => {
  const body = document.querySelector("#all tbody"), rows = [...body.rows];
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const up = head.dataset.up !== "yes"; head.dataset.up = up ? "yes" : "no";
  rows.sort((a, b) => (isNaN(value(a)) ? value(a).localeCompare(value(b)) : value(a) - value(b)) * (up ? 1 : -1));
  rows.forEach(row => body.append(row));
}));
"""


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


def write_report(
    rows: Sequence[Row], settings: Mapping[str, Any], folder: Path, attention: Mapping[str, Any] | None = None
) -> Path:
    """Pictures beside the records, and a page that holds them, the tables, and how it was measured.

    ``attention`` is what ``sweep_attention.measure`` found.
    """
    from dqar_fx.calibration.records import write

    pictures = [
        ("pareto.png", sweep_pictures.pareto(rows), "What reuse costs", _PARETO),
        ("grid.png", sweep_pictures.grid(rows, folder), "What it looks like", _GRID),
        ("bars.png", sweep_pictures.bars(rows), "What it gains", _BARS),
        ("steps.png", sweep_pictures.steps(rows), "When it is reused", _STEPS),
        ("heat.png", sweep_pictures.heat(rows), "DQAR's schedule: warm-up by fraction", _HEAT),
    ]
    if attention is not None:
        pictures += [
            ("attention.png", sweep_pictures.attention(attention), "What the attentions do", _ATTENTION),
            ("mismatch.png", sweep_pictures.mismatch(attention), "Results, or keys and values?", _MISMATCH),
        ]
    sections = []
    for name, figure, title, text in pictures:
        if figure is None:
            continue
        figure.savefig(folder / name)
        data = base64.b64encode((folder / name).read_bytes()).decode()
        sections.append(
            f'<h2>{html.escape(title)}</h2><p>{text}</p><img alt="{html.escape(title)}" '
            f'src="data:image/png;base64,{data}">'
        )
    sections += _stores(rows)
    page = _page(rows, settings, sections)
    write(folder / PAGE, lambda file: file.write_text(page, encoding="utf-8"))
    return folder / PAGE


def _stores(rows: Sequence[Row]) -> list[str]:
    """A table of the ways to store values, where several were tried with the same schedule."""
    tried = {(row["schedule"], row["cache"]): row for row in rows if row["gates"] == "none"}
    caches = list(dict.fromkeys(cache for _, cache in tried))
    schedules = [s for s in dict.fromkeys(s for s, _ in tried) if sum((s, c) in tried for c in caches) > 1]
    if not schedules:
        return []
    names = ["PSNR, dB (speed-up in FLOP)", *map(short_schedule, schedules)]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = []
    for cache in caches:
        cells = [f"<td>{html.escape(cache)}</td>"]
        for schedule in schedules:
            row = tried.get((schedule, cache))
            psnr = _cell(number(row, "psnr_db"), ".2f") if row is not None else ""
            cells.append(f"<td>{psnr} ({row['flop_speedup']:.2f})</td>" if row is not None else "<td></td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return [
        f"<h2>How values are stored</h2><p>{_STORES}</p><div class=wide><table><thead><tr>{head}</tr></thead><tbody>"
        + "".join(body)
        + "</tbody></table></div>"
    ]


_PARETO = (
    "Each point is one configuration: work saved, against the PSNR of its images to those of the same seeds without "
    "reuse. Up and to the right is better; the line joins those that no other beats in both. The measured speed-up is "
    "that of whole generations, each beside one of the baseline; it is noisy."
)
_GRID = (
    "The first images of the first seed, with some of the configurations on that line, and DQAR's schedule at the end."
)
_BARS = "Of the configurations on the line: what counting FLOP promises, and what a whole generation took."
_STEPS = "Share of the attentions that are read at each step (black: all), of the configurations on the line."
_HEAT = (
    "The linear schedule without a refresh: after the warm-up ever more layers reuse, up to the fraction. Its stored "
    "values get up to most of a run old. Left: Fr&eacute;chet distance to the baseline's images (lower is better); "
    "right: the speed-up in FLOP."
)
_ATTENTION = (
    "Without any reuse, by step (first to last) and site (shallow to deep): how widely an attention looks, and how far "
    "its result is from that of the step before (relative L2). Where the change is small, a read costs little; what it "
    "does to the image depends on the step as well."
)
_MISMATCH = (
    "Who stores keys and values lets the queries of this step meet the keys of an earlier one. Left: the weights of "
    "one head in the middle of the run, and what old keys make of them. Right: the error of the attention's result if "
    "its keys and values are old, and if the whole result is (mean over all sites)."
)
_STORES = "The same schedules, with values stored in other ways."


def _page(rows: Sequence[Row], settings: Mapping[str, Any], sections: Sequence[str]) -> str:
    front = on_the_front(rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("configuration", *(name for name, _, _ in COLUMNS)))
    body = []
    for row in sorted(rows, key=lambda row: -row["flop_speedup"]):
        cells = [f'<td title="{html.escape(name_of(row))}">{html.escape(name_of(row, short=True))}</td>']
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
        f"much at a higher PSNR. <em>measured</em>: seconds of a generation against one of the baseline right after "
        f"it, each step the median of up to {PAIRS} runs. Click a heading to sort.</p>"
        f"<div class=wide><table id=all><thead><tr>{head}</tr></thead><tbody>"
        f"{''.join(body)}</tbody></table></div><script>{_SCRIPT}</script></html>\n"
    )
