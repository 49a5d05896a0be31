"""The Fréchet distance against its closed form and scipy's matrix root; the intervals against scipy."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import scipy
import torch
from torch import Tensor

from dqar_fx.errors import MetricError
from dqar_fx.evaluation import Interval, frechet_distance, jackknife, mean_interval
from dqar_fx.evaluation.frechet import too_few


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(n: int, mean: Tensor, root: Tensor) -> Tensor:
    """Rows with exactly this mean and the covariance ``root.T @ root``."""
    rows = normal(n, len(mean), 0)
    rows -= rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T.cov(), upper=True))
    return white @ root + mean


def test_the_closed_form_of_two_gaussians() -> None:
    """Diagonal covariances: ``|m1 - m2|^2 + sum (s1 - s2)^2``."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 1.0, 0.5]).double()
    m1, m2 = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    found = frechet_distance(exact(50, m1, s1.diag()), exact(80, m2, s2.diag()))
    assert found == pytest.approx(5 + 5, rel=1e-9)


@pytest.mark.parametrize("n", [200, 12])  # of 16 features: with fewer images the covariances are singular
def test_scipys_matrix_root(n: int) -> None:
    a, b = normal(n, 16, 1) @ normal(16, 16, 2), normal(300, 16, 3) + 0.3
    covariances = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    mean = float((a.mean(0) - b.mean(0)).square().sum())
    expected = mean + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_equal_sets_and_a_shift() -> None:
    a = normal(100, 8, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a[torch.randperm(100)]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(8 * 4, rel=1e-9)
    assert frechet_distance(a[:, :1], a[:, :1] + 2) == pytest.approx(4, rel=1e-9)  # a single feature


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(9, 3), r"of 1 and 9 images: give at least 2 of each, better 6"),
        (torch.zeros(4, 3), torch.zeros(4, 2), r"shape \(4, 3\) and \(4, 2\)"),
        (torch.zeros(4), torch.zeros(4), r"Give \[N1, D\] and \[N2, D\]"),
        (torch.full((4, 3), math.nan), torch.zeros(4, 3), "not finite"),
    ],
)
def test_refused(first: Tensor, second: Tensor, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        frechet_distance(first, second)


def test_how_many_images_are_few() -> None:
    assert [too_few(images, 32) for images in (2, 63, 64, 500)] == [True, True, False, False]


def test_the_interval_is_scipys() -> None:
    values = [3.0, 4.5, 2.5, 3.7]
    low, high = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    found = mean_interval(values)
    assert found.half is not None
    assert (found.value - found.half, found.value + found.half) == pytest.approx((low, high))
    assert f"{found:.2f}" == f"{found.value:.2f} ± {found.half:.2f}"
    assert mean_interval([5.0]) == Interval(5.0, None)
    assert f"{mean_interval([5.0]):.1f}" == "5.0"
    assert mean_interval([math.inf, 3.0]) == Interval(math.inf, None)
    with pytest.raises(statistics.StatisticsError):
        mean_interval([])


def test_the_jackknife_of_a_mean_is_the_interval_of_the_mean() -> None:
    values = [3.0, 4.5, 2.5, 3.7, 9.0]
    found = jackknife(lambda groups: statistics.fmean(values[g] for g in groups), len(values))
    expected = mean_interval(values)
    assert (found.value, found.half) == pytest.approx((expected.value, expected.half))
    assert jackknife(len, 1) == Interval(1, None)
