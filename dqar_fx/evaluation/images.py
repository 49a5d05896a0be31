"""Measures of one image against another, the same seed drawn in two ways.

All take ``images`` and ``references`` of one shape ``[N, C, H, W]``, any float dtype, in [0, 1], compute in float64 and
return float64 ``[N]``, one number per image; they raise ``MetricError`` where the shapes differ, or are others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dqar_fx.errors import MetricError

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian (Wang et al. 2004, section III.B)
K1, K2 = 0.01, 0.03  # its small constants, for images whose largest value is 1


def squared_error(images: Tensor, references: Tensor) -> Tensor:
    """Mean squared error of each image."""
    images, references = _checked(images, references)
    return (images - references).square().flatten(1).mean(1)


def psnr(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, of mean squared errors of images in [0, 1]; infinite where they are 0."""
    return -10 * squared_error.double().log10()


def relative_l2(images: Tensor, references: Tensor) -> Tensor:
    """``|image - reference| / |reference|``; 0 for two black images, infinite if only the reference is black."""
    images, references = _checked(images, references)
    error, size = (images - references).flatten(1).norm(dim=1), references.flatten(1).norm(dim=1)
    return torch.where(error == 0, 0.0, error / size)


def ssim_window(height: int, width: int) -> int:
    """Side of SSIM's window for images of this size: 11, or the largest odd number of pixels that fits."""
    side = min(height, width)
    return min(WINDOW, side - (side + 1) % 2)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13, mean over all places where the window fits, and channels).

    A Gaussian window of 11 x 11 pixels and a standard deviation of 1.5; cut to ``ssim_window`` where the image is
    smaller than that, so that numbers of tiny images do not compare with those of others.
    """
    images, references = _checked(images, references)
    N, C, H, W = images.shape
    side = ssim_window(H, W)
    x = torch.arange(side, dtype=torch.float64, device=images.device) - side // 2
    weights = torch.exp(-(x**2) / (2 * SIGMA**2))
    weights /= weights.sum()

    def average(values: Tensor) -> Tensor:
        values = values.reshape(N * C, 1, H, W)
        return F.conv2d(F.conv2d(values, weights.view(1, 1, 1, side)), weights.view(1, 1, side, 1))

    mean_a, mean_b = average(images), average(references)
    variance_a, variance_b = average(images**2) - mean_a**2, average(references**2) - mean_b**2
    covariance = average(images * references) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return similarity.view(N, -1).mean(1)


def _checked(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or images.shape != references.shape or not images.numel():
        raise MetricError(
            f"images of shape {tuple(images.shape)} against {tuple(references.shape)}. Give two tensors of one shape, "
            f"[N, C, H, W], with at least one image."
        )
    return images.double(), references.double()
