"""The one mutable object of an optimised model: it tells each call which step it is and runs it accordingly."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import fx

from dqar_fx.calibration.binding import check_shapes
from dqar_fx.config import CacheConfig
from dqar_fx.errors import CaptureError, RuntimeStateError
from dqar_fx.gates import Gates
from dqar_fx.graph.capture import state_name
from dqar_fx.graph.guard import graph_diff
from dqar_fx.graph.keys_values import find_stored
from dqar_fx.graph.lossless import mark_lossless
from dqar_fx.graph.lower import Backend, Lowerer
from dqar_fx.graph.pays import nothing_pays, why_it_cannot_pay
from dqar_fx.graph.savings import NOTHING, Savings, savings
from dqar_fx.graph.sites import Region, Site
from dqar_fx.graph.specialise import Outcome, Variant
from dqar_fx.plan import Plan
from dqar_fx.runtime.cache import BufferPool
from dqar_fx.runtime.clock import Move, Tick
from dqar_fx.runtime.conditioning import Inputs
from dqar_fx.runtime.cuda_graphs import StepGraphs
from dqar_fx.runtime.entered import Entered, entered_by
from dqar_fx.runtime.gating import GatedTable, Gating
from dqar_fx.runtime.generation import NO_FACTS, Facts, Generation, StepTable
from dqar_fx.runtime.identity import SchedulerIdentity, read_timestep
from dqar_fx.runtime.lossless import constant_inputs
from dqar_fx.runtime.plans import Plans
from dqar_fx.runtime.program import CapturedGraph
from dqar_fx.runtime.report import GraphBreak, Report, Stats
from dqar_fx.runtime.sharing import SharingTable
from dqar_fx.runtime.timestep_values import Calendar
from dqar_fx.schedule import Schedule
from dqar_fx.shortcut.call import Shortcuts
from dqar_fx.tuning.choice import SiteChoice

SiteFilter = SiteChoice | Callable[[Site], bool] | str | Sequence[str] | None

#: Restarts in a row, each because of another conditioning, after which a loop is told why nothing is reused.
_RESTARTS = 3


@dataclass(slots=True)
class _Call:
    """One evaluation of the model: its step, and how many sites its graphs have run so far."""

    tick: Tick
    generation: Generation
    timestep: object = None
    sites: int = 0
    graphs: list[CapturedGraph] = field(default_factory=list)
    #: Sites of the whole call; None until the call has shown it (a model in several graphs, at its first call).
    total: int | None = None
    is_last: bool = False
    facts: Facts = NO_FACTS
    leaves_alone: bool = False  # a graph of it has no site, as none can pay


class _PerThread(threading.local):
    """What a thread has when it enters no generation of its own."""

    def __init__(self, pool: BufferPool) -> None:
        self.implicit = Generation(pool=pool)
        self.last: Generation | None = None
        self.call: _Call | None = None


class Runtime:
    """Everything about one optimised model that changes between calls, and what can be asked about it.

    Made by ``optimize`` (or by the backend); reached with ``dqar_fx.runtime(model)``.
    """

    def __init__(
        self,
        schedule: Schedule | Plan,
        cache: CacheConfig,
        scheduler: Any,
        sites: SiteFilter,
        backend: Backend,
        *,
        gates: Gates | None = None,
        dynamic: bool = False,
        step_graphs: StepGraphs | None = None,
    ) -> None:
        self.schedule = schedule
        self.cache = cache
        self.lowerer = Lowerer(backend, dynamic=dynamic)
        self._scheduler = SchedulerIdentity(scheduler) if scheduler is not None else None
        self._calendar = Calendar(self._scheduler) if self._scheduler is not None else None
        self._gating = Gating(gates, with_snr=scheduler is not None) if gates is not None else None
        self._filter = None if isinstance(sites, SiteChoice) else sites
        self._graphs: list[CapturedGraph] = []
        self._skipped: list[Site] = []
        self._breaks: list[GraphBreak] = []
        self._ends_in_break: list[bool] = []
        self.variants: dict[object, Variant] = {}
        #: The graphs of the fullest call of the last run, in the order in which they ran: the model, as it runs now.
        self._model: tuple[CapturedGraph, ...] = ()
        #: How many sites a call has that begins with this graph (of those that hold any).
        self._totals: dict[CapturedGraph, int] = {}
        self._plans = Plans(schedule, sites if isinstance(sites, SiteChoice) else None)
        #: What puts whole steps into CUDA graphs; None where that is off.
        self.step_graphs = step_graphs
        self.pool = BufferPool(keeps_all=cache.keep_buffers)
        self._threads = _PerThread(self.pool)
        self._lock = threading.RLock()
        self._restarts = 0
        self._leaves_alone = False  # a site that could be rewritten is not, as that cannot pay
        self._warned: set[str] = set()
        self.capture_seconds = 0.0
        #: Names of the model's parameters and buffers, where known: they tell its own frame from that of a part.
        self.state_names: frozenset[str] | None = None
        #: Calls past Dynamo's guards; None where nobody tells of the model's calls.
        self.shortcuts: Shortcuts | None = None
        #: Name of the forward's argument that holds the latents, "" where it is not known.
        self.latents = ""
        #: The options that the registered backend made this runtime from; held, so that their identity stays their own.
        self.origin: object = None

    # -- what a user calls ------------------------------------------------------------------------------------------

    def generation(
        self, num_steps: int | None = None, *, prompt_length: int | None = None
    ) -> AbstractContextManager[Runtime]:
        """``with rt.generation(50): ...``: everything inside is one sampling run of ``num_steps`` steps.

        All it stored is freed on leaving, however it is left. Generations nest, and each thread, asyncio task and
        generator has its own; what one stores no other ever reads. Rules plan themselves anew for ``num_steps``; a
        ``Plan`` must have been made for it. ``prompt_length``, in tokens, is for an ``EntropyGate``; without it, it is
        read off the mask of the text encoder, if the model takes one.

        Raises:
            RuntimeStateError: ``num_steps`` or ``prompt_length`` is not a positive number.
            PlanError, ScheduleError: the schedule cannot be planned for ``num_steps``.
        """
        if num_steps is not None and not _is_count(num_steps, 1):
            raise RuntimeStateError(
                f"generation(num_steps={num_steps!r}): give the number of steps, an int of at least 1."
            )
        if prompt_length is not None and not _is_count(prompt_length, 1):
            raise RuntimeStateError(
                f"generation(prompt_length={prompt_length!r}): give the number of tokens, an int of at least 1."
            )
        sites = self.schedule.num_sites if isinstance(self.schedule, Plan) else self._num_sites()
        if num_steps is not None and sites is not None:
            self._plans.plan(sites, num_steps)  # refused here, if it does not fit, and not in the middle of the run
        generation = Generation(num_steps=num_steps, prompt_length=prompt_length, explicit=True, pool=self.pool)
        return Entered(self, generation, self._left)

    def _left(self, generation: Generation) -> None:
        self._threads.last = generation

    def begin_step(self, step: int) -> None:
        """The calls from here to the next ``begin_step`` are step ``step`` (counted from 0) of this generation.

        Raises:
            RuntimeStateError: ``step`` is not an int, or negative.
        """
        if not _is_count(step, 0):
            raise RuntimeStateError(f"begin_step({step!r}): give the index of the step, an int that counts from 0.")
        self._generation().manual_step = step

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """The calls inside belong to branch ``name`` (sequential guidance: "cond", "uncond"), with its own cache."""
        generation = self._generation()
        before, generation.branch = generation.branch, name
        try:
            yield
        finally:
            generation.branch = before

    def follow(self, schedule: Schedule | Plan) -> None:
        """Decide by another schedule from here on; what is stored is forgotten, what is compiled stays.

        Raises:
            PlanError, ScheduleError: it cannot be planned for this model.
        """
        sites = self._num_sites()
        plans = Plans(schedule, self._plans.choice)
        if sites is not None:
            plans.plan(sites, None)
        self.reset()
        self.schedule, self._plans = schedule, plans

    @property
    def num_steps(self) -> int | None:
        """Steps of the generation that the calling code is in, where it or the scheduler says so."""
        return self._steps_of(self._generation())

    def choose(self, choice: SiteChoice) -> None:
        """Let only some sites reuse, as measured; before anything is captured, and once."""
        assert not self._graphs
        self._plans = Plans(self.schedule, choice)

    def reset(self) -> None:
        """Forget everything that the current generation of this thread has stored, and free it."""
        self._generation().free()
        self.pool.clear()
        if self.step_graphs is not None:
            self.step_graphs.forget()

    def end_generation(self) -> None:
        """The current run is over, as a pipeline says: its memory is free again, its statistics stay."""
        self._generation().end()

    def release(self) -> None:
        """Free everything and let go of the scheduler; what ``restore`` does to the runtime."""
        self.reset()
        if self.shortcuts is not None:
            self.shortcuts.clear()
        if self._scheduler is not None:
            self._scheduler.release()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that are rewritten, in the order in which they run; empty before the first call."""
        regions = [region for graph in self.graphs for region in graph.regions]
        return tuple(replace(region.site, index=index) for index, region in enumerate(regions))

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        """The graphs of the fullest call of the last run; those captured so far, while the first is running."""
        return self._model or tuple(self._graphs)

    @property
    def only_graph(self) -> CapturedGraph | None:
        """The graph that the present call of this thread has run, where it has run one with sites; None otherwise."""
        call = self._threads.call
        return call.graphs[0] if call is not None and len(call.graphs) == 1 else None

    @property
    def plan(self) -> Plan | None:
        """The plan in force for the current generation; None before the first call (the number of sites is unknown)."""
        sites = self._num_sites()
        return None if sites is None else self._plans.plan(sites, self.num_steps)

    @property
    def needs_dynamic_operators(self) -> bool:
        """True if a graph holds an operator whose result has a size that is known only when it runs, or a break."""
        return bool(self._breaks) or any(graph.has_late_sizes for graph in self._graphs)

    @property
    def stats(self) -> Stats:
        """Counts of the current (or last) generation of this thread, and of what has been compiled so far."""
        generation = self._generation()
        if not generation.log and self._threads.last is not None and self._threads.last.log:
            generation = self._threads.last
        return Stats(
            decisions=tuple(generation.decisions()),
            cache_bytes=generation.cache_bytes,
            captures=len(self._graphs),
            graph_breaks=len(self._breaks),
            variants=self.lowerer.count,
            compile_seconds=self.lowerer.seconds + self.capture_seconds,
            measurements=tuple(generation.measurements()),
            cuda_graphs=self.step_graphs.counts if self.step_graphs is not None else None,
            shortcuts=self.shortcuts.taken if self.shortcuts is not None else 0,
        )

    def report(self) -> Report:
        """What was captured, rewritten, left alone, planned and stored. ``print`` it, or take ``.to_dict()``."""
        return Report(
            schedule=str(self.schedule),
            cache=str(self.cache),
            sites=self.sites,
            skipped=tuple(self._skipped),
            breaks=tuple(self._breaks),
            pieces=tuple(len(g.pieces) for g in self._graphs),
            plan=self.plan,
            site_bytes=self._generation().site_bytes(),
            stats=self.stats,
            repeats=self._generation().repeats,
            uncompiled=self.lowerer.uncompiled,
            gates=str(self._gating) if self._gating is not None else "",
            unmeasured=self._unmeasured(),
            unbalanced=tuple(
                (graph.regions[site].site.path, why) for graph in self.graphs for site, why in graph.unbalanced.items()
            ),
            unshared=self._unshared(),
            hoisted=self._savings(),
            hoisted_bytes=self._generation().kept_bytes,
            timed=next((graph.timed for graph in self.graphs if graph.timed is not None and self._reuses), None),
            timed_bytes=self._generation().row_bytes,
            left=tuple((self.sites[site], why) for site, why in self._idle().items()),
            guarded=tuple(dict.fromkeys(self.shortcuts.reasons.values())) if self.shortcuts is not None else (),
        )

    @property
    def _reuses(self) -> bool:
        """False for a baseline, which computes everything at every step."""
        plan = self.plan
        return plan is not None and bool(plan.reuse.any())

    def _savings(self) -> Savings:
        """What computing once saves, if the schedule lets it."""
        if not self._reuses:
            return NOTHING
        # Only a model that is one graph hoists.
        hoisted = next((graph.hoisted for graph in self.graphs if graph.hoisted is not None), None)
        return savings(hoisted) if hoisted is not None else NOTHING

    def _idle(self) -> Mapping[int, str]:
        """The sites that were measured not to pay, and why."""
        choice = self._plans.choice
        return choice.left if choice is not None and choice.num_sites == len(self.sites) else {}

    def _unmeasured(self) -> tuple[str, ...]:
        """Paths of the sites whose entropy a gate asks for and nothing can tell."""
        if self._gating is None or not any(name.startswith("entropy") for name in self._gating.measures):
            return ()
        tell = [site in graph.measurable for graph in self.graphs for site in range(graph.num_sites)]
        return tuple(
            site.path or str(site.index)
            for site, can in zip(self.sites, tell, strict=True)
            if not (can or site.lossless)
        )

    def _unshared(self) -> str:
        """Why branches could share nothing, where they should."""
        if self._gating is None or self._gating.gates.cross_branch is None:
            return ""
        if self.cache.device == "cpu":
            return "what is stored in host memory is not shared"
        stats = self.stats
        if len({d.branch for d in stats.decisions}) == 1:
            return "only one branch was called, and guidance in one call is one branch"
        if stats.decisions and all(math.isnan(measured.difference) for measured in stats.measurements):
            return (
                "none were compared so far. That takes the same shapes, the same latents (outside of `generation`, in "
                "the same memory), and a step that stores"
            )
        return ""

    def diff(self) -> str:
        """Every captured graph before and after the guards were put in, as a unified diff."""
        return "\n".join(
            graph_diff(graph.captured, graph.guarded, f"graph {i}") for i, graph in enumerate(self._graphs)
        )

    # -- what the backend calls -------------------------------------------------------------------------------------

    def capture(self, gm: fx.GraphModule) -> CapturedGraph:
        """Take in a graph from Dynamo: find its sites, guard them, cut it into pieces.

        Raises:
            CaptureError: the whole model is one graph and has no attention, or the site filter leaves none.
            PlanError: the plan was made for another number of sites.
        """
        found = find_stored(gm, self.cache.target)
        reason = getattr(gm, "compile_subgraph_reason", None)
        broke = reason is not None and reason.graph_break
        with self._lock:
            whole = not broke and not self._breaks and self._is_root(gm)
            skipped: list[Site] = []
            regions: list[Region] = []
            for region, unpaid in zip(found, self._unpaid(gm, found), strict=True):
                site = region.site
                if not site.reason and not self._wanted(site):
                    site = replace(site, reason="not selected by `sites`")
                if not site.reason and unpaid:
                    site = replace(site, reason=unpaid)
                    self._leaves_alone = True
                if site.reason:
                    skipped.append(site)
                else:
                    regions.append(replace(region, site=replace(site, index=len(regions))))
            constant = None
            if whole and self.cache.lossless:
                constant = partial(constant_inputs, latents=self.latents)
                regions = mark_lossless(gm, regions, constant)
                left = self._plans.left(len(regions))  # these are not read, exact or not
                regions = [
                    replace(r, site=replace(r.site, lossless=False)) if i in left else r for i, r in enumerate(regions)
                ]
            if whole and not regions and self._leaves_alone:
                self._warn_once("pays", nothing_pays(skipped))  # here, as the registered backend sees no call's end
            elif whole and not regions and not self._graphs:
                raise CaptureError(self._nothing_found(found))
            elif whole and not self._graphs:
                self._plans.check(len(regions))  # a plan for another number of sites is refused before any compile
                if isinstance(self.schedule, Plan):
                    check_shapes(self.schedule, [region.site for region in regions])
            measures = self._gating.measures if self._gating is not None else frozenset[str]()
            compares = self._gating is not None and self._gating.gates.cross_branch is not None
            num_steps = self._steps_ahead() if constant is not None else 0
            graph = CapturedGraph(
                gm, regions, self.cache, self.lowerer, self.variants, measures, compares=compares, constant=constant,
                calendar=self._calendar if num_steps else None, num_steps=num_steps,
            )  # fmt: skip
            if self.step_graphs is not None:
                graph.runner = self.step_graphs.take(graph, self.latents, on_host=self.cache.device == "cpu")
                self.pool.users = self.step_graphs
            self._skipped += [site for site in skipped if site not in self._skipped]
            if whole and (regions or not self._leaves_alone):
                self._totals[graph] = len(regions)
            if broke:
                self._breaks.append(GraphBreak.of(reason))
            self._ends_in_break.append(broke)
            self._graphs.append(graph)
        return graph

    def _steps_ahead(self) -> int:
        """How many steps a run has, where their timesteps can be told from that of the call that runs; 0 if not.

        Not for backends that compute as torch does, where all steps at once would differ in the last bit, nor with
        whole steps in CUDA graphs, whose inputs stay where they are.
        """
        call = self._threads.call
        if self._calendar is None or call is None:
            return 0
        if self.step_graphs is not None or not self.lowerer.rounds_differently:
            return 0
        ahead = self._calendar.find(call.timestep)
        return len(ahead.timesteps) if ahead is not None else 0

    def _unpaid(self, gm: fx.GraphModule, regions: Sequence[Region]) -> list[str]:
        """Why each site is left alone although it could be rewritten, "" where it is not.

        Whoever names sites, or has a plan for them, has decided.
        """
        if self._filter is not None or isinstance(self.schedule, Plan):
            return [""] * len(regions)
        return why_it_cannot_pay(gm, regions, self.cache)

    def _is_root(self, gm: fx.GraphModule) -> bool:
        """True if ``gm`` is of the model's own forward, False if of a part: where a frame breaks in a loop, Dynamo runs
        it eagerly and captures what it calls, one frame after the other, and none of these ends in a break."""
        if self.state_names is None:
            return True
        names = {state_name(n) for n in gm.graph.nodes if n.op == "placeholder"} - {""}
        return bool(names) and names <= self.state_names

    def after_break(self, graph: CapturedGraph) -> bool:
        """True if ``graph`` was captured right after one that ended in a break, so that it belongs to the same call."""
        index = self._graphs.index(graph)
        return index > 0 and self._ends_in_break[index - 1]

    def forget_captures(self) -> None:
        """The call begins once more, and captures anew: what was captured so far is not the model."""
        with self._lock:
            for captured in (self._graphs, self._breaks, self._ends_in_break, self._skipped, self._totals):
                captured.clear()
        call = self._threads.call
        if call is not None:
            self._threads.call = _Call(call.tick, call.generation, call.timestep, facts=call.facts)
            call.generation.log.clear()

    def begin_call(self, timestep: object, inputs: Inputs) -> None:
        """A call of the model begins, at ``timestep`` (tensor, number or None), conditioned on ``inputs``."""
        threads = self._threads
        if threads.call is not None and threads.call.sites:
            self._complete(threads.call)  # nobody said that it had ended (the registered backend is not told)
        generation = self._generation()
        tick = self._identify(generation, timestep, inputs)
        generation.begin_call(tick)
        call = threads.call = _Call(tick, generation, timestep)
        threads.last = generation
        if self._gating is not None:
            call.facts = self._gating.facts(generation, tick, inputs, self._scheduler)

    def end_call(self) -> None:
        """The call has returned: its graphs together are the whole model."""
        call, self._threads.call = self._threads.call, None
        if call is None:
            return
        if call.sites:
            self._complete(call)
        elif call.leaves_alone:
            if not self._totals:
                self._warn_once("pays", nothing_pays(self._skipped))
        elif self._graphs and not self._totals:
            raise CaptureError(self._nothing_found([]))
        else:
            self._warn_once(
                "eager",
                "the model ran eager, without its compiled graphs: every attention computed. Dynamo stepped aside, "
                "because it is disabled here, or a dispatch mode is active, or its recompile limit was reached "
                f"({len(self._graphs)} captures of this model so far). For the last, raise "
                "torch._dynamo.config.recompile_limit before `optimize`, or pass dynamic=True if shapes keep changing; "
                "fullgraph=True shows Dynamo's own error.",
            )

    def _complete(self, call: _Call) -> None:
        """All graphs of a call have run: together they are the model."""
        if call.total != call.sites:
            self._totals[call.graphs[0]] = call.sites
            if len(self._totals) == 1:
                self._plans.check(call.sites)  # a plan for another number of sites is refused after the first call
            call.total = call.sites
        if call.tick.move is Move.START or call.sites >= (self._num_sites() or 0):
            self._model = tuple(call.graphs)  # not a later call of the run that leaves attentions out
        if call.is_last:
            call.generation.end_branch()

    def abort_call(self) -> None:
        """The call raised: what it has stored may be half written, so the generation starts anew."""
        call, self._threads.call = self._threads.call, None
        if call is not None:
            call.generation.free()

    def run(self, graph: CapturedGraph, arguments: Sequence[Any]) -> list[Any]:
        """Run one captured graph of the current call under this step's decisions."""
        call = self._threads.call
        if call is None:  # a graph that runs outside of any call we were told of: nothing is known, so compute
            call = _Call(Tick(-1, Move.UNKNOWN), self._generation())
        if not graph.num_sites:
            call.leaves_alone = self._leaves_alone
            if not self._totals and not call.sites and not call.leaves_alone:
                # No attention so far: before it is compiled, the call shows whether there is any.
                return list(graph.captured.forward(*arguments))
            return (graph.runner or graph).run(arguments, (), None, graph.sizes_of(arguments))
        generation, tick, first = call.generation, call.tick, call.sites
        if not call.graphs:
            call.total = self._totals.get(graph)
        call.graphs.append(graph)
        call.sites = first + graph.num_sites
        table = self._table(generation, graph, first, call.total)
        # A schedule that reuses nothing is a baseline: it computes these too.
        hoisting = graph.hoisting if table is not None and table.reuses else None
        kept = None
        # What stores nothing and reads nothing need not know of the weights: reading hundreds of counters takes time.
        uses_store = table is None or (0 <= tick.step < table.num_steps and table.uses_store[tick.step])
        if uses_store and not generation.check_weights(graph, first, arguments) and tick.step >= 0:
            tick = Tick(tick.step, Move.DOUBT)
        sizes = graph.sizes_of(arguments)
        store, empty_reason = generation.store_for(graph, first, sizes)
        if table is None:  # the first call of a model in several graphs: how many sites follow is not known yet
            store.give_all_back()
            outcomes = (Outcome.STORE if tick.step >= 0 else Outcome.COMPUTE,) * graph.num_sites
            store.step = [tick.step] * graph.num_sites if tick.step >= 0 else store.step
            reasons: tuple[str, ...] = ("warmup",) * graph.num_sites
        else:
            if hoisting is not None:
                kept = hoisting.look(tick, store, arguments)
            outcomes, reasons = table.decide(tick, store, tick.reason or empty_reason, call.facts)
            call.is_last = tick.step >= table.num_steps - 1
            if hoisting is not None and kept is not None:
                outcomes, reasons = hoisting.decide(kept, store, outcomes, reasons)
            if tick.step >= table.num_steps:
                self._warn_once(
                    "steps",
                    f"step {tick.step} was reached, but the schedule was planned for {table.num_steps} steps: from "
                    f"here on every attention computes. Plan for the steps that run: Schedule(...num_steps=...), "
                    f"generation(num_steps=...), or optimize(..., scheduler=pipe.scheduler).",
                )
        generation.log.append((tick.step, generation.branch, first, outcomes, reasons))
        try:
            result = (graph.runner or graph).run(arguments, outcomes, store, sizes, kept)
        except BaseException:
            generation.free()
            raise
        if hoisting is not None and kept is not None and kept is not store.kept:
            hoisting.keep(kept, tick, store, is_last=call.is_last)
        if self._gating is not None:
            store.history.read_back(tick.step)
        if call.sites == call.total:
            self._complete(call)
        return result

    # -- inside -----------------------------------------------------------------------------------------------------

    def _generation(self) -> Generation:
        """The generation that the calling code is in."""
        return entered_by(self) or self._threads.implicit

    def _identify(self, generation: Generation, timestep: object, inputs: Inputs) -> Tick:
        clock, branch = generation.clock, generation.branch
        position = None
        if generation.manual_step is None and self._scheduler is not None:
            position = self._scheduler.position(timestep)
        if generation.manual_step is not None:
            tick = clock.at_step(generation.manual_step, branch)
        elif position is not None and self._scheduler is not None:
            tick = clock.at_step(position, branch, calendar=self._scheduler.calendar)
        else:
            tick = clock.at_timestep(read_timestep(timestep), branch)
        moves_on = tick.move is Move.NEXT
        differing = generation.conditioning.differing(branch, inputs) if self._restarts == _RESTARTS else []
        tick = generation.judge(tick, inputs, scheduled=position is not None)
        if moves_on:
            self._restarts = self._restarts + 1 if tick.move is Move.START else 0
            if self._restarts > _RESTARTS:
                self._warn_once(
                    "conditioning",
                    f"the inputs {', '.join(differing)} were new tensors at each of the last {self._restarts} steps. "
                    f"That tells one generation from another, so nothing is reused. If these calls are one run, hand "
                    f"over the same tensors at every step, or say so: `with dqar_fx.runtime(model).generation(): ...`.",
                )
        return tick

    def _steps_of(self, generation: Generation) -> int | None:
        if generation.num_steps is not None:
            return generation.num_steps
        return self._scheduler.num_steps if self._scheduler is not None else None

    def _num_sites(self) -> int | None:
        """Sites of the last completed call; None before there is one."""
        if self._model:
            return sum(graph.num_sites for graph in self._model)
        return next(iter(self._totals.values()), None)

    def _table(
        self, generation: Generation, graph: CapturedGraph, first: int, total: int | None
    ) -> StepTable | GatedTable | SharingTable | None:
        """What decides for ``graph``, whose first site has number ``first``, in a call that has ``total`` sites."""
        count = graph.num_sites
        if total is None or first + count > total:
            return None
        table = self._plans.table(total, self._steps_of(generation), first, count, or_none=bool(self._model))
        return table if self._gating is None else self._gating.table(table, graph, first, total)

    def _wanted(self, site: Site) -> bool:
        if self._filter is None:
            return True
        if callable(self._filter):
            return bool(self._filter(site))
        patterns = [self._filter] if isinstance(self._filter, str) else self._filter
        return any(fnmatchcase(site.path, pattern) for pattern in patterns)

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=5)

    def _nothing_found(self, found: Sequence[Region]) -> str:
        if not found:
            return (
                "no attention was found: the captured graph calls an attention operator such as "
                "torch.nn.functional.scaled_dot_product_attention nowhere, and no module that is called an attention "
                "multiplies activations. `dqar-fx explain` shows what a model has."
            )
        listed = "; ".join(f"{r.site.path or r.site.exits[:1]}: {r.site.reason or 'not selected'}" for r in found[:5])
        return f"none of the {len(found)} attentions can be rewritten or was selected by `sites` ({listed})."


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
