"""``calibrate``: the plan that saves most within a budget, found by measurement and verified on unseen seeds."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqar_fx.backend import make_runtime
from dqar_fx.calibration.binding import identity, shapes_of
from dqar_fx.calibration.budget import ERRORS, Budget
from dqar_fx.calibration.records import Records
from dqar_fx.calibration.rules import rule_frontier
from dqar_fx.calibration.runs import Loss, Runs
from dqar_fx.calibration.sampling import Sampler, sampler_of
from dqar_fx.calibration.solve import Candidate, Coefficients, between, frontier
from dqar_fx.calibration.sweep import Sweep
from dqar_fx.calibration.taps import TappedModel
from dqar_fx.checks import check_model
from dqar_fx.compiled import state_names
from dqar_fx.config import CacheConfig
from dqar_fx.errors import CalibrationError
from dqar_fx.graph.flops import Work
from dqar_fx.plan import Plan
from dqar_fx.runtime.identity import timestep_argument
from dqar_fx.schedule import Schedule

_PROJECTIONS = 0x5EED_0FF5E7
#: Below so many projections the search fits the seeds it was shown rather than the model.
FEW_PROJECTIONS = 24
#: How many there should be, if more passes per seed can bring them about.
ENOUGH_PROJECTIONS = 64
MOST_PASSES = 4
#: Another grouping of the sites is taken if it is better by so many dB: less is luck.
CLEARLY_BETTER = 0.3


class Calibration:
    """What each reuse of a model costs, and the plans that follow from it.

    Args:
        model, sample, num_steps, seeds, cache, scheduler, sites, max_age, rules_only, backend: as for ``calibrate``.
        folder: where what was found is kept, so that an interrupted calibration goes on where it stopped.
        progress: show a progress bar on standard error.

    Use as a context: on leaving, the model is as it was.
    """

    def __init__(
        self,
        model: Any,
        sample: Sampler | Mapping[str, Any] | None,
        *,
        num_steps: int = 50,
        seeds: Sequence[int] = range(8),
        cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen
        scheduler: Any = None,
        sites: Any = None,
        max_age: int = 12,
        rules_only: bool = False,
        backend: str | Callable[..., Any] = "inductor",
        folder: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        self.seeds = [int(seed) for seed in seeds]
        if len(set(self.seeds)) < 2 or len(set(self.seeds)) != len(self.seeds):
            raise CalibrationError(f"seeds is {self.seeds}. Give at least two different ones; eight are a good number.")
        if num_steps < 2 or max_age < 1:
            raise CalibrationError(f"num_steps={num_steps}, max_age={max_age}: give at least 2 steps and an age of 1.")
        self.model, self._sample, self._scheduler = sampler_of(model, sample, scheduler, num_steps)
        check_model(self.model)
        self.num_steps, self.cache = num_steps, cache
        self._max_age = min(max_age, num_steps - 1)
        self._settings = {"cache": cache, "scheduler": self._scheduler, "sites": sites, "backend": backend}
        self._progress = progress
        self._rules_only = rules_only
        bound = {**identity(self.model, self._scheduler, cache), "num_steps": num_steps, "max_age": self._max_age}
        self._records = Records(folder, bound) if folder is not None else None
        self._identity = bound
        self.coefficients: Coefficients
        self.work: Work
        self._runs: Runs | None = None
        self._judges = list(self.seeds)
        self._on_run: Callable[[], None] = lambda: None
        self._sweep()

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was."""
        if self._runs is not None:
            self._runs.close()
            self._runs = None

    # -- what each reuse costs ---------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Run every seed forwards and backwards."""
        names = [p for p in inspect.signature(self.model.forward).parameters if p != "self"]
        timestep = timestep_argument(names)
        if timestep is None:
            raise CalibrationError(
                f"{type(self.model).__name__}.forward({', '.join(names)}) has no argument that looks like a timestep, "
                f"so that calibration cannot tell one step from another."
            )
        runtime = make_runtime(
            schedule=Schedule.none(self.num_steps),
            # Balanced or not: it changes the error of quantisation, not what age does.
            cache=replace(self.cache, balance=None),
            sites=self._settings["sites"],
            backend="eager",
        )
        runtime.state_names = state_names(self.model)
        latents = next(((name, i) for i, name in enumerate(names) if name != timestep[0]), ("", -1))
        runtime.latents = latents[0]
        tapped = TappedModel(self.model, runtime)
        found: list[Coefficients] = []
        if self._records is not None and self._records.sweep(self.seeds[0]) is not None:
            final = Sweep(self.model, tapped, self._sample, timestep, latents, 1).forwards(self.seeds[0])
            self._records.check(self.seeds[0], final)
        with self._bar("what each reuse would cost", len(self.seeds)) as advance:
            for seed in self.seeds:
                found.append(self._coefficients(seed, tapped, timestep, latents))
                advance()
        self.coefficients = np.concatenate(found)
        if len(self.coefficients) < FEW_PROJECTIONS:
            warnings.warn(
                f"the estimate rests on {len(self.coefficients)} random projections ({len(self.seeds)} seeds): the "
                f"plan may fit these seeds better than others. Give more seeds, or more samples a run.",
                stacklevel=4,
            )
        self.graphs = tapped.graphs
        self.sites = tuple(region.site for graph in self.graphs for region in graph.regions)
        self.work = Work([g.captured for g in self.graphs], [g.regions for g in self.graphs], self.cache)

    def _coefficients(
        self, seed: int, tapped: TappedModel, timestep: tuple[str, int], latents: tuple[str, int]
    ) -> Coefficients:
        if self._records is not None:
            known = self._records.sweep(seed)
            if known is not None:
                return known.coefficients
        sweep = Sweep(self.model, tapped, self._sample, timestep, latents, self._max_age)
        final = sweep.forwards(seed)
        if sweep.num_steps != self.num_steps:
            raise CalibrationError(
                f"with seed {seed} sample() called the model at {sweep.num_steps} different timesteps, and num_steps "
                f"is {self.num_steps}. Give num_steps={sweep.num_steps}, or sample with {self.num_steps} steps."
            )
        # Not the seed itself: the sampler draws its noise with it, and errors do depend on the direction of the noise.
        generator = torch.Generator().manual_seed(_PROJECTIONS ^ seed)
        parts = [sweep.backwards(generator)]
        wanted = math.ceil(ENOUGH_PROJECTIONS / (len(self.seeds) * len(parts[0])))
        parts += [sweep.backwards(generator) for _ in range(min(wanted, MOST_PASSES) - 1)]
        found = np.concatenate(parts)
        if not np.isfinite(found).all():
            raise CalibrationError(
                f"the gradients of seed {seed} are not finite. Calibrate in float32 or bfloat16 (float16 overflows)."
            )
        if self._records is not None:
            self._records.keep_sweep(seed, found, final)
        return found

    # -- plans -------------------------------------------------------------------------------------------------------

    def candidates(self) -> dict[str, list[Candidate]]:
        """Plans from little reused to everything, with the sites grouped: all together, by kind, each alone.

        Or the best of the rules, if that is what was asked for.
        """
        exact = [i for i, site in enumerate(self.sites) if site.lossless]
        free = [i for i, site in enumerate(self.sites) if not site.lossless]
        if not free:
            raise CalibrationError("every site of this model is exact when it is reused: there is nothing to choose.")
        if self._rules_only:
            found = rule_frontier(self.coefficients, lambda reuse: 1 - 1 / self.bound(reuse), exact=exact)
            if not found:
                raise CalibrationError(f"no rule has ages of at most {self._max_age}. Give a larger max_age.")
            return {"all": found}
        kinds: dict[str, list[int]] = {}
        for i in free:
            kinds.setdefault(self.sites[i].kind, []).append(i)
        groupings = {"all": [free]}
        if len(kinds) > 1:
            groupings["kind"] = list(kinds.values())
        if len(free) > len(kinds):
            groupings["site"] = [[i] for i in free]
        return {
            name: frontier(self.coefficients, groups, [self._share(g) for g in groups], name, exact=exact)
            for name, groups in groupings.items()
        }

    def _share(self, group: Sequence[int]) -> float:
        """The share of a call's work that goes away if these sites reuse."""
        reused = [i in group for i in range(len(self.sites))]
        return 1 - self.work.of(reused) / self.work.total

    def bound(self, reuse: Any) -> float:
        """The speed-up of a plan, counted in FLOP."""
        return self.num_steps * self.work.total / sum(self.work.of(row.tolist()) for row in reuse)

    def plan_of(self, candidate: Candidate, **record: Any) -> Plan:
        """The candidate as a plan that knows what it was made for."""
        return Plan(
            candidate.reuse,
            candidate.groups if self._rules_only else f"calibrated ({candidate.groups})",
            {
                "for": {key: self._identity[key] for key in ("model", "weights", "scheduler", "cache")},
                "shapes": shapes_of(self.sites),
                "speedup_in_flop": self.bound(candidate.reuse),
                **record,
            },
        )

    def measure(self, candidate: Candidate, seeds: Sequence[int]) -> Loss:
        """What it does to the samples of ``seeds``, by running it."""
        return self.measure_plan(Plan(candidate.reuse), seeds)

    def measure_plan(self, plan: Plan, seeds: Sequence[int]) -> Loss:
        """What a plan does to the samples of ``seeds``, by running it."""
        return self._real_runs.loss(plan, seeds)

    def first_order_psnr(self, candidate: Candidate) -> float:
        """The PSNR that the coefficients alone predict."""
        error = candidate.squared_error
        return 10 * math.log10(self._real_runs.data_range**2 / error) if error else math.inf

    @property
    def generations(self) -> int:
        """How many generations were run so far, without those of the sweeps."""
        return self._runs.count if self._runs is not None else 0

    @property
    def _real_runs(self) -> Runs:
        if self._runs is None:
            self._runs = Runs(self.model, self._sample, self.num_steps, self._settings, self._tell)
            self._runs.set_range(self.seeds[:4])
        return self._runs

    def _tell(self) -> None:
        self._on_run()

    def choose(self, budget: str | Budget, *, unseen: Sequence[int] | None = None) -> Plan:
        """The plan that saves most work within ``budget``.

        Args:
            budget: see ``Budget``.
            unseen: seeds to verify it on; by default as many as it was made from.

        Raises:
            CalibrationError: nothing keeps to it; the message has the best that can be reached.
        """
        wanted = budget if isinstance(budget, Budget) else Budget.parse(budget)
        # Coefficients come from the first seeds. Plans are judged by these and as many others: a mean over few seeds
        # is off by a decibel. What is promised is verified on seeds that had no part in either.
        more = list(itertools.islice(itertools.count(max(self.seeds) + 1), 2 * len(self.seeds)))
        self._judges = [*self.seeds, *more[: len(self.seeds)]]
        unseen = more[len(self.seeds) :] if unseen is None else [int(seed) for seed in unseen]
        if set(unseen) & set(self._judges):
            raise CalibrationError(
                f"unseen seeds {sorted(set(unseen) & set(self._judges))} are among those that the plan is chosen by "
                f"({min(self._judges)} to {max(self._judges)})."
            )
        groupings = self.candidates()
        with self._bar("real runs", None) as advance:
            self._on_run = advance
            if wanted.kind in ERRORS:
                chosen, verified = self._within_error(groupings, wanted, unseen)
            else:
                chosen = self._that_saves(groupings, wanted)
                verified = self.measure(chosen, unseen)
            predicted = self.measure(chosen, self._judges)
        return self.plan_of(
            chosen,
            budget=str(wanted),
            seeds=self.seeds,
            unseen_seeds=unseen,
            data_range=self._real_runs.data_range,
            projections=len(self.coefficients),
            first_order_psnr=self.first_order_psnr(chosen),
            predicted=predicted.to_dict(),
            verified=verified.to_dict(),
            generations=self._real_runs.count,
        )

    def _that_saves(self, groupings: dict[str, list[Candidate]], budget: Budget) -> Candidate:
        """Of each grouping the first candidate that saves enough; of these the one with the least real error."""

        def brings(candidate: Candidate) -> float:
            return self.bound(candidate.reuse) if budget.kind == "speedup" else float(candidate.reuse.mean())

        fitting = [next((c for c in found if brings(c) >= budget.value - 1e-9), None) for found in groupings.values()]
        there = [c for c in fitting if c is not None]
        if not there:
            most = max(brings(c) for found in groupings.values() for c in found)
            raise CalibrationError(
                f"budget {budget}: with ages up to {self._max_age} the most that can be reached is {most:.3g}. Ask for "
                f"less, or give a larger max_age."
            )
        best = there[0]
        for other in there[1:]:
            if self._beats(other, best):
                best = other
        return best

    def _beats(self, rival: Candidate, best: Candidate) -> bool:
        """True if the samples of ``rival`` are clearly better; that they are not, half of the seeds mostly show."""
        half = self.seeds[: (len(self.seeds) + 1) // 2]
        return all(
            self.measure(rival, seeds).psnr > self.measure(best, seeds).psnr + margin
            for seeds, margin in ((half, 0.0), (self.seeds, CLEARLY_BETTER))
        )

    def _within_error(
        self, groupings: dict[str, list[Candidate]], budget: Budget, unseen: Sequence[int]
    ) -> tuple[Candidate, Loss]:
        """The candidate that saves most and keeps to the budget, also on unseen seeds."""
        found = groupings["all"]
        index = self._bisect(found, budget)
        for name, others in groupings.items():
            rival = next((c for c in others if c.saved >= found[index].saved - 1e-9), None)
            if name == "all" or rival is None or not self._beats(rival, found[index]):
                continue
            found, index = others, self._bisect(others, budget)
        finer = [found[index]]
        if index + 1 < len(found) and not self._rules_only:
            finer += between(self.coefficients, found[index], found[index + 1])
        ladder = [*found[:index], *finer[: self._bisect(finer, budget) + 1]]
        for candidate in reversed(ladder):
            verified = self.measure(candidate, unseen)
            if _keeps(verified, budget):
                return candidate, verified
        raise CalibrationError(
            f"budget {budget}: on unseen seeds even the least reuse gives {_described(verified)}. Ask for less."
        )

    def _bisect(self, found: Sequence[Candidate], budget: Budget) -> int:
        """The last of ``found``, which save ever more, that keeps to the budget."""

        def keeps(index: int, seeds: Sequence[int]) -> bool:
            return _keeps(self.measure(found[index], seeds), budget)

        low, high = -1, len(found)  # low keeps to the budget, high does not, as far as the first seeds tell
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if keeps(middle, self.seeds) else (low, middle)
        while low + 1 < len(found) and keeps(low + 1, self._judges):
            low += 1
        while low >= 0 and not keeps(low, self._judges):
            low -= 1
        if low < 0:
            least = self.measure(found[0], self._judges)
            raise CalibrationError(
                f"budget {budget}: even the plan that reuses least ({found[0].reuse.mean():.1%}) gives "
                f"{_described(least)}. Ask for less."
            )
        return low

    @contextmanager
    def _bar(self, text: str, total: int | None) -> Iterator[Callable[[], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        counted = [BarColumn(), MofNCompleteColumn()] if total is not None else []
        columns = (SpinnerColumn(), TextColumn("{task.description}"), *counted, TimeElapsedColumn())
        console = Console(stderr=True)
        with Progress(
            *columns, console=console, transient=True, disable=not (self._progress and console.is_terminal)
        ) as bar:
            task = bar.add_task(text, total=total)
            yield lambda: bar.advance(task)


def calibrate(
    model: Any,
    sample: Sampler | Mapping[str, Any] | None,
    *,
    budget: str = "psnr=30",
    num_steps: int = 50,
    seeds: Sequence[int] = range(8),
    cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen, so one default serves all calls
    scheduler: Any = None,
    sites: Any = None,
    max_age: int = 12,
    rules_only: bool = False,
    backend: str | Callable[..., Any] = "inductor",
    folder: str | Path | None = None,
    progress: bool = True,
) -> Plan:
    """Find the plan that saves most within a budget, for one model, sampler and number of steps.

    Each seed is sampled once forwards and a few times backwards (see ``sweep``): that tells what each reuse, of any
    attention at any step and age, would do to the final sample. Plans from little to much reused follow by dynamic
    programming, real runs choose among them, and runs of unseen seeds have the last word.

    Args:
        model: the module, not optimised; or a diffusers pipeline.
        sample: ``sample(model, seed)`` runs one generation and returns what is to be kept close, latents or images:
            a floating point tensor, samples first. Beside a pipeline, the arguments of its call as a dict; its latents
            are compared. Gradients must get through it; ``torch.no_grad()`` does no harm, ``inference_mode`` does.
        budget: ``"psnr=30"`` (dB, at least, against the same samples without reuse; mean over seeds),
            ``"rel_error=0.05"`` (at most, geometric mean), ``"speedup=1.3"`` (counted in FLOP) or ``"reuse=0.6"``.
        num_steps: of a generation: at how many timesteps the model is called.
        seeds: to learn from, at least two.
        cache: how stored values look; its quantisation error is part of what is measured.
        scheduler, sites, backend: as for ``optimize``.
        max_age: largest age of a stored value, in steps. Memory: so many gradients of every attention's result.
        rules_only: take the best of ``Schedule``'s rules (taper, interval, linear with a refresh, over a grid of their
            arguments) instead of any plan. Two or three seeds tell rules apart, and the rule,
            ``Schedule.parse(plan.schedule)``, can be planned for other numbers of steps.
        folder: where results are kept as they come in; a calibration that was interrupted goes on from there.
        progress: show a progress bar on standard error, if that is a terminal.

    Returns:
        A ``Plan`` whose ``calibration`` says what it is for, and what error was predicted and verified.

    Raises:
        CalibrationError: nothing keeps to the budget (the message has the best that can be reached), or ``sample``
            cannot be differentiated, or makes another number of steps.
    """
    with Calibration(
        model, sample, num_steps=num_steps, seeds=seeds, cache=cache, scheduler=scheduler, sites=sites,
        max_age=max_age, rules_only=rules_only, backend=backend, folder=folder, progress=progress,
    ) as calibration:  # fmt: skip
        return calibration.choose(Budget.parse(budget))


def _keeps(loss: Loss, budget: Budget) -> bool:
    """True if a measured loss is within the budget."""
    if budget.kind == "psnr":
        return loss.psnr >= budget.value
    return loss.rel_error <= budget.value


def _described(loss: Loss) -> str:
    return f"a PSNR of {loss.psnr:.1f} dB and a relative error of {loss.rel_error:.4f}"
