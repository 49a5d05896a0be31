"""PSNR, SSIM and relative L2 against scipy and numpy, and against values that scikit-image gave."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from dqar_fx.errors import MetricError
from dqar_fx.evaluation import psnr, relative_l2, squared_error, ssim
from dqar_fx.evaluation.images import ssim_window


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(shape, generator=generator)
    return first, (first + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1)


def reference_ssim(a: np.ndarray, b: np.ndarray, radius: int) -> float:
    """Of one channel, by scipy's filter, without its border."""

    def average(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=radius)[radius:-radius, radius:-radius]

    mean_a, mean_b = average(a), average(b)
    covariance = average(a * b) - mean_a * mean_b
    variances = average(a * a) - mean_a**2 + average(b * b) - mean_b**2
    top = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    return float((top / ((mean_a**2 + mean_b**2 + 1e-4) * (variances + 9e-4))).mean())


@pytest.mark.parametrize(("shape", "window"), [((2, 3, 24, 31), 11), ((2, 1, 8, 8), 7), ((1, 2, 9, 40), 9)])
def test_ssim_is_that_of_scipy(shape: tuple[int, ...], window: int) -> None:
    a, b = pair(*shape)
    assert ssim_window(*shape[2:]) == window
    for found, image, other in zip(ssim(a, b), a.double().numpy(), b.double().numpy(), strict=True):
        expected = np.mean([reference_ssim(x, y, window // 2) for x, y in zip(image, other, strict=True)])
        assert float(found) == pytest.approx(expected, abs=1e-12)


def test_what_scikit_image_gives() -> None:
    """structural_similarity(gaussian_weights=True, use_sample_covariance=False), peak_signal_noise_ratio; 0.26.0."""
    a, b = pair(2, 3, 24, 31)
    assert ssim(b, a).tolist() == pytest.approx([0.947422303448216, 0.9433611066073843], abs=1e-9)
    assert psnr(squared_error(b, a)).tolist() == pytest.approx([20.404633668276453, 20.341061876876157], abs=1e-9)


def test_squared_error_and_relative_l2_by_hand() -> None:
    reference = torch.tensor([0.5, 0.5, 0.0, 1.0]).reshape(1, 1, 2, 2)
    image = reference + torch.tensor([0.1, -0.1, 0.0, 0.0]).reshape(1, 1, 2, 2)
    assert squared_error(image, reference).item() == pytest.approx(0.005)
    assert psnr(torch.tensor([0.01, 1.0])).tolist() == pytest.approx([20, 0])
    assert relative_l2(image, reference).item() == pytest.approx(math.sqrt(0.02 / 1.5))


def test_identical_and_black_images() -> None:
    a, _ = pair(2, 1, 8, 8)
    assert psnr(squared_error(a, a)).tolist() == [math.inf] * 2
    assert ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-12)
    assert relative_l2(a, a).tolist() == [0, 0]
    assert relative_l2(0 * a, 0 * a).tolist() == [0, 0]
    assert relative_l2(a, 0 * a).tolist() == [math.inf] * 2
    assert ssim(1 - a, a).max() < 0  # negatives are anti-correlated


@pytest.mark.parametrize("measure", [squared_error, relative_l2, ssim])
@pytest.mark.parametrize(
    ("first", "second"), [((1, 1, 8, 8), (2, 1, 8, 8)), ((1, 8, 8), (1, 8, 8)), ((0, 1, 8, 8),) * 2]
)
def test_shapes_that_do_not_fit(measure: object, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    assert callable(measure)
    with pytest.raises(MetricError, match=r"Give two tensors of one shape, \[N, C, H, W\]"):
        measure(torch.zeros(first), torch.zeros(second))
