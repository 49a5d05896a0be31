"""Reading at every step what stays the same: values that follow from inputs in the memory they were computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dqar_fx.graph.specialise import Outcome
from dqar_fx.runtime.cache import EMPTY, Kept, Store
from dqar_fx.runtime.clock import Move, Tick
from dqar_fx.runtime.conditioning import QUOTED, identical, is_conditioning, same_memory, versions_of
from dqar_fx.runtime.identity import timestep_argument
from dqar_fx.runtime.timestep_values import TimestepTable

_UNTOLD = (Move.REPEAT, Move.UNKNOWN)  # whose call this is, is not known


def constant_inputs(sources: Sequence[str], latents: str = "") -> frozenset[str]:
    """Those of a graph's ``sources`` that by their names stay the same during a generation.

    Args:
        sources: of each argument; inputs of the forward that are not used are not among them.
        latents: name of the forward's argument that holds the latents; "": the first that the graph uses.
    """
    words = {source: _words(source) for source in sources}
    names = [found[0] for found in words.values() if found and found[0] != "self"]
    timestep = timestep_argument(list(dict.fromkeys(names)))
    others = [name for name in names if timestep is None or name != timestep[0]]
    latents = latents or next(iter(others), "")
    return frozenset(
        source
        for source, found in words.items()
        if found and found[0] in others and found[0] != latents and all(map(is_conditioning, found))
    )


def timestep_source(sources: Sequence[str]) -> str:
    """That of a graph's ``sources`` which is the forward's timestep; "" where none is, or it is part of something."""
    words = {source: _words(source) for source in sources}
    timestep = timestep_argument(list(dict.fromkeys(found[0] for found in words.values() if found)))
    return next((s for s, found in words.items() if timestep is not None and found == [timestep[0]]), "")


def _words(source: str) -> list[str]:
    """The names in a source, that of the forward's argument first; none where that is not known."""
    found: list[str] = QUOTED.findall(source) if source.startswith("L['") else []
    if found[:1] == ["kwargs"]:
        return found[1:]  # a decorated forward: ``L['kwargs']['encoder_hidden_states']``
    return [] if found[:1] == ["args"] else found


class Hoisting:
    """What was hoisted out of one graph: whether it is at hand, and what that means for the sites in it.

    Args:
        sites: numbers of the lossless sites: hoisted altogether.
        inputs: positions of the graph's arguments that the values follow from.
        weights: positions of the parameters that they follow from.
        copies: the values must be copied to be kept (``Lowerer.overwrites_results``).
        keeps: there are such values; or there is only the ``table``:
        table: what depends on the timestep alone, as the graph must be given it; None if it computes that itself.
    """

    def __init__(
        self,
        sites: Sequence[int],
        inputs: Sequence[int],
        weights: Sequence[int],
        *,
        copies: bool,
        keeps: bool = True,
        table: TimestepTable | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self._inputs = tuple(inputs)
        self._weights = tuple(weights)
        self._copies = copies
        self._table = table
        self._keeps = keeps

    def look(self, tick: Tick, store: Store, arguments: Sequence[Any]) -> Kept | None:
        """The values in ``store`` if they are of these arguments, or room for others; None where it cannot be told.

        They are exact whatever the schedule says, and whosever call this is; but where that is in doubt they are
        computed. It cannot be told of inference tensors, which count no writes: then nothing is hoisted, and the
        schedule alone decides. Nor where the graph must be given what depends on the timestep, and that is not known.
        Weights count as ``Generation.check_weights`` counts them.
        """
        row = self._table.row(store, arguments) if self._table is not None else ()
        inputs = [arguments[i] for i in self._inputs]
        weights = [arguments[i] for i in self._weights]
        versions = versions_of(inputs), versions_of(weights)
        if -1 in versions[0] or row is None:
            store.kept = None
            if store.hoisted:  # what the schedule thinks is stored of these sites was never written
                store.hoisted = False
                for site in self.sites:
                    store.step[site] = EMPTY
            return None
        store.hoisted = bool(self.sites)
        known = store.kept
        inference = torch.is_inference_mode_enabled()
        if (
            known is not None
            and tick.move not in _UNTOLD
            and versions == known.versions
            and inference is known.inference
            and identical(weights, known.weights)
            and all(same_memory(a, b) for a, b in zip(known.inputs, inputs, strict=True))
        ):
            known.row = row
            return known
        return Kept(inputs, weights, versions, inference, None if self._keeps else [], row)

    def decide(
        self, kept: Kept, store: Store, outcomes: tuple[Outcome, ...], reasons: tuple[str, ...]
    ) -> tuple[tuple[Outcome, ...], tuple[str, ...]]:
        """``outcomes`` and ``reasons`` of a step, corrected for the lossless sites: read if ``kept`` has values."""
        if not self.sites:
            return outcomes, reasons
        chosen, why = list(outcomes), list(reasons)
        for site in self.sites:
            if kept.values is not None:
                chosen[site], why[site] = Outcome.REUSE, "reuse"
                continue
            if chosen[site] is Outcome.REUSE:  # of other inputs
                why[site] = "empty" if store.kept is None else "stale"
            chosen[site] = Outcome.COMPUTE
        return tuple(chosen), tuple(why)

    def keep(self, kept: Kept, tick: Tick, store: Store, *, is_last: bool) -> None:
        """Keep what a call has computed, if a later one may read it."""
        if is_last or tick.move in _UNTOLD:
            store.kept = None
            return
        if self._copies and kept.values is not None:
            kept.values = _copied(kept.values)
        store.kept = kept


def _copied(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same values in other memory, laid out and sharing it as before."""
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in values}
    copies = {
        address: storage.clone()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for address, storage in storages.items()
    }
    return [
        torch.empty(0, dtype=v.dtype, device=v.device).set_(
            copies[v.untyped_storage().data_ptr()], v.storage_offset(), v.shape, v.stride()
        )
        for v in values
    ]
