"""Decisions with gates: what the plan would reuse, less what a gate blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dqar_fx.gates import Candidate, Gate, Gates
from dqar_fx.graph.specialise import MEASURING, STORING, Outcome
from dqar_fx.policy import PolicyGate
from dqar_fx.runtime.cache import EMPTY, Store
from dqar_fx.runtime.clock import Move, Tick
from dqar_fx.runtime.conditioning import Inputs
from dqar_fx.runtime.generation import NO_FACTS, Facts, Generation, StepTable
from dqar_fx.runtime.history import LAG
from dqar_fx.runtime.identity import SchedulerIdentity
from dqar_fx.runtime.latents import LatentNorms
from dqar_fx.runtime.program import CapturedGraph, Outcomes
from dqar_fx.runtime.prompt import Prompt
from dqar_fx.runtime.sharing import SharingTable


class Gating:
    """The gates of one model, asked at each of its steps.

    Args:
        gates: which there are.
        with_snr: False where nothing tells the signal-to-noise ratio: that gate is left out.
    """

    def __init__(self, gates: Gates, *, with_snr: bool) -> None:
        self.gates = gates
        self.cascade: tuple[Gate, ...] = gates.cascade(with_snr=with_snr)
        self._needs_snr = with_snr and (gates.snr is not None or bool(gates.asks_for_snr))
        self._needs_latents = gates.asks_for_latents
        self._tables: dict[tuple[StepTable, CapturedGraph], GatedTable | SharingTable] = {}

    def __str__(self) -> str:
        left_out = ["snr left out: no scheduler tells it"] if self.gates.snr is not None and not self._needs_snr else []
        shared = [str(self.gates.sharing)] if self.gates.sharing is not None else []
        return ", ".join([*map(str, self.cascade), *left_out, *shared]) or "none that could block"

    def facts(self, generation: Generation, tick: Tick, inputs: Inputs, scheduler: SchedulerIdentity | None) -> Facts:
        """What the gates are told of the step of ``tick``."""
        if tick.move is Move.START:
            generation.prompt = Prompt(inputs, tick.step)
        length = generation.prompt_length
        if length is None and generation.prompt is not None:
            length = generation.prompt.length(tick.step)
        snr = scheduler.snr if self._needs_snr and scheduler is not None else ()
        ratio = snr[tick.step] if 0 <= tick.step < len(snr) else math.nan
        norm = math.nan
        if self._needs_latents:
            if tick.move is Move.START or generation.latents is None:
                generation.latents = LatentNorms()
            norm = generation.latents.at(tick.step, inputs.latents)
        if self.gates.cross_branch is None:
            return Facts(ratio, length, norm)
        generation.note_call(tick, inputs)
        return Facts(ratio, length, norm, generation)

    @property
    def measures(self) -> frozenset[str]:
        """What a compute step measures for them."""
        return self.gates.measures

    def table(self, table: StepTable, graph: CapturedGraph, first: int, total: int) -> GatedTable | SharingTable:
        """``table`` with the gates behind it, for ``graph``, whose sites are ``first`` and following of ``total``."""
        known = self._tables.get((table, graph))
        if known is None:
            known = gated = GatedTable(table, self, graph, first, total)
            if self.gates.sharing is not None:
                known = SharingTable(gated, table, self.gates.sharing, graph, first)
            self._tables[table, graph] = known
        return known


class GatedTable:
    """A plan, cut to the sites of one graph, and the gates that each of its reuses has to pass."""

    def __init__(self, table: StepTable, gating: Gating, graph: CapturedGraph, first: int, total: int) -> None:
        self.num_steps, self.reuses = table.num_steps, table.reuses
        self._table = table
        self._cascade = [gate for gate in gating.cascade if not isinstance(gate, PolicyGate)]
        self._policy = next((gate for gate in gating.cascade if isinstance(gate, PolicyGate)), None)
        self._first = first
        self._bounds = [graph.entropy_bound(site) for site in range(table.count)]
        self._candidate = Candidate(num_steps=table.num_steps, num_sites=total)
        # A measurement decides LAG steps later; a change needs two of them in a row.
        ahead = LAG + ("change" in gating.measures)
        measured = [bool(gating.measures) and graph.can_measure(site) for site in range(table.count)]
        # A change is that from what was stored before.
        compares = "change" in gating.measures
        self._computing: list[Outcomes] = [
            tuple(
                (Outcome.MEASURE if compares or any(row[s] for row in table.reuse[t + 1 : t + 2]) else Outcome.OBSERVE)
                if measured[s] and any(row[s] for row in table.reuse[t + 1 : t + 1 + ahead])
                else Outcome.STORE
                if any(row[s] for row in table.reuse[t + 1 : t + 2])
                else Outcome.COMPUTE
                for s in range(table.count)
            )
            for t in range(table.num_steps)
        ]
        #: Whether any site reads or writes its stored value.
        self.uses_store = [
            any(reuse) or not STORING.isdisjoint(computing)
            for reuse, computing in zip(table.reuse, self._computing, strict=True)
        ]

    def decide(
        self, tick: Tick, store: Store, empty_reason: str, facts: Facts = NO_FACTS
    ) -> tuple[Outcomes, tuple[str, ...]]:
        """The outcome and its reason for every site, and what will be stored, noted in ``store``."""
        step, table = tick.step, self._table
        if tick.move in (Move.UNKNOWN, Move.REPEAT) or step >= self.num_steps:
            return table.decide(tick, store, empty_reason)
        history, candidate = store.history, self._candidate
        history.arrive(step)
        candidate.step, candidate.snr, candidate.prompt_length = step, facts.snr, facts.prompt_length
        candidate.latent_norm = facts.latent_norm
        policy, asked, rows = self._policy, list[int](), list[list[float]]()
        reuse, age, computing = table.reuse[step], table.age[step], self._computing[step]
        outcomes, reasons = list(computing), list(table.reason[step])
        for site, source in enumerate(store.step):
            if reuse[site]:
                if source == EMPTY:
                    reasons[site] = empty_reason
                elif not step - age[site] <= source < step:
                    reasons[site] = "stale"
                else:
                    candidate.site, candidate.age = self._first + site, step - source
                    candidate.reuses, candidate.measured = history.reuses[site], history.measured[site]
                    candidate.entropy_bound = self._bounds[site]
                    reasons[site] = first_to_block(self._cascade, candidate)
                    if not reasons[site]:
                        outcomes[site], reasons[site] = Outcome.REUSE, "reuse"
                        history.reuses[site] += 1
                        if policy is not None:
                            asked.append(site)
                            rows.append(policy.row(candidate))
        if policy is not None and asked:  # once, for all sites
            for site, allowed in zip(asked, policy.allow(rows), strict=True):
                if not allowed:
                    outcomes[site], reasons[site] = computing[site], policy.reason
                    history.reuses[site] -= 1
        history.measuring = [
            (site, store.step[site] != EMPTY) for site, outcome in enumerate(outcomes) if outcome in MEASURING
        ]
        for site, outcome in enumerate(outcomes):
            if outcome in STORING:
                store.step[site], history.reuses[site] = step, 0
        return tuple(outcomes), tuple(reasons)


def first_to_block(cascade: Sequence[Gate], candidate: Candidate) -> str:
    """The reason of the first gate that blocks; "" if all of them let the value be read."""
    for gate in cascade:
        if not gate.allows(candidate):
            return gate.reason
    return ""
