"""What the gates know of one store's sites: how often each was read, and what was measured, as it arrives."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dqar_fx.gates import NOTHING, Measurement
from dqar_fx.graph.measure import ROW

#: A measurement of step ``t`` decides from step ``t + LAG`` on. At ``t + 1`` the host would have to wait for the device
#: to finish step ``t``; this way the device always has a step to work on, and decisions do not depend on timing.
LAG = 2


class Arrival:
    """Values on their way from the device to the host; nobody waits for them before they are asked for."""

    def __init__(self, values: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        with torch.no_grad():
            if values.device.type == "cuda":
                self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                with torch.cuda.device(values.device):
                    self._values.copy_(values, non_blocking=True)
                    self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                    self._event.record()
            else:
                self._values = values.detach().clone()

    def get(self) -> torch.Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._values


@dataclass(slots=True)
class _Measured:
    step: int
    sites: Sequence[tuple[int, bool]]  # whether there was a stored value to compare the new one with
    rows: dict[torch.device, Arrival]

    def entries(self, devices: Sequence[torch.device]) -> list[tuple[int, int, Measurement]]:
        """``(step, site, measurement)`` of each site; waits for the device if need be."""
        rows = {device: arrival.get().tolist() for device, arrival in self.rows.items()}
        entries = []
        for site, compared in self.sites:
            entropy, entropy_max, change, change_max = rows[devices[site]][site]
            if not compared:  # what lay in the buffer before was nobody's
                change = change_max = math.nan
            entries.append((self.step, site, Measurement(entropy, entropy_max, change, change_max)))
        return entries


@dataclass(slots=True)
class History:
    """Of each site of one store.

    Attributes:
        reuses: how often the stored value has been read.
        measured: what was measured when the site last computed, as far as it decides by now.
        measuring: the sites that measure in the call that runs, and whether something is stored to compare with.
    """

    devices: Sequence[torch.device]  # of each site
    reuses: list[int] = field(init=False)
    measured: list[Measurement] = field(init=False)
    measuring: Sequence[tuple[int, bool]] = ()
    _seen: list[tuple[int, int, Measurement]] = field(default_factory=list)
    _late: list[_Measured] = field(default_factory=list)  # decides nothing any more
    _rows: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    _arriving: deque[_Measured] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all: it decides nothing any more, and can still be asked for (``seen``)."""
        self._late += self._arriving
        self.reuses = [0] * len(self.devices)
        self.measured = [NOTHING] * len(self.devices)
        self.measuring = ()
        self._arriving.clear()

    def row(self, site: int) -> torch.Tensor:
        """Where ``site`` writes what it measures: float32 ``[ROW]``, on its device, always at the same address."""
        device = self.devices[site]
        rows = self._rows.get(device)
        if rows is None:
            with torch.inference_mode(False), torch.no_grad():
                rows = self._rows[device] = torch.full((len(self.devices), ROW), torch.nan, device=device)
        return rows[site]

    def read_back(self, step: int) -> None:
        """What ``measuring`` says has run: send its rows to the host."""
        if self.measuring:
            arrivals = {device: Arrival(rows) for device, rows in self._rows.items()}
            self._arriving.append(_Measured(step, self.measuring, arrivals))
            self.measuring = ()

    def arrive(self, step: int) -> None:
        """Take over what decides at ``step``."""
        while self._arriving and self._arriving[0].step + LAG <= step:
            for _, site, found in self._take(self._arriving.popleft()):
                self.measured[site] = found

    def seen(self) -> list[tuple[int, int, Measurement]]:
        """All that was measured, as ``(step, site, measurement)``; waits for what is on its way."""
        for late in self._late:
            self._take(late)
        self._late.clear()
        coming = [entry for each in self._arriving for entry in each.entries(self.devices)]
        return sorted([*self._seen, *coming], key=lambda entry: entry[:2])

    def _take(self, found: _Measured) -> list[tuple[int, int, Measurement]]:
        entries = found.entries(self.devices)
        self._seen += entries
        return entries
