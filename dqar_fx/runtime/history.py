"""What the gates know of one store's sites: how often each was read, and what was measured, as it arrives."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from dqar_fx.gates import NOTHING, Measurement
from dqar_fx.graph.measure import DIFFERENCE_ROW, ROW

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
    comparing: Sequence[int] = ()  # sites that another branch's value was compared with
    other: str = ""  # that branch
    differences: dict[torch.device, Arrival] = field(default_factory=dict)

    def found(self, devices: Sequence[torch.device]) -> dict[int, Measurement]:
        """What was measured of each site; waits for the device if need be."""
        found: dict[int, Measurement] = {}
        rows = {device: arrival.get().tolist() for device, arrival in self.rows.items()}
        for site, compared in self.sites:
            entropy, entropy_max, change, change_max = rows[devices[site]][site]
            if not compared:  # what lay in the buffer before was nobody's
                change = change_max = math.nan
            found[site] = Measurement(entropy, entropy_max, change, change_max)
        rows = {device: arrival.get().tolist() for device, arrival in self.differences.items()}
        for site in self.comparing:
            mean, largest = rows[devices[site]][site][:DIFFERENCE_ROW]
            found[site] = replace(found.get(site, NOTHING), difference=mean, difference_max=largest)
        return found


@dataclass(slots=True)
class History:
    """Of each site of one store.

    Attributes:
        reuses: how often the stored value has been read.
        measured: what was measured when the site last computed, as far as it decides by now.
        measuring: the sites that measure in the call that runs, and whether something is stored to compare with.
        comparing: the sites that are compared with another branch of guidance in the call that runs.
        other: that branch.
        differences: what came of it the last time, as far as it decides by now, and which branch that was.
        taken: how often a site has taken that branch's value since.
    """

    devices: Sequence[torch.device]  # of each site
    reuses: list[int] = field(init=False)
    measured: list[Measurement] = field(init=False)
    measuring: Sequence[tuple[int, bool]] = ()
    comparing: Sequence[int] = ()
    other: str = ""
    differences: dict[int, tuple[str, Measurement]] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    _seen: list[tuple[int, int, Measurement]] = field(default_factory=list)
    _late: list[_Measured] = field(default_factory=list)  # decides nothing any more
    _rows: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    _difference_rows: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    _arriving: deque[_Measured] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all: it decides nothing any more, and can still be asked for (``seen``)."""
        self._late += self._arriving
        self.reuses = [0] * len(self.devices)
        self.measured = [NOTHING] * len(self.devices)
        self.measuring, self.comparing = (), ()
        self.differences.clear()
        self.taken.clear()
        self._arriving.clear()

    def renew(self) -> None:
        """Forget all, for another run; what was measured before cannot be asked for any more."""
        self.clear()
        self._late.clear()
        self._seen.clear()

    def row(self, site: int) -> torch.Tensor:
        """Where ``site`` writes what it measures: float32 ``[ROW]``, on its device, always at the same address."""
        return self._row_of(self._rows, site)

    def difference_row(self, site: int) -> torch.Tensor:
        """Where it writes how far it is from another branch: float32 ``[DIFFERENCE_ROW]``, as ``row``."""
        return self._row_of(self._difference_rows, site)[:DIFFERENCE_ROW]

    def _row_of(self, rows_of: dict[torch.device, torch.Tensor], site: int) -> torch.Tensor:
        device = self.devices[site]
        rows = rows_of.get(device)
        if rows is None:
            with torch.inference_mode(False), torch.no_grad():
                rows = rows_of[device] = torch.full((len(self.devices), ROW), torch.nan, device=device)
        return rows[site]

    def read_back(self, step: int) -> None:
        """What ``measuring`` and ``comparing`` say has run: send its rows to the host."""
        if self.measuring or self.comparing:
            rows = {device: Arrival(rows) for device, rows in self._rows.items()} if self.measuring else {}
            sent = _Measured(step, self.measuring, rows)
            if self.comparing:
                sent.comparing, sent.other = self.comparing, self.other
                sent.differences = {device: Arrival(rows) for device, rows in self._difference_rows.items()}
            self._arriving.append(sent)
            self.measuring, self.comparing = (), ()

    def arrive(self, step: int) -> None:
        """Take over what decides at ``step``."""
        while self._arriving and self._arriving[0].step + LAG <= step:
            arrived = self._arriving.popleft()
            found = self._take(arrived)
            for site, _ in arrived.sites:
                self.measured[site] = found[site]
            for site in arrived.comparing:
                self.differences[site] = arrived.other, found[site]

    def seen(self) -> list[tuple[int, int, Measurement]]:
        """All that was measured, as ``(step, site, measurement)``; waits for what is on its way."""
        for late in self._late:
            self._take(late)
        self._late.clear()
        coming = [(each.step, *entry) for each in self._arriving for entry in each.found(self.devices).items()]
        return sorted([*self._seen, *coming], key=lambda entry: entry[:2])

    def _take(self, arrived: _Measured) -> dict[int, Measurement]:
        found = arrived.found(self.devices)
        self._seen += [(arrived.step, *entry) for entry in found.items()]
        return found
