"""Times of calls that take turns, and how far a median of them can be trusted."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dqar_fx.graph.calling import BoxedCallable

#: Half the width of a notch is so many quartile ranges over the root of the number of values: medians whose notches do
#: not overlap differ at about the 95 % level, however the values are distributed (McGill, Tukey and Larsen,
#: "Variations of box plots", The American Statistician 32, 1978).
NOTCH = 1.57


@dataclass(frozen=True, slots=True)
class Estimate:
    """The median of several measurements, and the notch around it, in the unit of what was measured."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From at least one value; a single one is told nothing about its error, and believed."""
        middle = statistics.median(values)
        half = NOTCH * interquartile(values) / math.sqrt(len(values))
        return cls(middle, middle - half, middle + half)


def interquartile(values: Sequence[float]) -> float:
    """From the first quartile to the third, in the values' unit; 0 for a single one."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [0.0, 0.0, 0.0]
    return quartiles[2] - quartiles[0]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, the device drained before and after."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - started) * 1e3


def alternate(calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time the calls in turn, A B C A B C ..., so that a drift of the machine hits all alike; milliseconds per call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, device))
    return times


class PieceClock:
    """Times compiled pieces while they run one after the other, as they do in a step.

    On CUDA by events in the stream, so that the host can run ahead as it always does and what it costs shows only where
    the device waits for it; elsewhere by the host's clock (on MPS the device is drained around each piece).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: list[tuple[object, Any, Any]] = []

    def watch(self, key: object, piece: BoxedCallable) -> BoxedCallable:
        """``piece``, which from now on notes how long it takes, as a sample of ``key``."""
        device, seen = self._device, self._seen

        def on_cuda(given: list[Any]) -> Sequence[Any]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch leaves it untyped
            stream = torch.cuda.current_stream(device)
            start.record(stream)
            result = piece(given)
            end.record(stream)
            seen.append((key, start, end))
            return result

        def by_the_host(given: list[Any]) -> Sequence[Any]:
            synchronize(device)
            start = time.perf_counter()
            result = piece(given)
            synchronize(device)
            seen.append((key, start, time.perf_counter()))
            return result

        return on_cuda if device.type == "cuda" else by_the_host

    def take(self) -> dict[object, list[float]]:
        """What was noted since the last time, in milliseconds by key."""
        synchronize(self._device)
        found: dict[object, list[float]] = {}
        for key, start, end in self._seen:
            taken = start.elapsed_time(end) if self._device.type == "cuda" else (end - start) * 1e3
            found.setdefault(key, []).append(taken)
        self._seen.clear()
        return found
