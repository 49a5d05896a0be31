"""``tune``: which attentions are worth reusing on this device, and what a schedule really saves."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dqar_fx.backend import make_runtime
from dqar_fx.calls import call_arguments
from dqar_fx.checks import check_model
from dqar_fx.config import CacheConfig
from dqar_fx.errors import RuntimeStateError, TuningError
from dqar_fx.plan import Plan
from dqar_fx.runtime.runtime import Runtime
from dqar_fx.schedule import Schedule
from dqar_fx.tuning.measure import Settings, measure
from dqar_fx.tuning.result import Tuning

#: Rounds of a tuning at the first call of a model: fewer than `tune` takes, as somebody waits for an image.
ROUNDS, ROUNDS_AT_FIRST_CALL = 20, 10
FEWEST_ROUNDS = 3


def tune(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    schedule: Schedule | Plan | None = None,
    cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    rounds: int = ROUNDS,
    progress: Callable[[str], object] | None = None,
) -> Tuning:
    """Measure on this device what each attention costs to compute, to store and to read, and what a schedule saves.

    The model is captured and cut as ``optimize`` would do it, and compiled pieces are timed while they run one after
    the other, as they do in a step: on CUDA by events in the stream, elsewhere by the host's clock, everything in turn,
    ``rounds`` times. Equal blocks share compiled pieces, and their times: only a handful are compiled, and
    Inductor finds them in its cache on the disk when the model is optimised afterwards.

    A site is dropped if, over a generation of ``schedule``, reading and storing it costs more than computing it would,
    and that is not noise: the notch around the median of what it saves (``median ± 1.57 IQR / sqrt(rounds)``; McGill,
    Tukey and Larsen, 1978) is negative altogether. Then whole steps are timed: of ``torch.compile`` of the same model,
    with nothing reused, with all read, and every different step of the schedule, with the sites that are left. If the
    schedule is slower than nothing reused, beyond noise by the same rule, no site is kept.

    The model must not be optimised or compiled yet, and is left as it was. It is called some ``rounds`` times the
    number of different steps, under ``torch.no_grad``. No gates are asked. What a generation computes once and keeps
    (``graph.hoist``) is computed at every step here, so that steps of a model with a prompt take a little longer than
    they will, and a cross-attention seems to save its keys and values as well.

    Args:
        model: what ``optimize`` takes.
        inputs: the arguments of one call, by name or in order, as large as those it will run with.
        schedule: says how often a site is read and stored; ``Schedule.taper()`` by default.
        cache, backend, mode, options, dynamic: as for ``optimize``.
        rounds: how often each thing is timed; at least 3.
        progress: is told what is going on, a line at a time.

    Raises:
        TuningError: ``inputs`` are no arguments, fewer than 3 rounds, or the model ran outside of its graphs.
        CaptureError, PlanError, RuntimeStateError: as ``optimize``, and at the first call.
    """
    settings = Settings(cache=cache, backend=backend, mode=mode, options=options, dynamic=dynamic)
    schedule = Schedule.taper() if schedule is None else schedule
    return compare(model, inputs, schedule, settings, rounds=rounds, tell=progress or _silently, choose=True)


def compare(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    schedule: Schedule | Plan,
    settings: Settings,
    *,
    rounds: int,
    tell: Callable[[str], object],
    choose: bool,
    eager: bool = False,
) -> Tuning:
    """As ``tune``; without ``choose`` all sites are kept and none is timed by itself, with ``eager`` that is timed too.

    Raises:
        DqarError: as ``tune``.
    """
    check_model(model)
    args, kwargs = call_arguments(inputs, TuningError)
    if type(rounds) is not int or rounds < FEWEST_ROUNDS:
        raise TuningError(f"rounds is {rounds!r}. Give at least {FEWEST_ROUNDS}: fewer have no median to trust.")
    runtime = make_runtime(
        schedule=schedule, cache=settings.cache, backend=settings.backend, mode=settings.mode,
        options=settings.options, dynamic=settings.dynamic,
    )  # fmt: skip  # checks them; lends its lowerer
    with torch.no_grad():
        return measure(
            model, args, kwargs, schedule=schedule, num_steps=None, settings=settings, lowerer=runtime.lowerer,
            variants={}, rounds=rounds, baseline=True, eager=eager, choose=choose, tell=tell,
        )  # fmt: skip


def is_auto(sites: object) -> bool:
    """True for ``sites="auto"``."""
    return isinstance(sites, str) and sites == "auto"


class FirstCall:
    """Tunes a model at its first call, with that call's arguments; what ``optimize(sites="auto")`` does.

    The pieces that are compiled for it are those that the model then runs.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, settings: Settings) -> None:
        self._model = weakref.ref(model)
        self._runtime = runtime
        self._settings = settings

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Measure and choose; False if the model ran eager, which is to be tried again."""
        model, runtime = self._model(), self._runtime
        if model is None:
            raise RuntimeStateError("the model is gone: only its optimised call is left. Keep the model.")
        try:
            tuning = measure(
                model, args, kwargs, schedule=runtime.schedule, num_steps=runtime.num_steps, settings=self._settings,
                lowerer=runtime.lowerer, variants=runtime.variants, rounds=ROUNDS_AT_FIRST_CALL, baseline=False,
            )  # fmt: skip
        except TuningError:  # the call itself will say so
            return False
        runtime.choose(tuning.sites)
        if not tuning.pays:
            why = next(iter(tuning.sites.left.values()))
            warnings.warn(
                f"reuse pays at none of the {tuning.sites.num_sites} attentions of {type(model).__name__} with these "
                f"inputs on {tuning.device}, so every step computes, as with torch.compile (the first: {why}). "
                f"dqar_fx.tune(model, inputs) prints the times.",
                stacklevel=2,
            )
        return True


def _silently(_text: str) -> None:
    pass
