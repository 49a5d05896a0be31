"""From what each reuse costs to plans: the most work saved for the least error.

A plan is cut, for each group of sites that reuse together, into *runs*: one step that computes, and the steps after it
that read its value. Errors within a run point the same way (the value gets older and older), so they are added before
they are squared; different runs are taken to be independent, so that their squares add up. Under one multiplier, which
says how much error a FLOP is worth, the best runs are then found by dynamic programming over the step that computes.

Independence between runs is what the search assumes, not what is reported: ``predict`` adds up everything first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dqar_fx.plan import Plan

Coefficients = npt.NDArray[np.float64]  # c [N, T, S, A + 1], see Sweep.backwards; N projections
Table = npt.NDArray[np.bool_]  # reuse [T, S]

#: How many multipliers are tried, from nothing reused to everything.
MULTIPLIERS = 120


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan, with what it is expected to do.

    Attributes:
        reuse: bool ``[T, S]``.
        saved: the share of the work that is saved, 0 to 1.
        squared_error: of an element of the final sample, to first order, mean over all.
        groups: how the sites were grouped.
    """

    reuse: Table
    saved: float
    squared_error: float
    groups: str


def predict(c: Coefficients, reuse: Table) -> float:
    """The mean squared error of the final sample under ``reuse``, to first order."""
    age = Plan(reuse).age
    steps, sites = np.nonzero(reuse)
    error = c[:, steps, sites, age[steps, sites]].sum(1)
    return float((error**2).mean())


def run_costs(c: Coefficients, sites: Sequence[int]) -> npt.NDArray[np.float64]:
    """``[T, A + 1]``: what it costs to compute ``sites`` at a step and to reuse for so many steps after it."""
    together = c[:, :, list(sites)].sum(2)
    num_steps, longest = together.shape[1], together.shape[2] - 1
    costs = np.full((num_steps, longest + 1), np.inf)
    costs[:, 0] = 0
    for first in range(num_steps):
        lengths = np.arange(1, min(longest, num_steps - 1 - first) + 1)
        if len(lengths):
            errors = together[:, first + lengths, lengths].cumsum(1)
            costs[first, lengths] = (errors**2).mean(0)
    return costs


def best_runs(costs: npt.NDArray[np.float64], gain: float) -> npt.NDArray[np.bool_]:
    """Which steps reuse, so that the costs of all runs, less ``gain`` for each step that reuses, are least."""
    num_steps, longest = costs.shape[0], costs.shape[1] - 1
    least = np.zeros(num_steps + 1)
    length = np.zeros(num_steps, int)
    for first in reversed(range(num_steps)):
        most = min(longest, num_steps - 1 - first)
        totals = costs[first, : most + 1] - gain * np.arange(most + 1) + least[first + 1 : first + most + 2]
        length[first] = int(totals.argmin())
        least[first] = totals[length[first]]
    reuse, first = np.zeros(num_steps, bool), 0
    while first < num_steps:
        reuse[first + 1 : first + 1 + length[first]] = True
        first += 1 + int(length[first])
    return reuse


def best_runs_of_each_size(costs: npt.NDArray[np.float64]) -> list[npt.NDArray[np.bool_]]:
    """For every number of steps that reuse, from 1 on, the steps that cost least; as far as ages reach."""
    num_steps, longest = costs.shape[0], costs.shape[1] - 1
    least = np.full((num_steps + 1, num_steps + 1), np.inf)  # [step that computes, steps that reuse from there on]
    least[num_steps, 0] = 0
    length = np.zeros((num_steps, num_steps + 1), int)
    for first in reversed(range(num_steps)):
        most = min(longest, num_steps - 1 - first)
        options = np.full((most + 1, num_steps + 1), np.inf)
        for n in range(most + 1):
            options[n, n:] = costs[first, n] + least[first + n + 1, : num_steps + 1 - n]
        length[first] = options.argmin(0)
        least[first] = options.min(0)
    found = []
    for size in range(1, num_steps):
        if not np.isfinite(least[0, size]):
            break
        reuse, first, left = np.zeros(num_steps, bool), 0, size
        while first < num_steps:
            n = int(length[first, left])
            reuse[first + 1 : first + 1 + n] = True
            first, left = first + 1 + n, left - n
        found.append(reuse)
    return found


def frontier(
    c: Coefficients, groups: Sequence[Sequence[int]], work: Sequence[float], name: str, *, exact: Sequence[int] = ()
) -> list[Candidate]:
    """Plans from nothing reused to everything, ever more work saved.

    Args:
        c: the coefficients.
        groups: the sites that reuse together.
        work: of each group, the share of a call's work that goes away if it reuses.
        name: of this grouping.
        exact: sites that are the same at every step: read after the first, whatever else is.
    """
    num_steps, num_sites = c.shape[1:3]
    costs = [run_costs(c, group) for group in groups]
    if len(groups) == 1:
        choices = [[steps] for steps in best_runs_of_each_size(costs[0])]
    else:
        choices = [
            [best_runs(table, gain * share) for table, share in zip(costs, work, strict=True)]
            for gain in _multipliers(costs, work)
        ]
    found: dict[bytes, Candidate] = {}
    for chosen in choices:
        reuse = np.zeros((num_steps, num_sites), bool)
        for group, steps in zip(groups, chosen, strict=True):
            reuse[:, list(group)] = steps[:, None]
        saved = sum(share * float(steps.mean()) for share, steps in zip(work, chosen, strict=True))
        if reuse.any():
            error = predict(c, reuse)
            reuse[1:, list(exact)] = True  # costs nothing at any age
            found.setdefault(reuse.tobytes(), Candidate(reuse, saved, error, name))
    return sorted(found.values(), key=lambda candidate: candidate.saved)


def between(c: Coefficients, less: Candidate, more: Candidate) -> list[Candidate]:
    """Plans between two neighbours: ever more sites follow the second one, those first that it costs least."""
    differing = [int(s) for s in (less.reuse != more.reuse).any(0).nonzero()[0]]
    exact = np.setdiff1d(np.arange(less.reuse.shape[1]), differing)
    exact = exact[less.reuse[1:, exact].all(0)]
    found, reuse = [], less.reuse.copy()
    for number in range(1, len(differing)):
        options = []
        for site in differing:
            changed = reuse.copy()
            changed[:, site] = more.reuse[:, site]
            if (changed != reuse).any():
                changed[1:, exact] = False
                error = predict(c, changed)
                changed[1:, exact] = True
                options.append((error, site, changed))
        error, _, reuse = min(options, key=lambda option: option[:2])
        saved = less.saved + (more.saved - less.saved) * number / len(differing)
        found.append(Candidate(reuse, saved, error, f"{less.groups}, {number} of {len(differing)} sites further"))
    return found


def _multipliers(costs: Sequence[npt.NDArray[np.float64]], work: Sequence[float]) -> npt.NDArray[np.float64]:
    """From one under which nothing is worth its error to one under which everything is."""
    finite = [table[np.isfinite(table) & (table > 0)] for table in costs]
    positive = np.concatenate([table for table in finite if table.size] or [np.ones(1)])
    shares = [w for w in work if w > 0] or [1.0]
    low, high = math.log(float(positive.min()) / max(shares) / 10), math.log(float(positive.max()) / min(shares) * 10)
    grid: npt.NDArray[np.float64] = np.exp(np.linspace(low, high, MULTIPLIERS))
    return grid
