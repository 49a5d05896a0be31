"""The schedule of one model, planned for as many sites and steps as its calls turn out to have."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import numpy as np

from dqar_fx.errors import DqarError
from dqar_fx.plan import Plan
from dqar_fx.runtime.generation import StepTable
from dqar_fx.runtime.lifetimes import step_table
from dqar_fx.schedule import Schedule
from dqar_fx.tuning.choice import SiteChoice


class Plans:
    """Plans, and the tables that calls are decided by, each made once.

    Args:
        schedule: the rule, or the one plan there is.
        choice: the sites that compute at every step, whatever the schedule says; None for none.
    """

    def __init__(self, schedule: Schedule | Plan, choice: SiteChoice | None = None) -> None:
        self.schedule = schedule
        self.choice = choice
        self._plans: dict[tuple[int, int | None], Plan] = {}
        self._tables: dict[tuple[int, int | None, int, int], StepTable] = {}

    def plan(self, num_sites: int, num_steps: int | None) -> Plan:
        """The schedule for ``num_sites`` sites and ``num_steps`` steps (None: as many as it was made for).

        Raises:
            PlanError, ScheduleError: it cannot be planned so.
        """
        plan = self._plans.get((num_sites, num_steps))
        if plan is None:
            plan = self.schedule.plan(num_sites, num_steps)
            plan = self._plans[num_sites, num_steps] = _without(plan, self.left(num_sites))
        return plan

    def check(self, num_sites: int) -> None:
        """Refuse a model that what was given does not fit.

        Raises:
            PlanError, ScheduleError: the schedule cannot be planned for as many sites.
            TuningError: the choice of sites was made for another number of them.
        """
        if self.choice is not None:
            self.choice.check(num_sites)
        self.plan(num_sites, None)

    def left(self, num_sites: int) -> Collection[int]:
        """The sites of a call with ``num_sites`` that always compute. (Of a call that leaves attentions out it is not
        known which: there, none. That costs time, if anything.)"""
        if self.choice is None or num_sites != self.choice.num_sites:
            return ()
        return self.choice.left.keys()

    def table(self, num_sites: int, num_steps: int | None, first: int, count: int, *, or_none: bool) -> StepTable:
        """The plan, cut to the sites ``first`` to ``first + count``.

        With ``or_none``, a plan that reuses nothing where it cannot be planned: a model may leave attentions out at
        some calls (skip-layer guidance), and these compute.
        """
        key = (num_sites, num_steps, first, count)
        table = self._tables.get(key)
        if table is None:
            try:
                plan = self.plan(num_sites, num_steps)
            except DqarError as error:
                if not or_none:
                    raise
                warnings.warn(f"calls of the model with {num_sites} attentions compute: {error}", stacklevel=6)
                plan = Schedule.none(num_steps or self.schedule.num_steps).plan(num_sites)
                self._plans[num_sites, num_steps] = plan
            left = frozenset(site - first for site in self.left(num_sites))
            table = self._tables[key] = step_table(plan, first, count, left)
        return table


def reading_exact(plan: Plan, exact: Collection[int]) -> Plan:
    """What a generation really does: the sites ``exact`` (``Site.lossless``) are read at every step after the first.

    A plan that reuses nothing computes them too.
    """
    if not len(exact) or not plan.reuse.any():
        return plan
    reuse = plan.reuse.copy()
    reuse[1:, list(exact)] = True
    return Plan(reuse, plan.schedule)


def _without(plan: Plan, left: Collection[int]) -> Plan:
    """``plan``, with the sites ``left`` computing at every step."""
    if not left:
        return plan
    kept = np.ones(plan.num_sites, bool)
    kept[list(left)] = False
    return Plan(plan.reuse & kept, plan.schedule, plan.calibration)
