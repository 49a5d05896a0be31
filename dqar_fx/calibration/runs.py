"""Real generations under one plan after another, compared with those that reuse nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dqar_fx.calibration.sampling import Sampler
from dqar_fx.errors import CalibrationError
from dqar_fx.optimize import optimize, restore, runtime
from dqar_fx.plan import Plan
from dqar_fx.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Loss:
    """What reuse did to the final samples of some seeds.

    Attributes:
        psnr: dB, mean over seeds; infinite where nothing changed.
        psnr_error: its standard error.
        rel_error: ``|with - without| / |without|`` (L2), geometric mean over seeds, as the mean of dB is one: the
            arithmetic one is that of the worst few.
        seeds: how many.
    """

    psnr: float
    psnr_error: float
    rel_error: float
    seeds: int

    def to_dict(self) -> dict[str, float]:
        """For a file."""
        return {"psnr": self.psnr, "psnr_error": self.psnr_error, "rel_error": self.rel_error, "seeds": self.seeds}


class Runs:
    """Runs the optimised model; every (plan, seed) once.

    Args:
        model: the module, not optimised; ``close`` leaves it as it was.
        sample: runs one generation of it.
        num_steps: of a generation.
        settings: further arguments of ``optimize``.
        on_run: called after each generation.
    """

    def __init__(
        self, model: nn.Module, sample: Sampler, num_steps: int, settings: dict[str, Any], on_run: Callable[[], None]
    ) -> None:
        self._model, self._sample, self._num_steps, self._on_run = model, sample, num_steps, on_run
        self._none = Schedule.none(num_steps)
        self._references: dict[int, Tensor] = {}
        self._errors: dict[tuple[Plan, int], tuple[float, float]] = {}
        self.data_range = math.nan
        self.count = 0
        optimize(model, self._none, **settings)

    def close(self) -> None:
        """Restore the model."""
        restore(self._model)

    def reference(self, seed: int) -> Tensor:
        """The final sample without reuse, on the CPU."""
        if seed not in self._references:
            self._references[seed] = self._run(self._none, seed)
        return self._references[seed]

    def set_range(self, seeds: Sequence[int]) -> None:
        """Take for the data's range what the samples of these seeds span."""
        references = [self.reference(seed) for seed in seeds]
        self.data_range = float(max(r.max() for r in references) - min(r.min() for r in references))

    def loss(self, plan: Plan, seeds: Sequence[int]) -> Loss:
        """What ``plan`` does to the samples of ``seeds``."""
        found = [self._error(plan, seed) for seed in seeds]
        psnr = np.array([10 * math.log10(self.data_range**2 / mse) if mse else math.inf for mse, _ in found])
        spread = float(psnr.std(ddof=1) / math.sqrt(len(psnr))) if len(psnr) > 1 and np.isfinite(psnr).all() else 0.0
        relative = np.array([relative for _, relative in found])
        geometric = float(np.exp(np.log(relative).mean())) if relative.all() else 0.0
        return Loss(float(psnr.mean()), spread, geometric, len(found))

    def _error(self, plan: Plan, seed: int) -> tuple[float, float]:
        """Mean squared error per element, and relative error."""
        key = plan, seed
        if key not in self._errors:
            reference = self.reference(seed)
            difference = (self._run(plan, seed) - reference).double()
            stats = runtime(self._model).stats
            if plan.reuse.any() and not stats.reused:
                reasons = sorted({d.reason for d in stats.decisions})
                raise CalibrationError(
                    f"a plan that reuses {plan.reuse_ratio:.0%} reused nothing when it ran (reasons: "
                    f"{', '.join(reasons)}). See 'Which step it is' in the README: give scheduler=, or name the calls "
                    f"of guidance by runtime(model).branch(...)."
                )
            size = float(reference.double().norm())
            self._errors[key] = float(difference.square().mean()), float(difference.norm()) / max(size, 1e-30)
        return self._errors[key]

    def _run(self, schedule: Schedule | Plan, seed: int) -> Tensor:
        rt = runtime(self._model)
        rt.follow(schedule)
        with torch.no_grad(), rt.generation(self._num_steps):
            final = self._sample(self._model, seed)
        self.count += 1
        self._on_run()
        return final.detach().float().cpu()
