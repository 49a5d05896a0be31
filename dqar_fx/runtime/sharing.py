"""Decisions where branches of guidance share: what one would compute, it may take from the one called before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dqar_fx.gates import CrossBranch
from dqar_fx.graph.specialise import COMPARED, STORING, Outcome
from dqar_fx.runtime.cache import EMPTY, Store
from dqar_fx.runtime.clock import Move, Tick
from dqar_fx.runtime.generation import NO_FACTS, Facts, StepTable
from dqar_fx.runtime.history import LAG, History
from dqar_fx.runtime.program import CapturedGraph, Outcomes

if TYPE_CHECKING:
    from dqar_fx.runtime.gating import GatedTable  # which imports this module

#: What computes without storing, and what does the same and stores.
_WITHOUT_STORE = {Outcome.COMPUTE: Outcome.STORE, Outcome.OBSERVE: Outcome.MEASURE}
_CERTAIN = (Move.START, Move.NEXT, Move.SAME)


class SharingTable:
    """A plan with its gates, cut to the sites of one graph, and what a branch may take from another at each step.

    The first branch of a step decides as it would alone, but also stores what no later step reads, for the others. What
    a later branch takes is lent to it: it reads the first one's buffers, until that stores anew or it does itself.

    Args:
        gated: decides for each branch by itself.
        plan: the plan behind that.
        sharing: when values are taken.
        graph: whose sites these are.
        first: number of the first.
    """

    def __init__(
        self, gated: GatedTable, plan: StepTable, sharing: CrossBranch, graph: CapturedGraph, first: int
    ) -> None:
        self.num_steps, self.reuses = gated.num_steps, gated.reuses
        self._gated = gated
        self._sharing = sharing
        self._first = first
        steps, sites = range(plan.num_steps), range(plan.count)
        # A plan without any reuse calls all its steps, to the last, a warm-up.
        warmup = "warmup" if "warmup" not in plan.reason[-1] else ""
        # [step][site]: a value may be taken.
        shared = graph.comparable - plan.left
        self._may_take = [[s in shared and plan.reason[t][s] != warmup for s in sites] for t in steps]
        # ... and one may be taken later on, by what is measured now.
        self._may_learn = [[any(row[s] for row in self._may_take[t + LAG :]) for s in sites] for t in steps]
        self.uses_store = [uses or any(may) for uses, may in zip(gated.uses_store, self._may_take, strict=True)]

    def decide(
        self, tick: Tick, store: Store, empty_reason: str, facts: Facts = NO_FACTS
    ) -> tuple[Outcomes, tuple[str, ...]]:
        """The outcome and its reason for every site, and what will be stored, noted in ``store``."""
        step, generation = tick.step, facts.generation
        if generation is None or tick.move not in _CERTAIN or step >= self.num_steps:
            return self._gated.decide(tick, store, empty_reason, facts)
        store.history.arrive(step)
        lapsed = _settle(store)
        outcomes, reasons = self._gated.decide(tick, store, empty_reason, facts)
        chosen, why = list(outcomes), list(reasons)
        for site in lapsed:
            if why[site] == empty_reason:
                why[site] = "stale"
        if tick.move is Move.SAME:
            lending = generation.lending(self._first)
            if lending is not None:
                self._take_or_compare(step, store, *lending, chosen, why)
        elif generation.has_others(self._first):
            for site, outcome in enumerate(chosen):
                if outcome in _WITHOUT_STORE and self._may_take[step][site]:
                    chosen[site] = _WITHOUT_STORE[outcome]
                    store.step[site], store.history.reuses[site] = step, 0
        _keep_own(store, chosen)
        return tuple(chosen), tuple(why)

    def _take_or_compare(
        self, step: int, store: Store, name: str, lender: Store, chosen: list[Outcome], why: list[str]
    ) -> None:
        """Of what would be computed and ``lender`` has of this step, take what is close, and measure the rest."""
        history, may_take, may_learn = store.history, self._may_take[step], self._may_learn[step]
        comparing = []
        for site, outcome in enumerate(chosen):
            if outcome is Outcome.REUSE or lender.step[site] != step:
                continue
            if may_take[site] and self._is_close(history, site, name):
                chosen[site], why[site] = Outcome.REUSE, "shared"
                store.borrow(site, lender)
                history.reuses[site] = 0
                history.taken[site] = history.taken.get(site, 0) + 1
            elif may_learn[site]:
                chosen[site] = COMPARED[outcome]
                history.taken[site] = 0
                comparing.append(site)
        history.comparing, history.other, store.lender = comparing, name, lender

    def _is_close(self, history: History, site: int, name: str) -> bool:
        other, measured = history.differences.get(site, ("", None))
        if measured is None or other != name or history.taken.get(site, 0) >= self._sharing.refresh:
            return False
        return self._sharing.allows(measured)


def _settle(store: Store) -> list[int]:
    """Look after what is lent to ``store``: it is gone where the lender has stored anew (these sites are returned); of
    the rest, what the lender has measured is what there is to know."""
    lapsed = []
    for site in list(store.loans):
        if store.holds_loan(site):
            store.history.measured[site] = store.loans[site].lender.history.measured[site]
        else:
            store.give_back(site)
            store.step[site] = EMPTY
            lapsed.append(site)
    return lapsed


def _keep_own(store: Store, chosen: list[Outcome]) -> None:
    """What is stored goes into the store's own buffers; what was in these is not what is now compared with."""
    returned = [site for site in store.loans if chosen[site] in STORING]
    for site in returned:
        store.give_back(site)
    history = store.history
    if history.measuring:
        history.measuring = [
            (site, compared and site not in returned)
            for site, compared in history.measuring
            if chosen[site] is not Outcome.REUSE
        ]
