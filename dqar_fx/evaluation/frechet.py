"""The Fréchet distance between two sets of images, by their features."""

from __future__ import annotations

import torch
from torch import Tensor

from dqar_fx.errors import MetricError

#: Below so many images per feature the covariance is poorly known, and the distance is said to be biased (upwards).
IMAGES_PER_FEATURE = 2


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` (Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500).

    With features of an InceptionV3 this is the FID. It is biased upwards, the more the fewer the images (Chong &
    Forsyth 2020, arXiv:1911.07023): compare only distances of equal numbers of images.

    Args:
        first: features ``[N1, D]``, any float dtype; the work is done in float64.
        second: features ``[N2, D]``.

    Raises:
        MetricError: not two such tables, fewer than 2 rows (one image has no covariance), or a value not finite.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise MetricError(
            f"features of shape {tuple(first.shape)} and {tuple(second.shape)}. Give [N1, D] and [N2, D]."
        )
    if min(len(first), len(second)) < 2:
        raise MetricError(
            f"a Fréchet distance of {len(first)} and {len(second)} images: give at least 2 of each, better "
            f"{IMAGES_PER_FEATURE * first.shape[1]} ({IMAGES_PER_FEATURE} for each of the {first.shape[1]} features)."
        )
    a, b = first.double(), second.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise MetricError("features that are not finite: the images have a NaN or an infinity.")
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a.reshape(a.shape[1], -1))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # C1 C2 and root C2 root have the same eigenvalues; the second is symmetric, so that they are real by construction.
    # What is left of negative ones is round-off.
    product = torch.linalg.eigvalsh(root @ covariance_b.reshape(a.shape[1], -1) @ root).clamp(min=0)
    traces = a.var(0).sum() + b.var(0).sum() - 2 * product.sqrt().sum()
    return max(0.0, float((a.mean(0) - b.mean(0)).square().sum() + traces))


def too_few(images: int, dimension: int) -> bool:
    """Whether so many images are few for features of this dimension, so that their distance is much too large."""
    return images < IMAGES_PER_FEATURE * dimension
