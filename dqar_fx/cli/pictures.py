"""Pictures of drawn images: a plain grid, and a comparison of the same images drawn in two ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TILE = 128  # smaller images are enlarged (smoothly) to about this many pixels
GAP = 12  # pixels between the tiles of a grid
# The difference of two images is shown from 0 to this share of the full range, which is about where eyes notice it.
DIFFERENCE_RANGE = 0.1
TEXT, FAINT = "#222222", "#666666"


def save_grid(images: Tensor, path: Path, *, grey: bool, columns: int = 10) -> None:
    """Write images ``[N, C, H, W]`` in [0, 1] as one PNG, ``columns`` to a row; ``grey``: ink on paper."""
    import numpy as np
    from PIL import Image
    from torch.nn.functional import interpolate

    scale = max(1, TILE // images.shape[-1])
    tiles = interpolate(_displayed(images, grey), scale_factor=scale, mode="bicubic").clamp(0, 1)
    N, C, H, W = tiles.shape
    columns = min(columns, N)
    rows = -(-N // columns)
    canvas = np.ones((rows * (H + GAP) + GAP, columns * (W + GAP) + GAP, C), dtype=np.float32)
    for i, tile in enumerate(tiles):
        y, x = GAP + i // columns * (H + GAP), GAP + i % columns * (W + GAP)
        canvas[y : y + H, x : x + W] = tile.permute(1, 2, 0).numpy()
    picture = np.round(canvas * 255).astype(np.uint8)
    Image.fromarray(picture[..., 0] if C == 1 else picture).save(path)


def save_strip(images: Tensor, path: Path, *, grey: bool) -> None:
    """Write images ``[N, C, H, W]`` in [0, 1] side by side, pixel by pixel, as one PNG; ``grey``: ink on paper."""
    import numpy as np
    import torch
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    strip = torch.cat(list(_displayed(images, grey)), dim=-1).permute(1, 2, 0)
    picture = np.round(strip.numpy() * 255).astype(np.uint8)
    Image.fromarray(picture[..., 0] if grey else picture).save(path)


def save_comparison(
    upper: Tensor,
    lower: Tensor,
    path: Path,
    *,
    labels: tuple[str, str],
    columns: Sequence[str],
    title: str,
    subtitle: str,
    grey: bool,
) -> None:
    """Write two rows of images ``[N, C, H, W]`` in [0, 1], one above the other, and how much they differ below.

    Args:
        upper: the row above, the reference.
        lower: the row below it.
        path: a PNG.
        labels: what the rows are; may have several lines.
        columns: what the columns are.
        title: above everything.
        subtitle: in smaller letters below the title.
        grey: one channel, shown as ink on paper and smoothly enlarged: nobody reads a digit off 8 x 8 squares.
    """
    # Figure, not pyplot: no display, no global state, no figure left open.
    from matplotlib.figure import Figure

    N = len(upper)
    cell = 0.95 if grey else 1.9  # inches
    left, right, top, bottom = 1.75, 0.2, 0.95, 0.15
    gap = 0.08
    width, height = left + N * (cell + gap) + right, top + 3 * (cell + gap) + bottom
    width = max(width, 6.5)  # room for the title
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    difference = (lower - upper).abs().mean(1)
    rows = (
        (labels[0], _displayed(upper, grey)),
        (labels[1], _displayed(lower, grey)),
        (f"difference\n(brightest: {DIFFERENCE_RANGE:.0%} of\nthe range or more)", None),
    )
    for r, (label, images) in enumerate(rows):
        y = height - top - (r + 1) * cell - r * gap
        middle = ((left - 0.15) / width, (y + cell / 2) / height)
        figure.text(*middle, label, ha="right", va="center", color=TEXT, fontsize=9)
        for c in range(N):
            place = ((left + c * (cell + gap)) / width, y / height, cell / width, cell / height)
            axes = figure.add_axes(place)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="#cccccc", linewidth=0.6)
            if images is None:
                axes.imshow(difference[c].numpy(), cmap="magma", vmin=0, vmax=DIFFERENCE_RANGE, interpolation="nearest")
            elif grey:
                axes.imshow(images[c, 0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            else:
                axes.imshow(images[c].permute(1, 2, 0).numpy(), interpolation="nearest")
            if r == 0:
                axes.set_title(columns[c], fontsize=9, color=FAINT, pad=4)
    edge = 0.2 / width
    figure.text(edge, 1 - 0.14 / height, title, ha="left", va="top", fontsize=12, weight="bold", color=TEXT)
    figure.text(edge, 1 - 0.42 / height, subtitle, ha="left", va="top", fontsize=9, color=FAINT)
    figure.savefig(path)


def _displayed(images: Tensor, grey: bool) -> Tensor:
    """The images as they are shown: digits as dark ink on white paper."""
    images = images.float().clamp(0, 1)
    return 1 - images if grey else images
