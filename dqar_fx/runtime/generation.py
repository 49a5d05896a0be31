"""The state of one sampling run: its clock, what it has stored, what was decided."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dqar_fx.graph.specialise import Outcome
from dqar_fx.plan import Plan
from dqar_fx.runtime.cache import EMPTY, BufferPool, Store
from dqar_fx.runtime.clock import NEW_GENERATION, Clock, Move, Tick
from dqar_fx.runtime.conditioning import Conditioning, Inputs, Relation, identical, same_memory, version, versions_of
from dqar_fx.runtime.decisions import Decision, Measured
from dqar_fx.runtime.latents import LatentNorms
from dqar_fx.runtime.program import CapturedGraph, Outcomes
from dqar_fx.runtime.prompt import Prompt

#: Calls whose decisions are remembered; a loop whose steps cannot be told apart is one endless generation.
LOGGED_CALLS = 8192


@dataclass(frozen=True, slots=True)
class Facts:
    """What gates are told of a step: its signal-to-noise ratio, the prompt's tokens, the norm of the latents, and
    (where branches share) the generation it is of."""

    snr: float = math.nan
    prompt_length: int | None = None
    latent_norm: float = math.nan
    generation: Generation | None = None


NO_FACTS = Facts()


class StepTable:
    """A plan, cut to the sites of one graph, in the form that a call needs: no arithmetic is left for it.

    ``left`` are those of these sites that compute at every step and store nothing, for other branches either.
    """

    def __init__(self, plan: Plan, first: int, count: int, left: frozenset[int] = frozenset()) -> None:
        steps = range(plan.num_steps)
        sites = range(first, first + count)
        self.num_steps = plan.num_steps
        self.count = count
        self.left = left
        self.reuse = [[bool(plan.reuse[t, s]) for s in sites] for t in steps]
        self.age = [[int(plan.age[t, s]) for s in sites] for t in steps]
        self.reason = [tuple(plan.reason(t, s) for s in sites) for t in steps]
        self.outcomes: list[Outcomes] = [
            tuple(
                Outcome.REUSE
                if plan.reuse[t, s]
                else Outcome.STORE
                if self._read_next(t, s - first)
                else Outcome.COMPUTE
                for s in sites
            )
            for t in steps
        ]
        #: Whether any site reuses at any step.
        self.reuses = any(map(any, self.reuse))
        #: Whether any site reads or writes its stored value.
        self.uses_store = [any(o is not Outcome.COMPUTE for o in done) for done in self.outcomes]
        # What an undisturbed generation has stored before each step: if it is so, the plan is followed to the letter.
        self.before: list[list[int]] = [[EMPTY] * count]
        for t in steps:
            done = self.outcomes[t]
            self.before.append([t if o is Outcome.STORE else b for o, b in zip(done, self.before[-1], strict=True)])

    def _read_next(self, step: int, site: int) -> bool:
        return step + 1 < self.num_steps and self.reuse[step + 1][site]

    def decide(
        self, tick: Tick, store: Store, empty_reason: str, facts: Facts = NO_FACTS
    ) -> tuple[Outcomes, tuple[str, ...]]:
        """The outcome and its reason for every site, and what will be stored, noted in ``store``."""
        del facts  # a plan is what it is
        step = tick.step
        if tick.move is Move.UNKNOWN or step >= self.num_steps:
            reason = NEW_GENERATION if tick.move is Move.UNKNOWN else "schedule"
            return (Outcome.COMPUTE,) * self.count, (reason,) * self.count
        if tick.move is Move.REPEAT:
            why = (NEW_GENERATION if reuse else r for reuse, r in zip(self.reuse[step], self.reason[step], strict=True))
            return (Outcome.COMPUTE,) * self.count, tuple(why)
        if store.step == self.before[step]:
            store.step = self.before[step + 1].copy()
            return self.outcomes[step], self.reason[step]
        outcomes, reasons = [], []
        for site in range(self.count):
            reason = self.reason[step][site]
            outcome = Outcome.COMPUTE
            if self.reuse[step][site]:
                source = store.step[site]
                if source == EMPTY:
                    reason = empty_reason
                elif step - self.age[step][site] <= source < step:
                    outcome = Outcome.REUSE
                else:
                    reason = "stale"
            if outcome is Outcome.COMPUTE and self._read_next(step, site):
                outcome = Outcome.STORE
                store.step[site] = step
            outcomes.append(outcome)
            reasons.append(reason)
        return tuple(outcomes), tuple(reasons)


@dataclass(slots=True)
class _Stored:
    graph: CapturedGraph
    sizes: tuple[object, ...]
    store: Store


@dataclass(slots=True, eq=False)
class Generation:
    """One sampling run of one model. Everything that changes between its steps is here, and nowhere else."""

    num_steps: int | None = None  # as given by hand
    prompt_length: int | None = None  # as given by hand
    prompt: Prompt | None = None  # as read off the encoder's mask
    latents: LatentNorms | None = None  # for a policy
    explicit: bool = False  # delimited by the caller: what runs inside belongs together, whatever it is conditioned on
    is_shared: bool = False  # ... unless calls from elsewhere may have come in
    clock: Clock = field(default_factory=Clock)
    conditioning: Conditioning = field(default_factory=Conditioning)
    pool: BufferPool | None = None  # where stores go that are to outlive this generation
    branch: str = ""
    manual_step: int | None = None
    repeats: int = 0  # calls that came at a step and in a branch that had been called already
    log: deque[tuple[int, str, int, Outcomes, tuple[str, ...]]] = field(
        default_factory=lambda: deque(maxlen=LOGGED_CALLS)
    )
    _stores: dict[tuple[str, int], _Stored] = field(default_factory=dict)
    _weights: dict[tuple[int, int], tuple[Sequence[torch.Tensor], list[int]]] = field(default_factory=dict)
    shares: bool = False  # a branch may take what another one stored at the same step
    _first: tuple[str, object, int] | None = None  # of this step: its first branch, its latents and their version
    _lender: str = ""  # the branch that the present call may take from; itself if there is none
    _ended: set[str] = field(default_factory=set)  # the branches that have done their last planned step

    def judge(self, tick: Tick, inputs: Inputs, *, scheduled: bool = False) -> Tick:
        """``tick`` if, by its conditioning ``inputs``, the call may belong to those before it; otherwise a start.

        Where the caller says what belongs together (``generation``, ``begin_step``), that is believed. Where a
        scheduler says which step it is (``scheduled``), a run that begins anew has other timesteps, so a repeat is one.
        """
        if tick.move is Move.UNKNOWN:
            return tick
        repeated = tick.move is Move.REPEAT
        self.repeats += repeated
        told = (self.explicit or self.manual_step is not None) and not self.is_shared
        if tick.move is Move.START:
            self.conditioning.clear()
        elif not told and not (repeated and scheduled):
            relation = self.conditioning.relation(self.branch, inputs)
            same = (Relation.FIRST, Relation.LAST, *((Relation.EARLIER, Relation.EQUAL) if repeated else ()))
            if relation not in same:
                tick = self.clock.doubt(tick, self.branch, relation)
            if tick.move is Move.START:
                self.conditioning.clear()
        self.conditioning.note(self.branch, inputs, repeated=repeated)
        return tick

    def note_call(self, tick: Tick, inputs: Inputs) -> None:
        """Find out whether the call of ``tick`` may take what the first call of its step has stored.

        It may where nothing is in doubt: no call at this step was repeated, or made the clock doubt what it belongs to;
        and, unless the caller says what belongs together, both were given the same latents, in the same memory. What
        tells one run from another for a single branch, its conditioning, tells nothing of two.
        """
        self.shares = True
        latents, self._lender = inputs.latents, self.branch
        written = version(latents) if isinstance(latents, torch.Tensor) else -1
        if tick.move in (Move.START, Move.NEXT):
            self._first = self.branch, latents, written
        elif tick.move is not Move.SAME:
            self._first = None
        elif self._first is not None:
            branch, before, version_before = self._first
            told = (self.explicit or self.manual_step is not None) and not self.is_shared
            if not told:
                if not isinstance(before, torch.Tensor) or not isinstance(latents, torch.Tensor):
                    return
                if version_before != written or not same_memory(before, latents):
                    return
            self._lender = branch

    def lending(self, first: int) -> tuple[str, Store] | None:
        """The branch that the present call may take from, and what that has stored for the graph whose first site is
        ``first``; None where there is nothing of the same graph and sizes."""
        mine, theirs = self._stores[self.branch, first], self._stores.get((self._lender, first))
        if theirs is None or theirs is mine or theirs.graph is not mine.graph or theirs.sizes != mine.sizes:
            return None
        return self._lender, theirs.store

    def has_others(self, first: int) -> bool:
        """True if another branch has run the graph whose first site is ``first`` as well."""
        return any(branch != self.branch and site == first for branch, site in self._stores)

    def begin_call(self, tick: Tick) -> None:
        """Forget what this call must not read: everything at the start of a generation, or what its branch has."""
        if tick.move is Move.START:
            self._drop()
            self.log.clear()
            self.repeats = 0
        elif tick.move in (Move.DOUBT, Move.REPEAT, Move.UNKNOWN):
            for (branch, _), stored in self._stores.items():
                if branch == self.branch:
                    stored.store.clear()

    def store_for(self, graph: CapturedGraph, first: int, sizes: tuple[object, ...]) -> tuple[Store, str]:
        """The store of a graph whose first site has number ``first``, and the reason to give where it is empty."""
        stored = self._stores.get((self.branch, first))
        if stored is not None and stored.graph is graph and stored.sizes == sizes:
            return stored.store, "empty"
        reason = "empty" if stored is None or stored.store.is_empty else "shape"
        store = (self.pool and self.pool.take((graph, sizes))) or Store(graph.specs(sizes))
        self._stores[self.branch, first] = _Stored(graph, sizes, store)
        return store, reason

    def check_weights(self, graph: CapturedGraph, first: int, arguments: Sequence[object]) -> bool:
        """False, once, if a parameter was replaced or written into since the last call; stored values are dropped.

        ``first`` tells the runs of one graph within a call apart: equal blocks may share it, each with its own weights.
        """
        tensors = graph.parameters_of(arguments)
        versions = versions_of(tensors)
        key = (id(graph), first)
        known = self._weights.get(key)
        same = known is None or (versions == known[1] and identical(tensors, known[0]))
        if not same:
            self.invalidate()
        if known is None or not same:
            self._weights[key] = (tensors, versions)
        return same

    def invalidate(self) -> None:
        """Forget every stored value; buffers keep their addresses. For what happens within a generation."""
        for stored in self._stores.values():
            stored.store.clear()
        self._weights.clear()

    def free(self) -> None:
        """Forget everything stored and free it (or hand it to the pool); the next call starts anew."""
        self._drop()
        self._forget()

    def end_branch(self) -> None:
        """The last planned step of this branch is done: nothing of it will be read again (by others, once they are)."""
        ended = {self.branch}
        if self.shares:
            self._ended |= ended
            ended = self._ended if self._ended >= {branch for branch, _ in self._stores} else set()
        for (branch, _), stored in self._stores.items():
            if branch in ended:
                self._finish(stored.store)

    def end(self) -> None:
        """The run is over: as ``free``, but what it stored can still be asked for in bytes."""
        for stored in self._stores.values():
            self._finish(stored.store)
        self._forget()

    def _finish(self, store: Store) -> None:
        if self.pool is not None and self.pool.keeps:
            store.clear()
        else:
            store.release()

    def _drop(self) -> None:
        if self.pool is not None and self.pool.keeps:
            self.pool.give([((stored.graph, stored.sizes), stored.store) for stored in self._stores.values()])
        elif self.shares:
            for stored in self._stores.values():
                stored.store.give_all_back()  # stores that know each other would wait for the garbage collector
        self._stores.clear()
        self._weights.clear()
        self._ended.clear()

    def _forget(self) -> None:
        self.prompt = None
        self._first = None
        self.latents = None
        self._weights.clear()
        self.conditioning.clear()
        self.clock.clear()
        self.manual_step = None

    @property
    def cache_bytes(self) -> int:
        """Bytes stored, over all branches and graphs; of a run that has ended, what it had stored."""
        return sum(stored.store.bytes for stored in self._stores.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is computed once, over all branches; of a run that has ended, what they were."""
        return sum(stored.store.kept_bytes for stored in self._stores.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of what is computed for all steps at once, in the same way."""
        return sum(stored.store.row_bytes for stored in self._stores.values())

    def site_bytes(self) -> dict[int, int]:
        """Bytes stored for each site, over all branches."""
        found: dict[int, int] = {}
        for (_, first), stored in self._stores.items():
            for site in range(stored.graph.num_sites):
                found[first + site] = found.get(first + site, 0) + stored.store.site_bytes(site)
        return found

    def decisions(self) -> list[Decision]:
        """Every decision so far, in order."""
        return [
            Decision(step, branch, first + i, "reuse" if outcome is Outcome.REUSE else "compute", reason)
            for step, branch, first, outcomes, reasons in self.log
            for i, (outcome, reason) in enumerate(zip(outcomes, reasons, strict=True))
        ]

    def measurements(self) -> list[Measured]:
        """Everything measured so far, by branch and step; waits for what is still on its way."""
        return [
            Measured(step, branch, first + site, found.entropy, found.change, found.difference)
            for (branch, first), stored in self._stores.items()
            for step, site, found in stored.store.history.seen()
        ]
