"""Reading the step from what a call is given: the timestep's value, or its place in the scheduler's timesteps."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from dqar_fx import metrics
from dqar_fx.runtime.clock import Timestep
from dqar_fx.runtime.standin import StandIn

#: Names under which a denoiser takes its timestep, in the order in which they are looked for.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "timestep_cond", "noise_level", "sigma", "sigmas")
_FEW_TIMESTEPS = 64


def timestep_argument(names: list[str]) -> tuple[str, int] | None:
    """Name and position of the timestep among the parameter ``names`` of a forward; None if there is none.

    Names that end in ``time`` or ``timestep(s)`` count as well (``decoder_noise_time``, ``vision_timesteps``).
    """
    for name in TIMESTEP_NAMES:
        if name in names:
            return name, names.index(name)
    for position, name in enumerate(names):
        if name.endswith(("time", "timestep", "timesteps")):
            return name, position
    return None


def read_timestep(value: object) -> Timestep | None:
    """A timestep as a number; as a tuple where samples differ; None where it is nothing of the kind.

    Reads the device once for a tensor that is not on the host.
    """
    if isinstance(value, torch.Tensor):
        if value.ndim > 1 or value.numel() > _FEW_TIMESTEPS:
            # One for each token (image conditioning): there are only a few different ones.
            flat = value.detach().reshape(-1)
            value = flat if flat.numel() <= _FEW_TIMESTEPS else torch.unique(flat)
        values = value.tolist()  # the one operation in most calls: each would cost some microseconds
        if not isinstance(values, list):
            return float(values)
        if not values:
            return None
        first = values[0]
        return float(first) if all(v == first for v in values) else tuple(float(v) for v in values)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None


class WatchedStep(StandIn):
    """``scheduler.step`` that also tells which step it completed."""

    def __init__(self, scheduler: Any, identity: SchedulerIdentity) -> None:
        super().__init__(scheduler, "step")
        self._identity = weakref.ref(identity)  # the scheduler may outlive the model

    def __call__(self, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """Step as the scheduler does, then say so; a step that fails completes nothing."""
        result = self.__wrapped__(model_output, timestep, *args, **kwargs)
        identity = self._identity()
        if identity is not None:
            identity.completed(timestep)
        return result


class SchedulerIdentity:
    """Step identity from a diffusers scheduler, without reading the device.

    A timestep that a loop takes from ``scheduler.timesteps`` is a view into it, so its storage offset says which one it
    is. Where a pipeline has moved it or done arithmetic on it, ``scheduler.step_index`` says so instead, and for
    schedulers that keep none (DDIM, DDPM) the last timestep that ``scheduler.step`` was called with. ``set_timesteps``
    makes a new tensor: another tensor is another generation.

    Args:
        scheduler: the pipeline's scheduler. If it has no ``step_index``, its ``step`` is watched until ``release``.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._done: tuple[object, int] | None = None  # (calendar, index) of the last completed step
        self._snr: tuple[object, list[float]] = (None, [])
        if not hasattr(scheduler, "step_index") and callable(getattr(scheduler, "step", None)):
            WatchedStep(scheduler, self)

    def completed(self, timestep: object) -> None:
        """The scheduler has made the step from ``timestep``."""
        index = self.index_of(timestep)
        self._done = None if index is None else (self.calendar, index)

    def release(self) -> None:
        """Leave the scheduler as it was."""
        WatchedStep.remove(self._scheduler, "step")

    @property
    def calendar(self) -> object:
        """The scheduler's timesteps; another object is another generation."""
        return getattr(self._scheduler, "timesteps", None)

    @property
    def num_steps(self) -> int | None:
        """How many evaluations the scheduler's timesteps ask for; None before ``set_timesteps``."""
        if getattr(self._scheduler, "num_inference_steps", None) is None:
            return None
        timesteps = self.calendar
        return len(timesteps) if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 else None

    @property
    def snr(self) -> list[float]:
        """The signal-to-noise ratio of each step, worked out once for each calendar; [] before ``set_timesteps``.

        Raises:
            DqarError: the scheduler's steps have none that could be known.
        """
        calendar = self.calendar
        if calendar is not self._snr[0]:
            known = self.num_steps is not None
            self._snr = calendar, metrics.snr(self._scheduler).tolist() if known else []
        return self._snr[1]

    def position(self, timestep: object) -> int | None:
        """Index of this call in the scheduler's timesteps; None where the scheduler cannot tell."""
        if self.num_steps is None:
            return None
        index = self.index_of(timestep)
        if index is not None:
            return index
        if hasattr(self._scheduler, "step_index"):
            index = self._scheduler.step_index
            # None before the first `scheduler.step`
            return int(index if index is not None else getattr(self._scheduler, "begin_index", None) or 0)
        if self._done is None or self._done[0] is not self.calendar:
            return 0  # of a new calendar; should the run start later in it, what follows is a gap, and gaps compute
        return self._done[1] + 1

    def index_of(self, timestep: object) -> int | None:
        """Index of a timestep that is a view into the calendar; None for others."""
        timesteps = self.calendar
        if not isinstance(timesteps, torch.Tensor) or not isinstance(timestep, torch.Tensor) or not timestep.numel():
            return None
        if not _is_view_of(timestep, timesteps):
            return None
        offset = int(timestep.storage_offset()) - int(timesteps.storage_offset())
        index, rest = divmod(offset, int(timesteps.stride(0)) or 1)
        return index if not rest and 0 <= index < len(timesteps) else None


def _is_view_of(view: torch.Tensor, base: torch.Tensor) -> bool:
    """True if all elements of ``view`` are one element of ``base``."""
    return (
        view.device == base.device
        and view.dtype == base.dtype
        and view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
        and (view.numel() == 1 or not any(s for s, n in zip(view.stride(), view.shape, strict=True) if n > 1))
    )
