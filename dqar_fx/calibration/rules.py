"""The cheap variant: not the best plan there is, but the best of the rules, which need few numbers to be told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dqar_fx.calibration.solve import Candidate, Coefficients, Table, predict
from dqar_fx.schedule import Schedule


def rules(num_steps: int) -> Iterator[Schedule]:
    """Tapers, intervals and DQAR's linear schedule, over a grid of their arguments."""
    for first in (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 13.0):
        for last in (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0):
            if last <= first <= num_steps:
                yield Schedule.taper(num_steps, first=first, last=last)
    for every in range(2, 8):
        for warmup in (1, 0.1, 0.2, 0.4, 0.6):
            for fraction in (0.5, 1.0):
                yield Schedule.interval(num_steps, every=every, warmup=warmup, fraction=fraction)
    for warmup in (0.2, 0.4):
        for refresh in (2, 3, 4):
            yield Schedule.linear(num_steps, warmup=warmup, fraction=1.0, refresh=refresh)


def rule_frontier(c: Coefficients, saved: Callable[[Table], float], *, exact: Sequence[int] = ()) -> list[Candidate]:
    """The rules that no other rule beats in both work saved and error, from little to much saved.

    Args:
        c: the coefficients; rules that read older values than they know are left out.
        saved: the share of the work that a plan saves.
        exact: sites that are the same at every step: read after the first, whatever the rule says.
    """
    num_steps, num_sites, ages = c.shape[1:]
    found = []
    for rule in rules(num_steps):
        plan = rule.plan(num_sites)
        if not plan.reuse.any() or plan.age.max() >= ages:
            continue
        reuse = plan.reuse.copy()
        error = predict(c, reuse)
        reuse[1:, list(exact)] = True
        found.append(Candidate(reuse, saved(reuse), error, str(rule)))
    found.sort(key=lambda candidate: (candidate.saved, -candidate.squared_error))
    best: list[Candidate] = []
    for candidate in reversed(found):
        if not best or candidate.squared_error < best[-1].squared_error:
            best.append(candidate)
    return best[::-1]
