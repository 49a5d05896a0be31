"""All schedulers of the installed diffusers in the variants that pipelines configure, and their noise, measured."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import types
from collections.abc import Iterator
from typing import Any

import diffusers.schedulers
import numpy as np
import torch

STEPS = 8
#: What constructors want where they have no default.
NEEDED: dict[str, dict[str, Any]] = {
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1, "tsr_sigma": 1, "tail_steps": 0},
    "AmusedScheduler": {"mask_token_id": 5},
    "VQDiffusionScheduler": {"num_vec_classes": 7},
    "HeliosScheduler": {"stages": 1},
    "HeliosDMDScheduler": {"stages": 1},
    # Their constructors plan all steps of training, one by one in Python.
    "KDPM2DiscreteScheduler": {"num_train_timesteps": 100},
    "KDPM2AncestralDiscreteScheduler": {"num_train_timesteps": 100},
}
#: Configurations in use; a class is tried with those whose options it has.
VARIANTS: list[dict[str, Any]] = [
    {},
    *({"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")),
    *({name: True} for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")),
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_karras_sigmas": True},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
    {"final_sigmas_type": "sigma_min"},
    {"sigma_schedule": "exponential"},
    {"sigma_data": 1.0},
    {"skip_prk_steps": True},
    {"snr_shift_scale": 1.0},
    {"shift": 3.0},
    {"use_dynamic_shifting": True, "shift": 1.0},
    {"shift_terminal": 0.1, "use_dynamic_shifting": True},
]


def scheduler_classes() -> list[type]:
    """Every class of ``diffusers.schedulers`` with ``set_timesteps``, also those whose package is not installed."""
    found: dict[str, type] = {}
    stand_in = "torchsde" not in sys.modules and importlib.util.find_spec("torchsde") is None
    if stand_in:
        sys.modules["torchsde"] = types.ModuleType("torchsde")  # only its import is needed
    try:
        for info in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
            if info.ispkg or "flax" in info.name:
                continue
            module = importlib.import_module(info.name)
            own = [kind for kind in list(vars(module).values()) if getattr(kind, "__module__", None) == info.name]
            found |= {kind.__name__: kind for kind in own if inspect.isclass(kind) and hasattr(kind, "set_timesteps")}
    finally:
        if stand_in:
            del sys.modules["torchsde"]
    return [found[name] for name in sorted(found)]


def variants(kind: type) -> Iterator[dict[str, Any]]:
    """The configurations of ``VARIANTS`` that ``kind`` knows all options of."""
    options = inspect.signature(kind.__init__).parameters
    return (variant for variant in VARIANTS if variant.keys() <= options.keys())


def make(kind: type, variant: dict[str, Any], steps: int = STEPS) -> Any:
    """A scheduler with its timesteps set; None where diffusers itself does not take the combination."""
    try:
        scheduler = kind(**NEEDED.get(kind.__name__, {}), **variant)
        kwargs = {"mu": 1.1} if variant.get("use_dynamic_shifting") else {}
        if kind.__name__ in {"ConsistencyDecoderScheduler", "SCMScheduler"}:
            steps = 2
        scheduler.set_timesteps(steps, **kwargs)
    except (ValueError, NotImplementedError, TypeError):
        return None
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(steps)
    return scheduler


def measured(scheduler: Any) -> tuple[np.ndarray, np.ndarray]:
    """What ``add_noise`` (``scale_noise``) does to a unit of signal and to a unit of noise, at each position."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    pairs = [(one, zero), (zero, one)]
    return tuple(
        np.array([_noised(scheduler, i, signal, noise) for i in range(len(scheduler.timesteps))])
        for signal, noise in pairs
    )


def _noised(scheduler: Any, position: int, signal: torch.Tensor, noise: torch.Tensor) -> float:
    name = type(scheduler).__name__
    timestep = scheduler.timesteps[position : position + 1]
    if hasattr(scheduler, "set_begin_index"):  # otherwise repeated timesteps are looked up
        scheduler._step_index = None
        scheduler.set_begin_index(position)
    if name == "RFD4ProteinaScheduler":
        return scheduler.add_noise(signal[0], noise[0], timestep.double()).item()
    if name == "HeliosDMDScheduler":
        return scheduler.add_noise(signal, noise, timestep, scheduler.sigmas, scheduler.timesteps).item()
    if hasattr(scheduler, "scale_noise"):
        result = scheduler.scale_noise(signal, timestep, noise).item()
    else:
        result = scheduler.add_noise(signal, noise, timestep).item()
    if hasattr(scheduler, "set_begin_index"):
        scheduler._step_index = scheduler._begin_index = None
    return result
