"""What depends on the timestep but on no latent, for all steps of a run at once (see ``graph.timestep_values``).

A run's timesteps are known before it where the model is given the scheduler's: as a view into them, which is seen
without reading the device, or, on the host, by value, as they are or with the arithmetic that pipelines do on them.
Each call shows anew which of them it has; one that has none of them computes these values in their place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dqar_fx.runtime.cache import Rows, Store
from dqar_fx.runtime.conditioning import identical, same_memory, versions_of
from dqar_fx.runtime.identity import SchedulerIdentity, read_timestep

logger = logging.getLogger(__name__)

#: How often all steps are computed in one run. Who hands over other labels, or other weights, at every step, would have
#: them computed as often, and has none instead.
_TIMES = 3
#: What pipelines make of the scheduler's timesteps: themselves, Flux's and SD3.5's share of 1000, Lumina's time.
_TOLD: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda t: t,
    lambda t: t / 1000,
    lambda t: 1 - t / 1000,
)


@dataclass(frozen=True, slots=True)
class Ahead:
    """All timesteps of a run, and which of them a call has.

    Attributes:
        calendar: the scheduler's timesteps.
        key: equal where ``timesteps`` are made of one calendar in the same way.
        timesteps: as the model is given them, in the order of the run, one dimension.
        index: of the call's.
    """

    calendar: torch.Tensor
    key: tuple[object, ...]
    timesteps: torch.Tensor
    index: int


@dataclass(slots=True)
class _Told:
    """What pipelines may make of one calendar: by kind (in ``_TOLD``) and dtype, and where each value of it is."""

    calendar: torch.Tensor
    version: int
    kind: int = 0  # the last that was met
    known: dict[tuple[int, torch.dtype], tuple[torch.Tensor, dict[float, int]]] = field(default_factory=dict)

    def find(self, value: float, dtype: torch.dtype) -> Ahead | None:
        """Where the timestep ``value`` is."""
        for kind in (self.kind, *range(len(_TOLD))):  # as before, first: 0 is 0, and 0 / 1000
            known = self.known.get((kind, dtype))
            if known is None:
                told = _TOLD[kind](self.calendar).to(dtype)
                known = self.known[kind, dtype] = told, {float(v): i for i, v in enumerate(told.tolist())}
            if value in known[1]:
                self.kind = kind
                return Ahead(self.calendar, (self.version, kind, dtype), known[0], known[1][value])
        return None


class Calendar:
    """Tells a run's timesteps before it.

    Args:
        identity: of the pipeline's scheduler.
    """

    def __init__(self, identity: SchedulerIdentity) -> None:
        self._identity = identity
        self._told: _Told | None = None

    def find(self, timestep: object) -> Ahead | None:
        """Which of the scheduler's timesteps a call has; None where that cannot be told without reading a device."""
        calendar = self._identity.calendar
        if not isinstance(timestep, torch.Tensor) or not isinstance(calendar, torch.Tensor) or calendar.ndim != 1:
            return None
        if calendar.is_inference() or not timestep.numel():
            return None
        version = calendar._version
        index = self._identity.index_of(timestep)
        if index is not None:
            return Ahead(calendar, (version,), calendar, index)
        if timestep.device.type != "cpu" or calendar.device.type != "cpu":
            return None
        value = read_timestep(timestep)
        if not isinstance(value, float):
            return None
        told = self._told
        if told is None or told.calendar is not calendar or told.version != version:
            told = self._told = _Told(calendar, version)
        return told.find(value, timestep.dtype)


class TimestepTable:
    """Computes the values of one graph, for all steps that are left of a run, and picks those of a call.

    Args:
        table: computes them from ``inputs``.
        calendar: knows the timesteps.
        constants: what the graph is called with behind its arguments,
        first_constant: the position of the first.
        inputs: positions, in arguments and constants together, of what ``table`` is given.
        timestep: position of the timestep.
        weights: positions of the parameters among ``inputs``.
        max_steps: for how many steps at once it is worth the memory.
    """

    def __init__(
        self,
        table: fx.GraphModule,
        calendar: Calendar,
        constants: Sequence[torch.Tensor],
        first_constant: int,
        inputs: Sequence[int],
        timestep: int,
        weights: Sequence[int],
        max_steps: int,
    ) -> None:
        self._table = table
        self._calendar = calendar
        self._constants = tuple(constants)
        self._inputs = tuple(inputs)
        self._timestep = timestep
        self._weights = tuple(weights)
        told = {*weights, timestep, *range(first_constant, first_constant + len(constants))}
        self._others = tuple(i for i in inputs if i not in told)
        self._max_steps = max_steps
        self._failed = False

    def row(self, store: Store, arguments: Sequence[Any]) -> Sequence[torch.Tensor] | None:
        """The values of this call, computed with those of all later steps when the first of them is asked for.

        None where it is not known which of the run's timesteps this is, or whether its inputs stay what they are.
        """
        timestep = arguments[self._timestep]
        ahead = None if self._failed else self._calendar.find(timestep)
        if ahead is None:
            return None
        weights = [arguments[i] for i in self._weights]
        tensors = [value for i in self._others if isinstance(value := arguments[i], torch.Tensor)]
        versions = versions_of(tensors), versions_of(weights)
        if -1 in versions[0] or -1 in versions[1]:
            return None
        key = (ahead.key, timestep.shape, timestep.dtype, timestep.device, torch.is_inference_mode_enabled())
        rows = store.rows
        if (
            rows is None
            or rows.calendar is not ahead.calendar
            or rows.key != key
            or ahead.index < rows.first
            or rows.versions != versions
            or not identical(weights, rows.weights)
            or not all(map(same_memory, tensors, rows.inputs))
        ):
            store.rows = None  # before there are others
            known, times = store.told
            times = times + 1 if known is ahead.calendar and ahead.index else 1
            store.told = ahead.calendar, times
            values = self._computed(ahead, [*arguments, *self._constants]) if times <= _TIMES else None
            if values is None:
                return None
            rows = store.rows = Rows(ahead.calendar, key, ahead.index, tensors, weights, versions, values)
        return rows.values[ahead.index - rows.first]

    def _computed(self, ahead: Ahead, arguments: Sequence[Any]) -> list[tuple[torch.Tensor, ...]] | None:
        """By step, from that of ``ahead`` on."""
        timestep = arguments[self._timestep]
        coming = ahead.timesteps[ahead.index :]
        if len(coming) > self._max_steps:
            return None
        each = coming.reshape(-1, *[1] * timestep.ndim).expand(-1, *timestep.shape)
        given = [each if i == self._timestep else arguments[i] for i in self._inputs]
        dims = tuple(0 if i == self._timestep else None for i in self._inputs)
        try:
            with torch.no_grad():
                found = torch.func.vmap(self._table, in_dims=dims)(*given)
        except (
            Exception
        ) as error:  # an operator that knows no batches, or too little memory: each step for itself, then
            logger.info("what depends on the timestep is computed at every step: %s", str(error).split("\n", 1)[0])
            self._failed = True
            return None
        return list(zip(*(value.contiguous().unbind(0) for value in found), strict=True))
