"""Reading the step from what a call is given: the timestep's value, or its place in the scheduler's timesteps."""

from __future__ import annotations

from typing import Any

import torch

from dqar_fx.runtime.clock import Timestep

#: Names under which a denoiser takes its timestep, in the order in which they are looked for.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "timestep_cond", "noise_level", "sigma", "sigmas")


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
        values = value.detach().reshape(-1).tolist()
        if not values:
            return None
        first = values[0]
        return float(first) if all(v == first for v in values) else tuple(float(v) for v in values)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None


class SchedulerIdentity:
    """Step identity from a diffusers scheduler, without reading the device.

    A timestep that a loop takes from ``scheduler.timesteps`` is a view into it, so its storage offset says which one it
    is; where a pipeline has done arithmetic on it, ``scheduler.step_index`` says so instead. ``set_timesteps`` makes a
    new tensor: another tensor is another generation.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

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

    def position(self, timestep: object) -> int | None:
        """Index of this call in the scheduler's timesteps; None where the scheduler cannot tell."""
        timesteps = self.calendar
        if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1 or not len(timesteps):
            return None
        if isinstance(timestep, torch.Tensor) and timestep.numel() and _is_view_of(timestep, timesteps):
            offset = timestep.storage_offset() - timesteps.storage_offset()
            index, rest = divmod(offset, timesteps.stride(0) or 1)
            if not rest and 0 <= index < len(timesteps):
                return index
        if not hasattr(self._scheduler, "step_index") or self.num_steps is None:
            return None
        index = self._scheduler.step_index
        if index is None:  # before the first `scheduler.step`
            index = getattr(self._scheduler, "begin_index", None) or 0
        return int(index)


def _is_view_of(view: torch.Tensor, base: torch.Tensor) -> bool:
    """True if all elements of ``view`` are one element of ``base``."""
    return (
        view.device == base.device
        and view.dtype == base.dtype
        and view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
        and (view.numel() == 1 or not any(s for s, n in zip(view.stride(), view.shape, strict=True) if n > 1))
    )

