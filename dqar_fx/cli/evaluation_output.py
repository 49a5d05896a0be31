"""What ``dqar-fx evaluate`` makes of its measurements: records, a table, and pictures."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tabulate import tabulate

from dqar_fx.cli.evaluation_runs import EAGER, GROUPS, Configuration, Real, Task, drawn
from dqar_fx.cli.measuring import step_seconds

if TYPE_CHECKING:
    from torch import Tensor

    from dqar_fx.cli.models import Painter
    from dqar_fx.evaluation import Interval

Cell: TypeAlias = Callable[[dict[str, Any]], str]

DARK, BASELINE, REUSING = "#222222", "#999999", "#0072B2"
MEASURES = ("psnr_db", "ssim", "relative_l2", "lpips", "clip_score", "agreement")


def make_rows(task: Task, contenders: Sequence[Configuration], real: Real | None) -> list[dict[str, Any]]:
    """One record of each configuration, the baseline first.

    What has an interval over seeds is a dict of ``value``, ``low`` and ``high`` (95 %; None for a single seed).
    ``psnr_db`` is None where all images of a seed are identical: JSON has no infinity.
    """
    from dqar_fx.evaluation import mean_interval

    baseline, *_ = contenders
    eager = next((each for each in contenders if each.name == EAGER and each.arguments is None), None)
    known: dict[tuple[Configuration, tuple[int, ...]], float] = {}
    rows = []
    for each in drawn(contenders):
        report = None if each.runtime is None else each.runtime.report()
        row: dict[str, Any] = {
            "name": each.name,
            "baseline": each is baseline,
            "schedule": None if report is None else report.schedule,
            "cache": None if report is None else report.cache,
            "gates": None if report is None else report.gates,
            "images": len(task.seeds) * len(task.classes),
            "seeds": len(task.seeds),
            "reuse_ratio": _record(mean_interval(each.reuse)),
            "cache_mib": each.cache_bytes / 2**20,
            "peak_mib": each.peak_mib,
            "ms_per_step": None,
            "speedup_over_eager": None,
            "speedup_over_compiled": None,
            "identical": math.isinf(each.worst),
            "worst_image_psnr_db": each.worst if math.isfinite(each.worst) else None,
        }
        if each.rounds:
            seconds = step_seconds(each.rounds)
            row["ms_per_step"] = 1e3 * seconds
            assert eager is not None
            row["speedup_over_eager"] = step_seconds(eager.rounds) / seconds
            if baseline is not eager:
                row["speedup_over_compiled"] = step_seconds(baseline.rounds) / seconds
        for name in MEASURES:
            row[name] = _record(mean_interval(each.measures[name])) if name in each.measures else None
        row["frechet"] = _frechet(task, each, baseline, real, known)
        rows.append(row)
    if baseline is not eager and eager is not None and eager.rounds:
        rows[0]["eager_ms_per_step"] = 1e3 * step_seconds(eager.rounds)
    return rows


def _record(interval: Interval) -> dict[str, float | None] | None:
    if not math.isfinite(interval.value):
        return None
    if interval.half is None:
        return {"value": interval.value, "low": None, "high": None}
    return {
        "value": interval.value,
        "low": interval.value - interval.half,
        "high": interval.value + interval.half,
    }


def _frechet(
    task: Task,
    each: Configuration,
    baseline: Configuration,
    real: Real | None,
    known: dict[tuple[Configuration, tuple[int, ...]], float],
) -> dict[str, Any] | None:
    """The distances of one configuration; ``known`` keeps those to the real images, which take seconds each."""
    import torch

    from dqar_fx.evaluation import frechet_distance, jackknife
    from dqar_fx.evaluation.frechet import too_few

    if task.features is None:
        return None
    groups = min(GROUPS, len(task.seeds))
    if (len(task.seeds) - math.ceil(len(task.seeds) / groups)) * len(task.classes) < 2:
        groups = 1  # without a group, too few images are left for a distance: it has no interval

    def chosen(features: Sequence[Tensor], numbers: Sequence[int]) -> Tensor:
        return torch.cat([part for i, part in enumerate(features) if i % groups in numbers])

    def to_baseline(numbers: Sequence[int]) -> float:
        return frechet_distance(chosen(each.features, numbers), chosen(baseline.features, numbers))

    def to_real(numbers: Sequence[int], of: Configuration = each) -> float:
        assert real is not None
        key = (of, tuple(numbers))
        if key not in known:
            known[key] = frechet_distance(chosen(of.features, numbers), real.features)
        return known[key]

    def change(numbers: Sequence[int]) -> float:
        # Of the same seeds: what both have in common, by far the most of either's interval, falls out.
        return to_real(numbers) - to_real(numbers, baseline)

    images = sum(map(len, each.features))
    return {
        "features": task.features.name,
        "dimension": task.features.dimension,
        "images": images,
        "too_few_images": too_few(images, task.features.dimension),
        "to_baseline": None if each is baseline else _record(jackknife(to_baseline, groups)),
        "real": None if real is None else real.name,
        "real_images": None if real is None else len(real.features),
        "to_real": None if real is None else _record(jackknife(to_real, groups)),
        "change_to_real": None if real is None or each is baseline else _record(jackknife(change, groups)),
    }


def make_notes(
    task: Task, contenders: Sequence[Configuration], real: Real | None, rows: Sequence[dict[str, Any]], rounds: int
) -> list[str]:
    """What the columns mean, and against what: a number without that says nothing."""
    from dqar_fx.evaluation.images import WINDOW, ssim_window

    baseline = contenders[0]
    assert baseline.shown is not None
    N, seeds = rows[0]["images"], len(task.seeds)
    notes = [
        f"PSNR, SSIM and relative L2 compare each image with that of {baseline.name} from the same seed, without reuse."
    ]
    height, width = baseline.shown.shape[-2:]
    if (side := ssim_window(height, width)) < WINDOW:
        notes[0] += f" SSIM's window is {side} x {side}, as {WINDOW} x {WINDOW} does not fit into {height} x {width}."
    if seeds > 1:
        notes.append(
            f"±: 95 % confidence over {seeds} seeds of {len(task.classes)} images each, by Student's t; of a Fréchet "
            f"distance by the jackknife over groups of seeds."
        )
    else:
        notes.append("One seed: no confidence interval. Give more --images, or a smaller --batch.")
    if task.features is not None:
        notes.append(_frechet_note(task, baseline, real, N))
    if rounds:
        notes.append(
            f"Times: median of {rounds} generations of {len(task.classes)} images, each configuration in turn"
            + ("; there is no compiled baseline with --backend eager." if baseline.name == EAGER else ".")
        )
    if (eager := rows[0].get("eager_ms_per_step")) is not None:
        notes.append(f"Eager, without torch.compile: {eager:.1f} ms per step.")
    device = "of the device" if task.device.type == "cuda" else "of the tensors"
    notes.append(f"Peak MiB: {device}, in one generation of {len(task.classes)} images, cache included, weights not.")
    return notes


def _frechet_note(task: Task, baseline: Configuration, real: Real | None, images: int) -> str:
    import torch

    from dqar_fx.evaluation import frechet_distance
    from dqar_fx.evaluation.frechet import IMAGES_PER_FEATURE, too_few

    assert task.features is not None
    dimension = task.features.dimension
    text = f"FD: Fréchet distance of {images} images, features of {task.features.name} ({dimension}), to the baseline's"
    text += "." if real is None else f" {images} and to {len(real.features)} real ones ({real.name})."
    if (half := len(baseline.features) // 2) and not too_few(images // 2, dimension):
        # By seeds: within a batch, images of the same class are at the same distance from one another.
        halves = (torch.cat(baseline.features[:half]), torch.cat(baseline.features[half : 2 * half]))
        text += f" Between {len(halves[0])} of the baseline's own images and {len(halves[1])} others it is "
        text += f"{frechet_distance(*halves):.3g}."
    if too_few(images, dimension):
        text += (
            f" TOO FEW IMAGES for {dimension} features: the distances are much too large; give at least "
            f"{IMAGES_PER_FEATURE * dimension} --images."
        )
    return text


def _columns(rows: Sequence[dict[str, Any]]) -> list[tuple[str, Cell]]:
    """Headers, and what stands below them; a column that nothing was measured for is left out."""

    def measured(name: str, spec: str) -> Cell:
        def cell(row: dict[str, Any]) -> str:
            if row["identical"] and name == "psnr_db":
                return "reference" if row["baseline"] else "identical"
            return _cell(row[name], spec)

        return cell

    def distance(name: str, spec: str) -> Cell:
        def cell(row: dict[str, Any]) -> str:
            frechet = row["frechet"]
            if frechet is not None and row["baseline"] and name == "to_baseline":
                return "reference"
            if frechet is None or frechet[name] is None:
                return ""
            return _cell(frechet[name], spec) + (" (too few)" if frechet["too_few_images"] else "")

        return cell

    def number(name: str, spec: str, unit: str = "") -> Cell:
        return lambda row: "" if row[name] is None else f"{row[name]:{spec}}{unit}"

    columns: list[tuple[str, Cell]] = [
        ("", lambda row: str(row["name"])),
        ("reused", measured("reuse_ratio", ".1%")),
        ("cache MiB", number("cache_mib", ".2f")),
        ("peak MiB", number("peak_mib", ".1f")),
        ("ms/step", number("ms_per_step", ".1f")),
        ("vs eager", number("speedup_over_eager", ".2f", "x")),
        ("vs compiled", number("speedup_over_compiled", ".2f", "x")),
        ("PSNR dB", measured("psnr_db", ".1f")),
        ("SSIM", measured("ssim", ".5f")),
        ("rel. L2", measured("relative_l2", ".4f")),
        ("LPIPS", measured("lpips", ".4f")),
        ("FD to baseline", distance("to_baseline", ".4f")),
        ("FD to real", distance("to_real", ".3f")),
        ("that less baseline's", distance("change_to_real", "+.3f")),
        ("CLIP score", measured("clip_score", ".2f")),
        ("right class", measured("agreement", ".1%")),
    ]
    return [(header, cell) for header, cell in columns if any(cell(row) for row in rows)]


def _cell(record: dict[str, Any] | None, spec: str) -> str:
    if record is None:
        return ""
    # Without a width there is nothing to say: a plan decides alike for every seed.
    known = record["high"] is not None and record["high"] > record["value"]
    return f"{record['value']:{spec}}" + (f" ± {record['high'] - record['value']:{spec.lstrip('+')}}" if known else "")


def make_table(rows: Sequence[dict[str, Any]], style: str) -> str:
    """The rows as they are printed, in one of tabulate's styles."""
    columns = _columns(rows)
    lines = [[cell(row) for _, cell in columns] for row in rows]
    headers = [header for header, _ in columns]
    aligned = ("left", *["right"] * (len(headers) - 1))
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=aligned)


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows with what is nested spread out: ``psnr_db.value``, ``frechet.to_real.low``, ..."""
    flat = [dict(_flatten(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    names = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    output = io.StringIO()
    writer = csv.DictWriter(output, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return output.getvalue()


def _flatten(row: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in row.items():
        found += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found


def draw_bars(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Panels side by side, a bar for each row with its interval: reuse, PSNR, and the Fréchet distances."""
    # Figure, not pyplot: no display, no global state, no figure left open.
    from matplotlib.figure import Figure

    panels: list[tuple[str, list[dict[str, Any] | None], float]] = [
        ("attentions reused, %", [row["reuse_ratio"] for row in rows], 100),
        ("PSNR against the baseline, dB", [row["psnr_db"] for row in rows], 1),
    ]
    for key, label in (("to_baseline", "to the baseline's images"), ("to_real", "to real images")):
        if any(row["frechet"] is not None and row["frechet"][key] is not None for row in rows):
            panels.append((f"Fréchet distance\n{label}", [row["frechet"][key] for row in rows], 1))
    figure = Figure(figsize=(3.2 + 3.0 * len(panels), 1.5 + 0.4 * len(rows)), dpi=150, layout="constrained")
    for number, (axes, (label, values, factor)) in enumerate(
        zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True)
    ):
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            if value is None:
                axes.text(0, place, " reference" if row["baseline"] else " identical", va="center", color=DARK, size=8)
                continue
            half = None if value["high"] is None else factor * (value["high"] - value["value"])
            axes.barh(
                place, factor * value["value"], xerr=half, color=BASELINE if row["baseline"] else REUSING,
                error_kw={"ecolor": DARK, "capsize": 2},
            )  # fmt: skip
        if values[0] is not None and number:
            axes.axvline(factor * values[0]["value"], color=DARK, linewidth=0.8, linestyle=":")
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if not number:
            axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
            axes.invert_yaxis()
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def draw_grids(
    contenders: Sequence[Configuration],
    rows: Sequence[dict[str, Any]],
    classes: Sequence[int],
    painter: Painter,
    folder: Path,
) -> None:
    """Images of the first seed: the baseline's, and those of each configuration below the same ones of the baseline."""
    from dqar_fx.cli.pictures import save_comparison, save_grid

    baseline = contenders[0]
    assert baseline.shown is not None
    count = min(len(classes), len(baseline.shown))  # the first of each class
    save_grid(baseline.shown, folder / "images-baseline.png", grey=painter.grey, columns=count)
    for number, (each, row) in enumerate(zip(drawn(contenders)[1:], rows[1:], strict=True), 1):
        assert each.shown is not None
        psnr = "identical images" if row["psnr_db"] is None else f"PSNR {row['psnr_db']['value']:.1f} dB"
        save_comparison(
            baseline.shown[:count],
            each.shown[:count],
            # Numbered: two names may differ in what no file name can hold.
            folder / f"images-{number}-{re.sub(r'[^A-Za-z0-9.=_-]+', '-', each.name)}.png",
            labels=(baseline.name, f"with reuse\n{row['reuse_ratio']['value']:.0%} reused"),
            columns=[f"{'' if painter.grey else 'class '}{label}" for label in classes[:count]],
            title=each.name,
            subtitle=f"The same seed; the first of each class. All {row['images']} images: {psnr}.",
            grey=painter.grey,
        )
