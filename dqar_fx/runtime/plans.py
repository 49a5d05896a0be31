"""The schedule of one model, planned for as many sites and steps as its calls turn out to have."""

from __future__ import annotations

import warnings

from dqar_fx.errors import DqarError
from dqar_fx.plan import Plan
from dqar_fx.runtime.generation import StepTable
from dqar_fx.runtime.lifetimes import step_table
from dqar_fx.schedule import Schedule


class Plans:
    """Plans, and the tables that calls are decided by, each made once.

    Args:
        schedule: the rule, or the one plan there is.
    """

    def __init__(self, schedule: Schedule | Plan) -> None:
        self.schedule = schedule
        self._plans: dict[tuple[int, int | None], Plan] = {}
        self._tables: dict[tuple[int, int | None, int, int], StepTable] = {}

    def plan(self, num_sites: int, num_steps: int | None) -> Plan:
        """The schedule for ``num_sites`` sites and ``num_steps`` steps (None: as many as it was made for).

        Raises:
            PlanError, ScheduleError: it cannot be planned so.
        """
        plan = self._plans.get((num_sites, num_steps))
        if plan is None:
            plan = self._plans[num_sites, num_steps] = self.schedule.plan(num_sites, num_steps)
        return plan

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
            table = self._tables[key] = step_table(plan, first, count)
        return table
