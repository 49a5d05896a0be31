"""Schedules: rules for which attention sites reuse their stored output, at every sampling step.

The rules are DQAR's layer scheduling (linear, linear_reverse, exponential, step), and what it lacks: a refresh, after
which no stored output is older than a chosen number of steps. Nothing here needs torch.

Words: ``step`` counts calls of the denoiser from 0 to T - 1 and is not the timestep (noise level); its progress is
``p = step / (T - 1)``, and 0 where T is 1. A site is one attention, of S in the model, in model order.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dqar_fx.errors import PlanError, ScheduleError
from dqar_fx.plan import Plan

__all__ = ["Rule", "Schedule"]

Rule = Callable[[int, int, int, int], bool | np.bool_]  # (step, site, num_steps, num_sites) -> reuse?

PARSEABLE = ("none", "linear", "exponential", "phases", "interval", "taper", "always")
# DQAR's own names for two of them, and what they fix.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_reverse": ("linear", {"deep_first": True}),
    "step": ("phases", {}),
}
# Before a floor, so that 0.29 * 100 = 28.999999999999996 counts as the 29 that was meant.
FLOOR_GUARD = 1e-9


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Schedule:
    """A rule for which sites compute and which reuse; made by its constructors, such as :meth:`interval`.

    A schedule knows nothing of a model: :meth:`plan` applies it to a number of sites, and to another number of steps
    than its own where a run has another. Frozen, hashable, and equal to a schedule made with the same arguments.

    Arguments that several constructors share:

    * ``num_steps``: T, at least 1.
    * ``warmup``: a float in [0, 1] is a fraction of the run: steps with ``p < warmup`` compute, and 1.0 never reuses.
      An int ``W`` is a number of steps, and counts as ``w = W / (T - 1)`` in the formulas. So 1 is one step, and 1.0
      the whole run. Step 0 computes in any case.
    * ``fraction``: the share of the sites that may reuse in the end, in [0, 1].
    * ``deep_first``: the last sites of the model reuse first, instead of the first ones.
    * ``refresh``: an int ``k``, at least 1: a site whose stored value is k steps old computes again, so that ages stay
      below k. None: once a site reuses, nothing but the rule makes it compute.

    Every constructor raises :class:`ScheduleError` for an argument of the wrong kind or out of range.
    """

    name: str
    num_steps: int = 50
    warmup: float = 0.0  # an int is kept as one: it means steps
    fraction: float = 1.0
    deep_first: bool = False
    refresh: int | None = None
    early_end: float = 0.3
    mid_end: float = 0.7
    first: float = 8.0
    last: float = 1.0
    rule: Rule | Plan | None = None  # of a custom schedule; a mask is kept as the Plan that it is

    def __post_init__(self) -> None:
        if self.name not in (*PARSEABLE, "custom"):
            raise ScheduleError(f"Schedule(name={self.name!r}) is unknown. Use a constructor, as Schedule.interval.")
        set_ = object.__setattr__  # the dataclass is frozen; numpy's numbers become Python's, so that str() is exact
        set_(self, "num_steps", self._count("num_steps", self.num_steps))
        set_(self, "warmup", self._warmup(self.warmup))
        for key in ("fraction", "early_end", "mid_end"):
            set_(self, key, self._share(key, getattr(self, key)))
        if self.early_end > self.mid_end:
            self._refuse("early_end", self.early_end, f"it must not exceed mid_end, {self.mid_end}")
        for key in ("first", "last"):
            set_(self, key, self._gap(key, getattr(self, key)))
        if not isinstance(self.deep_first, (bool, np.bool_)):
            self._refuse("deep_first", self.deep_first, "it must be True or False")
        set_(self, "deep_first", bool(self.deep_first))
        if self.refresh is not None:
            # the caller of interval knows it as every
            set_(self, "refresh", self._count("every" if self.name == "interval" else "refresh", self.refresh))
        if isinstance(self.rule, Plan) and self.rule.num_steps != self.num_steps:
            raise ScheduleError(
                f"Schedule.custom: the mask has {self.rule.num_steps} steps and cannot be planned for "
                f"{self.num_steps}. Give a mask of {self.num_steps} steps, or a rule."
            )

    @classmethod
    def none(cls, num_steps: int = 50) -> Schedule:
        """Compute everything: the honest baseline."""
        return cls(name="none", num_steps=num_steps)

    @classmethod
    def linear(
        cls,
        num_steps: int = 50,
        *,
        warmup: float = 0.2,
        fraction: float = 0.5,
        deep_first: bool = False,
        refresh: int | None = None,
    ) -> Schedule:
        """Reuse in more and more sites: ``n(p) = floor((p - w) / (1 - w) * fraction * S)`` after the warm-up.

        The first n sites reuse, or the last n with ``deep_first`` (DQAR's linear_reverse). Without ``refresh`` this is
        DQAR's schedule as published, in which a stored value serves until the end.
        """
        return cls(
            name="linear", num_steps=num_steps, warmup=warmup, fraction=fraction, deep_first=deep_first, refresh=refresh
        )

    @classmethod
    def exponential(
        cls,
        num_steps: int = 50,
        *,
        warmup: float = 0.2,
        fraction: float = 0.5,
        deep_first: bool = False,
        refresh: int | None = None,
    ) -> Schedule:
        """As :meth:`linear` with a slow start: ``n(p) = floor(((p - w) / (1 - w))**2 * fraction * S)``."""
        return cls(
            name="exponential",
            num_steps=num_steps,
            warmup=warmup,
            fraction=fraction,
            deep_first=deep_first,
            refresh=refresh,
        )

    @classmethod
    def phases(
        cls,
        num_steps: int = 50,
        *,
        early_end: float = 0.3,
        mid_end: float = 0.7,
        warmup: float = 0.0,
        deep_first: bool = False,
        refresh: int | None = None,
    ) -> Schedule:
        """Reuse in one third of the sites, later in two, then in all: DQAR's "step" schedule.

        ``S // 3`` sites while ``p < early_end``, ``2 * (S // 3)`` while ``p < mid_end``; none during the warm-up.
        """
        return cls(
            name="phases",
            num_steps=num_steps,
            early_end=early_end,
            mid_end=mid_end,
            warmup=warmup,
            deep_first=deep_first,
            refresh=refresh,
        )

    @classmethod
    def interval(cls, num_steps: int = 50, *, every: int = 3, warmup: float = 0.1, fraction: float = 1.0) -> Schedule:
        """Compute at every ``every``-th step after the warm-up and reuse between.

        Ages stay below ``every``, which is at least 1 (1 computes always). The last step of the warm-up counts as the
        first compute. With ``fraction``, only the first ``floor(fraction * S)`` sites reuse.
        """
        if every is None:  # a refresh may be None, an interval without one would be another schedule
            raise ScheduleError("Schedule.interval: every is None; it must be an int of at least 1.")
        return cls(name="interval", num_steps=num_steps, refresh=every, warmup=warmup, fraction=fraction)

    @classmethod
    def taper(cls, num_steps: int = 50, *, first: float = 8.0, last: float = 1.0, warmup: float = 0.0) -> Schedule:
        """Compute seldom at first and ever more often: the gap between computes shrinks from ``first`` to ``last``.

        A step that computes at progress ``p`` is followed by the next one ``first**(1 - p) * last**p`` steps later
        (rounded, at least 1); all sites reuse in between. ``first`` counts as half the run at most, so that a run of 10
        steps is not one long gap. ``last`` below 1 lets the end of the run compute throughout.
        It is what calibration comes to: early errors fade, late ones stay in the image (see ``calibrate``). On both
        models measured it lost less than an interval at equal reuse (``bench/taper.py``): the schedule to start with.

        ``first`` and ``last`` are positive numbers of steps.
        """
        return cls(name="taper", num_steps=num_steps, first=first, last=last, warmup=warmup)

    @classmethod
    def always(cls, num_steps: int = 50, *, warmup: float = 1) -> Schedule:
        """Compute during the warm-up and never again: the most that can be reused (DQAR's quant_cache_only, 98 %).

        For measuring what reuse can save at all; images come out wrong.
        """
        return cls(name="always", num_steps=num_steps, warmup=warmup)

    @classmethod
    def custom(cls, num_steps: int, rule_or_mask: Rule | npt.ArrayLike, *, refresh: int | None = None) -> Schedule:
        """A rule of one's own, or a measured table.

        Args:
            num_steps: T.
            rule_or_mask: ``rule(step, site, num_steps, num_sites) -> bool``, True to reuse, asked for every step but
                step 0, which computes; or a bool ``[T, S]`` table whose row 0 is all False. A rule plans itself anew
                for other numbers of steps and sites, a table cannot.
            refresh: as for the other schedules, on top of the rule or table.
        """
        rule = rule_or_mask if callable(rule_or_mask) else _plan_of_mask(rule_or_mask)
        return cls(name="custom", num_steps=num_steps, refresh=refresh, rule=rule)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read a schedule from a command line: ``"interval"``, ``"interval:every=3,warmup=0.1"``.

        The names are ``none linear exponential phases interval taper always``, DQAR's ``linear_reverse`` (linear with
        ``deep_first``) and ``step`` (phases); the keys are the arguments of that constructor, and ``steps`` stands for
        ``num_steps``. A warm-up with a point is a fraction, one without is a number of steps. ``str(schedule)`` is
        text that reads back as an equal schedule.

        Raises:
            ScheduleError: for an unknown name or key (it lists the valid ones), a value that cannot be read, or one
                that the constructor refuses.
        """
        if not isinstance(text, str):
            raise ScheduleError(f"Schedule.parse reads text such as 'interval:every=3', not {text!r}.")
        given, _, rest = (part.strip() for part in text.partition(":"))
        if given == "custom":
            raise ScheduleError(f"{text!r} cannot be parsed: a custom schedule is a function or a table, not text.")
        name, fixed = ALIASES.get(given, (given, {}))
        if name not in PARSEABLE:
            valid = (*PARSEABLE, *ALIASES)
            raise ScheduleError(f"{text!r}: there is no schedule {given!r}{_suggest(given, valid)}")
        keys = [key for key in _keys(name) if key not in fixed]
        arguments: dict[str, Any] = {}
        for item in rest.split(",") if rest else ():
            key, equals, value = (part.strip() for part in item.partition("="))
            key = "num_steps" if key == "steps" else key
            if key not in keys:
                shown = ["steps" if key == "num_steps" else key for key in keys]
                raise ScheduleError(f"{text!r}: {given} has no {key!r}{_suggest(key, shown)}")
            if not equals or not value:
                raise ScheduleError(f"{text!r}: {key} has no value. Write {key}=...")
            if key in arguments:
                raise ScheduleError(f"{text!r}: {key} is given twice. Give it once.")
            arguments[key] = _read_value(text, key, value)
        schedule: Schedule = getattr(cls, name)(**arguments, **fixed)
        return schedule

    def with_steps(self, num_steps: int) -> Schedule:
        """The same rule for another number of steps.

        Raises:
            ScheduleError: a custom table has one number of steps only.
        """
        return replace(self, num_steps=num_steps)

    def plan(self, num_sites: int, num_steps: int | None = None) -> Plan:
        """What the rule says for a model and a run.

        Args:
            num_sites: S, at least 1.
            num_steps: T, where the run has another number of steps than the schedule.

        Raises:
            ScheduleError: a custom mask does not fit these numbers, or a custom rule fails or returns no bool.
        """
        S = self._count("num_sites", num_sites)
        schedule = self if num_steps is None else self.with_steps(num_steps)
        reuse = schedule._may_reuse(S)
        if self.refresh is not None:
            computed = np.zeros(S, dtype=np.int64)  # the step of each site's stored value
            for step in range(1, schedule.num_steps):
                reuse[step] &= step - computed < self.refresh
                computed[~reuse[step]] = step
        if self.name == "taper":
            reuse &= schedule._between_computes()[:, None]
        return Plan(reuse, str(schedule))

    def _between_computes(self) -> npt.NDArray[np.bool_]:
        """Bool ``[T]``: False at the steps that a taper computes, the last one of the warm-up on."""
        T = self.num_steps
        warm = int(self._may_reuse(1).argmax()) if self._may_reuse(1).any() else T
        between, step = np.ones(T, dtype=bool), max(warm - 1, 0)
        first = min(self.first, T / 2)
        while step < T:
            between[step] = False
            p = step / max(T - 1, 1)
            step += max(1, int(first ** (1 - p) * self.last**p + 0.5))
        return between

    def _may_reuse(self, S: int) -> npt.NDArray[np.bool_]:
        """Bool ``[T, S]``: what the rule allows, before any refresh."""
        T = self.num_steps
        if isinstance(self.rule, Plan):
            if self.rule.num_sites != S:
                raise ScheduleError(
                    f"Schedule.custom: the mask has {self.rule.num_sites} sites, but the model has {S}. "
                    f"Give a mask of shape [{T}, {S}], or a rule."
                )
            return self.rule.reuse.copy()
        if self.rule is not None:
            rows = [[_ask(self.rule, step, site, T, S) for site in range(S)] for step in range(1, T)]
            return np.array([[False] * S, *rows])

        p = np.arange(T) / max(T - 1, 1)
        # An int is compared as steps, so that W == T - 1 leaves the last step free while the fraction 1.0 does not.
        as_steps = isinstance(self.warmup, int)
        w = self.warmup / max(T - 1, 1) if as_steps else self.warmup
        warm = np.arange(T) >= self.warmup if as_steps else (p >= w) & (w < 1.0)
        ramp = np.where(warm, p - w, 0.0) / (1.0 - w) if w < 1.0 else np.zeros(T)
        count: npt.NDArray[Any]
        match self.name:
            case "linear":
                count = np.floor(ramp * self.fraction * S + FLOOR_GUARD)
            case "exponential":
                count = np.floor(ramp**2 * self.fraction * S + FLOOR_GUARD)
            case "phases":
                count = np.where(p < self.early_end, S // 3, np.where(p < self.mid_end, 2 * (S // 3), S))
            case "none":
                count = np.zeros(T)
            case _:  # interval, taper, always: all that may reuse at all, from the end of the warm-up on
                count = np.full(T, np.floor(self.fraction * S + FLOOR_GUARD))
        count = np.where(warm, count, 0)
        count[0] = 0  # nothing is stored yet
        sites = np.arange(S)[::-1] if self.deep_first else np.arange(S)
        mask: npt.NDArray[np.bool_] = sites < count[:, None]
        return mask

    def _arguments(self) -> dict[str, Any]:
        keys = (key for key in _keys(self.name) if key != "rule_or_mask")
        return {key: self.refresh if key == "every" else getattr(self, key) for key in keys}

    def __str__(self) -> str:
        """Text that :meth:`parse` reads back exactly; what is False or None by default appears where it is not."""
        shown = {key: value for key, value in self._arguments().items() if value is not None and value is not False}
        items = (f"{'steps' if key == 'num_steps' else key}={value!r}".lower() for key, value in shown.items())
        text = f"{self.name}:{','.join(items)}"
        return f"{text} ({self._rule_name()}, which cannot be parsed)" if self.rule is not None else text

    def __repr__(self) -> str:
        arguments = self._arguments()
        steps = arguments.pop("num_steps")
        shown = [repr(steps), *([self._rule_name()] if self.rule is not None else [])]
        return f"Schedule.{self.name}({', '.join([*shown, *(f'{key}={value!r}' for key, value in arguments.items())])})"

    def _rule_name(self) -> str:
        if isinstance(self.rule, Plan):
            return f"mask of {self.rule.num_steps} x {self.rule.num_sites}"
        return f"rule {getattr(self.rule, '__qualname__', repr(self.rule))}"

    # By text, not by field: 1 == 1.0 in Python, but a warm-up of 1 is one step and one of 1.0 is the whole run.
    def __eq__(self, other: object) -> bool:
        return (str(self), self.rule) == (str(other), other.rule) if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash((str(self), self.rule))

    def _count(self, key: str, value: Any, least: int = 1) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            self._refuse(key, value, f"it must be an int of at least {least}")
        return int(value)

    def _share(self, key: str, value: Any, hint: str = "") -> float:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
            self._refuse(key, value, f"it must be a fraction in [0, 1]{hint}")
        return float(value)

    def _gap(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < float("inf"):
            self._refuse(key, value, "it must be a positive number of steps")
        return float(value)

    def _warmup(self, value: Any) -> float:
        if not isinstance(value, bool) and isinstance(value, Integral):
            return self._count("warmup", value, least=0)
        return self._share("warmup", value, ", or an int number of steps")

    def _refuse(self, key: str, value: object, remedy: str) -> NoReturn:
        raise ScheduleError(f"Schedule.{self.name}: {key} is {value!r}; {remedy}.")


def _keys(name: str) -> list[str]:
    """The arguments of a constructor: the one place that says which knobs a schedule has."""
    return list(inspect.signature(getattr(Schedule, name)).parameters)


def _suggest(word: str, valid: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, valid, n=1)
    return f"; did you mean {close[0]!r}? Valid: {', '.join(valid)}." if close else f". Valid: {', '.join(valid)}."


def _read_value(text: str, key: str, value: str) -> Any:
    if key == "deep_first":
        if value.lower() not in ("true", "false"):
            raise ScheduleError(f"{text!r}: deep_first is {value!r}; write true or false.")
        return value.lower() == "true"
    if key == "refresh" and value.lower() == "none":
        return None
    try:
        return int(value) if value.lstrip("+-").isdecimal() else float(value)
    except ValueError as error:
        raise ScheduleError(f"{text!r}: {key} is {value!r}, which is not a number.") from error


def _plan_of_mask(mask: Any) -> Plan:
    try:
        return Plan(mask)
    except PlanError as error:  # the same checks; only the name is another to who gave a mask
        raise ScheduleError(f"Schedule.custom: {str(error).replace('Plan.reuse', 'mask')}") from error


def _ask(rule: Rule, step: int, site: int, num_steps: int, num_sites: int) -> bool:
    where = f"Schedule.custom: the rule, asked for step {step} and site {site},"
    try:
        answer = rule(step, site, num_steps, num_sites)
    except Exception as error:
        raise ScheduleError(f"{where} raised {type(error).__name__}: {error}") from error
    if not isinstance(answer, (bool, np.bool_)):
        raise ScheduleError(f"{where} returned {answer!r}; it must return True to reuse or False to compute.")
    return bool(answer)
