"""Stored values that take turns in the same memory: a value is alive from its store to its last read, and not beyond.

Where a plan is known ahead, these intervals are too, so that memory can be given to values as registers are to
variables: the intervals in order of their beginning, each to memory that is free by then. That takes as much as is ever
alive at once, and no more (the left-edge algorithm for interval graphs: Hashimoto and Stevens, 1971).

Most schedules gain nothing, since all of their sites are alive at once; these are left as they are.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from dqar_fx.graph.specialise import Outcome
from dqar_fx.plan import Plan
from dqar_fx.runtime.cache import Store
from dqar_fx.runtime.clock import Tick
from dqar_fx.runtime.generation import NO_FACTS, Facts, StepTable
from dqar_fx.runtime.program import Outcomes

#: (first step, last step, site): the store of a value and its last read.
Interval = tuple[int, int, int]


def intervals(reuse: Sequence[Sequence[bool]]) -> list[Interval]:
    """When each value is alive, by the plan ``reuse``, ``[step][site]``; both ends are steps that need it."""
    found: list[Interval] = []
    for site in range(len(reuse[0])):
        stored = 0
        for step, row in enumerate(reuse):
            if not row[site]:
                stored = step
            elif step + 1 == len(reuse) or not reuse[step + 1][site]:
                found.append((stored, step, site))
    return sorted(found)


def places(alive: Sequence[Interval], kinds: Sequence[Hashable]) -> dict[Interval, int]:
    """A place in memory for each interval; two that overlap, or are of sites of other ``kinds``, never have the same.

    A site stays where it was if that is free. ``None`` is a kind that shares with nobody.
    """
    found: dict[Interval, int] = {}
    until: list[int] = []  # by place: the last step of who has it
    kind_of: list[Hashable] = []
    home: dict[int, int] = {}  # by site: where it was last
    for interval in sorted(alive, key=lambda i: (i[0], i[2])):
        first, last, site = interval
        kind = (site,) if kinds[site] is None else kinds[site]
        free = [p for p, end in enumerate(until) if end < first and kind_of[p] == kind]
        # Where one that comes after it at this step would like to stay, it goes last.
        waited_for = {home[s] for f, _, s in alive if f == first and s > site and s in home}
        place = home.get(site, -1)
        if place not in free:
            place = next((p for p in free if p not in waited_for), next(iter(free), len(until)))
        if place == len(until):
            until.append(last)
            kind_of.append(kind)
        until[place], home[site], found[interval] = last, place, place
    return found


def take_turns(plan: Plan, first: int, count: int) -> bool:
    """True if, of ``count`` sites from ``first`` on, fewer are ever alive at once than are stored at all."""
    alive = intervals(plan.reuse[:, first : first + count].tolist()) if count else []
    return len(set(places(alive, [0] * count).values())) < len({site for _, _, site in alive})


class TurnsTable(StepTable):
    """A table whose sites take turns in the store's memory, those that are laid out alike.

    When a site stores, the one that had its place before has nothing stored any more, so whatever a call does apart
    from the plan, nobody reads what another has written.
    """

    def __init__(self, plan: Plan, first: int, count: int, left: frozenset[int] = frozenset()) -> None:
        super().__init__(plan, first, count, left)
        self._alive = intervals(self.reuse)
        self._places: tuple[object, list[dict[int, int]]] = (None, [])  # for these specs

    def decide(
        self, tick: Tick, store: Store, empty_reason: str, facts: Facts = NO_FACTS
    ) -> tuple[Outcomes, tuple[str, ...]]:
        """As ``StepTable.decide``; then the sites that store move to where they belong."""
        outcomes, reasons = super().decide(tick, store, empty_reason, facts)
        if Outcome.STORE in outcomes and not store.on_host:
            places_now = self._places_for(store)[tick.step]
            store.move({s: places_now[s] for s, outcome in enumerate(outcomes) if outcome is Outcome.STORE})
        return outcomes, reasons

    def _places_for(self, store: Store) -> list[dict[int, int]]:
        """By step: where each value that is alive belongs, for exits as those of ``store``."""
        specs, found = self._places
        if specs is not store.specs:  # one graph's, at the same sizes, are one object
            kinds = [None if any(spec.is_special for spec in exits) else tuple(exits) for exits in store.specs]
            found = [{} for _ in range(self.num_steps)]
            for (begin, last, site), place in places(self._alive, kinds).items():
                for step in range(begin, last + 1):
                    found[step][site] = place
            self._places = store.specs, found
        return found


def step_table(plan: Plan, first: int, count: int, left: frozenset[int] = frozenset()) -> StepTable:
    """The table of ``plan`` for ``count`` sites from ``first`` on; ``left``: see ``StepTable``."""
    return (TurnsTable if take_turns(plan, first, count) else StepTable)(plan, first, count, left)
