"""Measure a model: each site, then whole steps, in turn with ``torch.compile``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dqar_fx.calls import plain_call
from dqar_fx.compiled import isolation
from dqar_fx.config import CacheConfig
from dqar_fx.graph.lower import Lowerer
from dqar_fx.graph.sites import Site
from dqar_fx.graph.specialise import Outcome, Variant
from dqar_fx.plan import Plan
from dqar_fx.runtime.generation import StepTable
from dqar_fx.runtime.plans import Plans, reading_exact
from dqar_fx.runtime.program import Outcomes
from dqar_fx.schedule import Schedule
from dqar_fx.tuning.choice import SiteChoice
from dqar_fx.tuning.pieces import PieceCosts
from dqar_fx.tuning.probe import Probe
from dqar_fx.tuning.result import COMPILED, EAGER, NOTHING, READING, STEPS, SiteCost, Tuning
from dqar_fx.tuning.timing import Estimate, alternate


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is captured and compiled: arguments of ``optimize`` of the same names."""

    cache: CacheConfig
    backend: str | Callable[..., Any]
    mode: str | None
    options: Mapping[str, Any] | None
    dynamic: bool | None
    fullgraph: bool = False


def measure(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    schedule: Schedule | Plan,
    num_steps: int | None,
    settings: Settings,
    lowerer: Lowerer,
    variants: dict[object, Variant],
    rounds: int,
    baseline: bool,
    eager: bool = False,
    choose: bool = True,
    tell: Callable[[str], object] = lambda _: None,
) -> Tuning:
    """Time ``model`` on the inputs ``args`` and ``kwargs``, in the ambient grad, inference and autocast modes.

    Args:
        model, args, kwargs, lowerer, variants: see ``Probe``.
        schedule: what a generation does.
        num_steps: of the generation; None for the schedule's own number.
        settings: how it is compiled.
        rounds: how often each thing is timed.
        baseline: compile the model with ``torch.compile`` as well, and time that in turn.
        eager: time the eager model as well.
        choose: time the sites and drop those that do not pay.
        tell: is told what is going on.
    """
    tell("compiling")
    dynamic, fullgraph = settings.dynamic, settings.fullgraph
    with Probe(
        model, args, kwargs, cache=settings.cache, lowerer=lowerer, variants=variants, dynamic=dynamic,
        fullgraph=fullgraph,
    ) as probe:  # fmt: skip
        plan, device = schedule.plan(len(probe.sites), num_steps), probe.device
        costs: tuple[SiteCost, ...] = ()
        choice = SiteChoice(plan.num_sites)
        if choose and plan.reuse.any():
            costs = _site_costs(probe, _effective(plan, probe.sites, choice), rounds, device, tell)
            choice = SiteChoice(plan.num_sites, {c.index: c.reason for c in costs if not c.pays})
        effective = _effective(plan, probe.sites, choice)
        rows = Counter(StepTable(effective, 0, plan.num_sites).outcomes)
        nothing = (Outcome.COMPUTE,) * plan.num_sites
        reading = tuple(Outcome.REUSE if choice(site) else Outcome.COMPUTE for site in probe.sites)

        plain = plain_call(model)
        calls: dict[str, Callable[[], Any]] = {}
        if eager:
            calls[EAGER] = lambda: plain(*args, **kwargs)
        if baseline:
            tell("compiling with torch.compile")
            compiled = torch.compile(
                plain, backend=settings.backend, mode=settings.mode,
                options=dict(settings.options) if settings.options else None, dynamic=dynamic, fullgraph=fullgraph,
                **isolation(),
            )  # fmt: skip
            calls[COMPILED] = lambda: compiled(*args, **kwargs)
        told = {NOTHING: nothing, READING: reading, **{str(i): row for i, row in enumerate(rows)}}
        names = {row: name for name, row in reversed(told.items())}  # rows that are the same are timed once
        calls.update({name: _calling(probe, row) for row, name in names.items()})
        for call in (*calls.values(), *calls.values()):
            call()  # compiles what is new
        tell("timing whole steps")
        times = alternate(calls, rounds, device)
        measured = {**times, **{name: times[names[row]] for name, row in told.items()}}

        reference = COMPILED if baseline else NOTHING
        against = [plan.num_steps * ms for ms in measured[reference]]
        without = [plan.num_steps * ms for ms in measured[NOTHING]]
        own = [sum(n * measured[str(i)][r] for i, n in enumerate(rows.values())) for r in range(rounds)]
        gain = Estimate.of([w / o for w, o in zip(without, own, strict=True)])
        if choose and gain.high < 1:  # what is stored and read costs more than all sites together save
            why = f"reuse does not pay here (a generation is {gain.median:.2f}x as fast as with nothing reused)"
            choice = SiteChoice(plan.num_sites, {site.index: why for site in probe.sites} | dict(choice.left))
            effective, own = _effective(plan, probe.sites, choice), without
        return Tuning(
            model=type(model).__name__,
            schedule=plan.schedule or str(schedule),
            cache=str(settings.cache),
            num_steps=plan.num_steps,
            rounds=rounds,
            device=str(device),
            torch_version=torch.__version__,
            costs=costs,
            sites=choice,
            step_ms={name: Estimate.of(measured[name]) for name in STEPS if name in measured},
            schedule_ms=Estimate.of([ms / plan.num_steps for ms in own]),
            against=reference,
            speedup=Estimate.of([a / o for a, o in zip(against, own, strict=True)]),
            reuse_ratio=effective.reuse_ratio,
            rounding_error=_rounding(probe, choice),
            cache_bytes=sum(n for n, site in zip(probe.site_bytes, probe.sites, strict=True) if choice(site)),
        )


