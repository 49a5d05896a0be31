"""Means with 95 % confidence intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and half the width of its confidence interval; None where a single seed tells nothing of it."""

    value: float
    half: float | None

    def __format__(self, spec: str) -> str:
        half = "" if self.half is None else f" ± {self.half:{spec}}"
        return f"{self.value:{spec}}{half}"


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of one value per seed and Student's t interval: ``t(n - 1) * s / sqrt(n)`` to each side.

    An infinite value (the PSNR of identical images) makes the mean infinite, and leaves no interval.

    Raises:
        ValueError: no values.
    """
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean, None)
    return Interval(mean, _student(len(values)) * statistics.stdev(values) / math.sqrt(len(values)))


def jackknife(statistic: Callable[[Sequence[int]], float], groups: int) -> Interval:
    """``statistic`` of all groups, and its delete-a-group jackknife interval (Efron & Stein 1981), Student's t.

    For what is no mean over seeds, such as a Fréchet distance. A bootstrap would draw images twice, which makes
    covariances narrower, and biases that distance by more than what is asked.

    Args:
        statistic: of the numbers of the groups that take part, from 0 to ``groups - 1``.
        groups: how many there are; of a single one there is no interval.
    """
    everything = list(range(groups))
    value = statistic(everything)
    if groups < 2:
        return Interval(value, None)
    left = [statistic([g for g in everything if g != out]) for out in everything]
    mean = statistics.fmean(left)
    error = math.sqrt((groups - 1) / groups * math.fsum((each - mean) ** 2 for each in left))
    return Interval(value, _student(groups) * error)


def _student(n: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, n - 1))
