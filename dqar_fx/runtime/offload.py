"""Stored values in host memory: brought for the piece that reads them, taken away after the one that writes.

For models whose cache does not fit beside them (``CacheConfig(device="cpu")``). On CUDA the copies run on a stream of
their own, from and to pinned memory: what the next piece reads is on its way while this one runs, and only that is on
the device at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from dqar_fx.runtime.cache import Store


@dataclass(frozen=True, slots=True)
class Transfer:
    """A stored tensor that a piece is given: its register, what it is, and whether the piece reads or writes it."""

    register: int
    site: int
    exit: int
    part: int
    reads: bool


@dataclass(slots=True)
class Copies:
    """The copies of one run of a program.

    Args:
        store: where the values live, in host memory.
        transfers: of each piece, in the order in which they run.
    """

    store: Store
    transfers: Sequence[Sequence[Transfer]]
    _coming: dict[int, torch.Tensor] = field(default_factory=dict)

    def bring(self, piece: int, registers: list[Any]) -> None:
        """Give ``piece`` the stored tensors that it reads, and room for those that it writes; fetch for the next."""
        self._fetch(piece)
        for transfer in self.transfers[piece]:
            value = self._coming.pop(transfer.register) if transfer.reads else self._room(transfer)
            registers[transfer.register] = value
        stream = self._stream(piece)
        if stream is not None:
            present = torch.cuda.current_stream(stream.device)
            present.wait_stream(stream)
            for transfer in self.transfers[piece]:
                registers[transfer.register].record_stream(present)
        if piece + 1 < len(self.transfers):
            self._fetch(piece + 1)

    def take(self, piece: int, registers: list[Any]) -> None:
        """Take away what ``piece`` has written, and let go of what it was given."""
        stream = self._stream(piece)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        for transfer in self.transfers[piece]:
            value, registers[transfer.register] = registers[transfer.register], None
            if not transfer.reads:
                with _on(stream):
                    self._host(transfer).copy_(value, non_blocking=True)
                if stream is not None:
                    value.record_stream(stream)

    def _fetch(self, piece: int) -> None:
        stream = self._stream(piece)
        for transfer in self.transfers[piece]:
            if transfer.reads and transfer.register not in self._coming:
                with _on(stream):
                    value = self._coming[transfer.register] = self._room(transfer)
                    value.copy_(self._host(transfer), non_blocking=True)

    def _host(self, transfer: Transfer) -> torch.Tensor:
        return self.store.of(transfer.site)[transfer.exit][transfer.part]

    def _room(self, transfer: Transfer) -> torch.Tensor:
        host = self._host(transfer)
        device = self.store.specs[transfer.site][transfer.exit].device
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)

    def _stream(self, piece: int) -> torch.cuda.Stream | None:
        for transfer in self.transfers[piece]:
            return self.store.stream_for(self.store.specs[transfer.site][transfer.exit].device)
        return None


def _on(stream: torch.cuda.Stream | None) -> Any:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