def _calling(probe: Probe, outcomes: Outcomes) -> Callable[[], Any]:
    return lambda: probe.run(outcomes)


def _rounding(probe: Probe, choice: SiteChoice) -> float:
    """How far the output is off when everything that is kept is read, stored by the same call."""

    def output(outcome: Outcome) -> torch.Tensor:
        result = probe.run(tuple(outcome if choice(site) else Outcome.COMPUTE for site in probe.sites))
        leaves = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        return torch.cat([leaf.detach().double().cpu().flatten() for leaf in leaves])

    fresh = output(Outcome.STORE)
    return float((output(Outcome.REUSE) - fresh).norm() / fresh.norm())


def _effective(plan: Plan, sites: Sequence[Site], choice: SiteChoice) -> Plan:
    """What a generation does: without the sites that were left, and reading at every step what is exact."""
    exact = [site.index for site in sites if site.lossless and choice(site)]
    return reading_exact(Plans(plan, choice).plan(plan.num_sites, None), exact)


def _site_costs(
    probe: Probe, plan: Plan, rounds: int, device: torch.device, tell: Callable[[str], object]
) -> tuple[SiteCost, ...]:
    """What each site costs and saves in a generation."""
    pieces = PieceCosts(probe, probe.site_bytes)
    tell("timing each site")
    times = pieces.measure(rounds, device)
    costs = []
    for site in probe.sites:
        i = site.index
        reads, stores = int(plan.reuse[:, i].sum()), int(plan.stores[:, i].sum())
        compute = [pieces.compute_ms(i, each) for each in times]
        read = [pieces.read_ms(i, each) for each in times]
        store = [pieces.store_ms(i, each) for each in times]
        saved = [reads * (c - r) - stores * s for c, r, s in zip(compute, read, store, strict=True)]
        costs.append(
            SiteCost(
                index=i, path=site.path, kind=site.kind, compute_ms=statistics.median(compute),
                read_ms=statistics.median(read), store_ms=statistics.median(store), reads=reads, stores=stores,
                saved_ms=Estimate.of(saved),
            )
        )  # fmt: skip
    return tuple(costs)
