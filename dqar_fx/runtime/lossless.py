"""Reading at every step what is exact: values that follow from inputs which are the memory they were computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dqar_fx.graph.specialise import Outcome
from dqar_fx.runtime.cache import Store
from dqar_fx.runtime.clock import Move, Tick
from dqar_fx.runtime.conditioning import QUOTED, is_conditioning, same_memory
from dqar_fx.runtime.identity import timestep_argument

_UNTOLD = (Move.REPEAT, Move.UNKNOWN)  # whose values are stored is not known


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


def _words(source: str) -> list[str]:
    """The names in a source, that of the forward's argument first; none where that is not known."""
    found: list[str] = QUOTED.findall(source) if source.startswith("L['") else []
    if found[:1] == ["kwargs"]:
        return found[1:]  # a decorated forward: ``L['kwargs']['encoder_hidden_states']``
    return [] if found[:1] == ["args"] else found


class Lossless:
    """The lossless sites of one graph.

    Args:
        sites: their numbers in the graph.
        inputs: positions of the graph's arguments that their values follow from (besides parameters, whose changes
            empty every store).
    """

    def __init__(self, sites: Sequence[int], inputs: Sequence[int]) -> None:
        self.sites = tuple(sites)
        self._inputs = tuple(inputs)

    def decide(
        self,
        tick: Tick,
        is_last: bool,
        store: Store,
        arguments: Sequence[Any],
        outcomes: tuple[Outcome, ...],
        reasons: tuple[str, ...],
    ) -> tuple[tuple[Outcome, ...], tuple[str, ...]]:
        """``outcomes`` and ``reasons`` of a step, with lossless sites read where what is stored is of these inputs.

        Where it is not, they compute, and store for the next step. Where it cannot be told (inference tensors count no
        writes), the schedule alone decides.
        """
        given = [arguments[i] for i in self._inputs]
        versions = [-1 if not isinstance(g, torch.Tensor) or g.is_inference() else g._version for g in given]
        if tick.move in _UNTOLD or -1 in versions:
            store.inputs = None  # what the schedule stores now is of these inputs, and they are not known
            return outcomes, reasons
        known = store.inputs
        same = (
            known is not None
            and versions == known[1]
            and all(same_memory(a, b) for a, b in zip(known[0], given, strict=True))
        )
        chosen, why = list(outcomes), list(reasons)
        for site in self.sites:
            if same:
                chosen[site], why[site] = Outcome.REUSE, "reuse"
                continue
            if chosen[site] is Outcome.REUSE:  # of other inputs
                why[site] = "empty" if known is None else "stale"
            chosen[site] = Outcome.COMPUTE if is_last else Outcome.STORE
        if not same:
            store.inputs = None if is_last else (given, versions)
        return tuple(chosen), tuple(why)
