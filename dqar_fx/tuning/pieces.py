"""What a site costs, from the times of the compiled pieces that change when it is read, stored or computed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dqar_fx.graph.partition import Piece
from dqar_fx.graph.specialise import Outcome, Variant
from dqar_fx.runtime.program import CapturedGraph, Outcomes, Program
from dqar_fx.tuning.probe import Probe
from dqar_fx.tuning.timing import PieceClock, timed

#: A piece as it is compiled: equal for pieces that run the same code on inputs of the same sizes.
Key = Hashable


class PieceCosts:
    """Which pieces have to be timed, and what follows for each site.

    Equal blocks share their compiled pieces, so a piece that occurs in every block is one thing to time, and its time
    is that of all sites in such blocks: of 28 equal blocks each is as fast as any other. Three programs are run in
    turn, everything computed, stored and read, and the fewest others that hold the pieces which only occur where one
    site computes among others that are read.

    * A site's time to compute is that of all pieces that are others when it alone computes, and everything else is
      read; its time to read is that of these pieces when it is read as well. (Reading it may spare work in pieces
      before its own.)
    * What storing adds to a piece is divided among the sites in it by their bytes.

    Args:
        probe: the model.
        site_bytes: what each site stores.
    """

    def __init__(self, probe: Probe, site_bytes: Sequence[int]) -> None:
        self._probe = probe
        self._bytes = site_bytes
        self._keys: dict[tuple[CapturedGraph, Outcomes], list[tuple[Piece, Key]]] = {}
        count = len(probe.sites)
        everything = {outcome: (outcome,) * count for outcome in (Outcome.COMPUTE, Outcome.STORE, Outcome.REUSE)}
        #: The sets of outcomes that have to be run.
        self.programs: list[Outcomes] = list(everything.values())
        known = {key for outcomes in self.programs for key in self._keys_of(outcomes)}
        self._computing: list[Counter[Key]] = []
        self._reading: list[Counter[Key]] = []
        for site in range(count):
            alone = (*(Outcome.REUSE,) * site, Outcome.COMPUTE, *(Outcome.REUSE,) * (count - site - 1))
            computing, reading = self._difference(alone, everything[Outcome.REUSE])
            self._computing.append(computing)
            self._reading.append(reading)
            if not computing.keys() <= known:
                self.programs.append(alone)
                known.update(self._keys_of(alone))
        self._storing = [self._storing_piece(site, everything) for site in range(count)]

    def measure(self, rounds: int, device: torch.device) -> list[dict[Key, float]]:
        """The milliseconds of each piece in each round: of those that ran as one and the same, the median."""
        for outcomes in self.programs:
            self._probe.run(outcomes)  # compiles
        clock = PieceClock(device)
        found = []
        with self._watched(clock):
            for outcomes in self.programs:
                self._probe.run(outcomes)
            clock.take()
            for _ in range(rounds):
                for outcomes in self.programs:
                    timed(lambda: self._probe.run(outcomes), device)  # noqa: B023  # called here
                found.append({key: statistics.median(times) for key, times in clock.take().items()})
        return found

    def compute_ms(self, site: int, times: Mapping[Key, float]) -> float:
        """What computing ``site`` takes, by the pieces' ``times``."""
        return _total(self._computing[site], times)

    def read_ms(self, site: int, times: Mapping[Key, float]) -> float:
        """What the same pieces take when it is read."""
        return _total(self._reading[site], times)

    def store_ms(self, site: int, times: Mapping[Key, float]) -> float:
        """What storing it takes besides computing it."""
        storing, computing, share = self._storing[site]
        return share * (_total(storing, times) - _total(computing, times))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _graph_outcomes(self, outcomes: Outcomes) -> Iterator[tuple[CapturedGraph, Outcomes, int]]:
        for graph, first in self._probe.graphs:
            yield graph, outcomes[first : first + graph.num_sites], first

    def _pieces(self, graph: CapturedGraph, outcomes: Outcomes) -> list[tuple[Piece, Key]]:
        """The pieces of ``graph`` that run under its ``outcomes``, and their keys."""
        known = self._keys.get((graph, outcomes))
        if known is None:
            known = [(step.piece, _key(step.piece, step.variant)) for step in graph.build(outcomes).steps]
            self._keys[graph, outcomes] = known
        return known

    def _keys_of(self, outcomes: Outcomes) -> set[Key]:
        return {key for graph, mine, _ in self._graph_outcomes(outcomes) for _, key in self._pieces(graph, mine)}

    def _difference(self, some: Outcomes, others: Outcomes) -> tuple[Counter[Key], Counter[Key]]:
        """The pieces that only run under the one, and only under the other."""
        first: Counter[Key] = Counter()
        second: Counter[Key] = Counter()
        for (graph, one, _), (_, two, _) in zip(self._graph_outcomes(some), self._graph_outcomes(others), strict=True):
            if one != two:
                mine, theirs = set(self._pieces(graph, one)), set(self._pieces(graph, two))
                first.update(key for _, key in mine - theirs)
                second.update(key for _, key in theirs - mine)
        return first, second

    def _storing_piece(
        self, site: int, everything: Mapping[Outcome, Outcomes]
    ) -> tuple[Counter[Key], Counter[Key], float]:
        """The piece of ``site`` as it stores, the same as it computes, and the share of the site in the difference."""
        graph, first = next((g, f) for g, f in self._probe.graphs if f <= site < f + g.num_sites)
        piece = next(p for p in graph.plain if site - first in p.sites)
        held = sum(self._bytes[first + other] for other in piece.sites)
        found = []
        for outcome in (Outcome.STORE, Outcome.COMPUTE):
            mine = everything[outcome][: graph.num_sites]
            found.append(Counter(key for other, key in self._pieces(graph, mine) if other is piece))
        return found[0], found[1], self._bytes[site] / held if held else 0.0

    @contextmanager
    def _watched(self, clock: PieceClock) -> Iterator[None]:
        """Inside, the programs that have run tell ``clock`` how long each of their pieces takes."""
        before: list[tuple[Program, Any]] = []
        for outcomes in self.programs:
            for graph, mine, _ in self._graph_outcomes(outcomes):
                for program in graph.programs(mine):
                    if any(program is known for known, _ in before):
                        continue
                    before.append((program, program.compiled))
                    program.compiled = [
                        (clock.watch(_key(step.piece, step.variant), function), gather, results, freed)
                        for step, (function, gather, results, freed) in zip(
                            program.steps, program.compiled, strict=True
                        )
                    ]
        try:
            yield
        finally:
            for program, compiled in before:
                program.compiled = compiled


def _key(piece: Piece, variant: Variant) -> Key:
    """What tells the compiled form of a piece from others: what it computes, and what its inputs look like."""
    inputs = [n for n in piece.gm.graph.nodes if n.op == "placeholder"]
    looks: list[tuple[str, str, torch.dtype | None]] = []
    for i in variant.inputs:
        value = inputs[i].meta.get("example_value")
        if isinstance(value, torch.Tensor):
            looks.append((str(tuple(value.shape)), str(value.stride()), value.dtype))
        else:
            looks.append((str(value), "", None))
    return id(variant), tuple(looks)


def _total(pieces: Mapping[Key, int], times: Mapping[Key, float]) -> float:
    return sum(count * times[key] for key, count in pieces.items())
