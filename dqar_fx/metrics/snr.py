"""Signal-to-noise ratio of every step of a diffusers scheduler (DQAR, R3 and R5), on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dqar_fx.errors import MetricError

Floats = npt.NDArray[np.float64]
#: Amplitudes of the signal and of the noise at each step; None where a rule does not know the scheduler.
Levels = tuple[Floats, Floats] | None

#: Rectified flow by what their ``step`` does; nothing that they carry says so.
FLOW_SCHEDULERS = ("LTXEulerAncestralRFScheduler", "PiflowScheduler")
#: Their timesteps are the amount of signal, from 0 to 1.
SIGNAL_TIME_SCHEDULERS = ("RFD4ProteinaScheduler",)
#: A float32 time of pi / 2 may lie this far beyond it.
ROUNDING = 1e-4


def snr(scheduler: Any) -> Floats:
    """Power of the signal over power of the noise in the latents, at each entry of ``scheduler.timesteps``.

    With ``x_t = a x_0 + b n``: ``(a sigma_data / b)^2``, where ``n`` has the standard deviation 1 and ``x_0`` that of
    ``config.sigma_data`` (EDM, consistency models), or 1 where the scheduler names none. So it is

    * ``abar / (1 - abar)`` where there are ``alphas_cumprod`` (DQAR, S2 and S4: ``alpha^2 = abar``), at the timestep,
    * ``((1 - sigma) / sigma)^2`` for flow matching, ``(sigma_data / sigma)^2`` for EDM (Karras et al. 2022) and the
      k-diffusion family, where a variance-preserving network was trained with ``abar = 1 / (1 + sigma^2)``.

    Sigmas are taken by position, so timesteps may repeat (Heun), and Karras, exponential, beta, Lu and shifted grids
    are read as they are; the second evaluations of KDPM2 and of the SDE solver are at the sigmas between. DDIM's
    inversion gives the level that the network is told, one step noisier than its latents.

    Returns:
        ``[len(timesteps)]``, float64, no unit; 0 at pure noise, ``inf`` where no noise is left. Tensors on a GPU are
        copied to the host: call it once per ``set_timesteps``, not once per step. The error is that of the scheduler's
        own float32 numbers.

    Raises:
        MetricError: the timesteps are not set (a few constructors set all those of training) or do not belong to the
            sigmas, the levels depend on the stage of a pipeline or are none (NaN, sigmas above 1 in flow matching), or
            nothing tells them (discrete tokens, an unknown scheduler).
    """
    name = type(scheduler).__name__
    timesteps = _timesteps(scheduler, name)
    if _setting(scheduler, "stages", 1) != 1:
        raise MetricError(
            f"{name} with stages={_setting(scheduler, 'stages', 1)} counts its sigmas anew in every stage, so they are "
            "no noise levels. Gate by steps or by entropy, or use one stage."
        )
    for rule in (_trigonometric, _signal_time, _midpoints, _own_conversion, _flow, _exploding, _preserving):
        levels = rule(scheduler, timesteps)
        if levels is not None:
            break
    else:
        raise MetricError(
            f"{name} tells no noise levels: looked for alphas_cumprod, sigmas and _sigma_to_alpha_sigma_t. An SNR has "
            "a meaning for Gaussian diffusion and flow matching only; gate by steps or by entropy."
        )
    signal, noise = levels
    if (np.minimum(signal, noise) < -ROUNDING).any():
        raise MetricError(
            f"sigmas of {name} reach {_array(scheduler.sigmas).max():.3g}, but flow matching ends at 1: this "
            "combination of use_..._sigmas makes no flow. Drop use_flow_sigmas or the option beside it."
        )
    with np.errstate(divide="ignore"):
        ratio = np.square(signal / noise)
    if np.isnan(ratio).any():
        raise MetricError(
            f"the sigmas of {name} are NaN at positions {np.flatnonzero(np.isnan(ratio)).tolist()}: its own grid fails "
            "for this configuration, and so would sampling. Use another number of steps or beta schedule."
        )
    return ratio


def _timesteps(scheduler: Any, name: str) -> Floats:
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is not None and len(timesteps):
        told = getattr(scheduler, "num_inference_steps", None) is not None
        # Score SDE tells no number of steps, and its constructor makes a schedule that is meant to be used.
        told = told or hasattr(scheduler, "discrete_sigmas")
        # Where none is told: constructors leave one timestep (EDM: and one more) for each of training.
        training = _setting(scheduler, "num_train_timesteps", None)
        if told or training is None or len(timesteps) not in (training, training + 1):
            return _array(timesteps)
    raise MetricError(f"the timesteps of {name} are not set. Call scheduler.set_timesteps(num_steps) before.")


def _trigonometric(scheduler: Any, timesteps: Floats) -> Levels:
    """TrigFlow (sCM): ``x_t = cos(t) x_0 + sin(t) z``, ``z`` of the standard deviation of the data."""
    if _setting(scheduler, "prediction_type", None) != "trigflow":
        return None
    return np.cos(timesteps), np.sin(timesteps)


def _signal_time(scheduler: Any, timesteps: Floats) -> Levels:
    return (timesteps, 1 - timesteps) if _is_one_of(scheduler, SIGNAL_TIME_SCHEDULERS) else None


def _midpoints(scheduler: Any, timesteps: Floats) -> Levels:
    """Solvers that evaluate each step twice, the second time between two sigmas: at odd positions."""
    odd = np.arange(len(timesteps)) % 2 == 1
    if hasattr(scheduler, "sigmas_interpol"):
        sigmas = _sigmas(scheduler, timesteps, surplus=(3,))
        between = _array(scheduler.sigmas_interpol)[: len(timesteps)]
        if hasattr(scheduler, "sigmas_up"):  # the ancestral variant looks one place back
            between = np.roll(between, 1)
    elif hasattr(scheduler, "mid_point_sigma"):
        sigmas = _sigmas(scheduler, timesteps)
        between = np.sqrt(np.roll(sigmas, 1) * sigmas)
    else:
        return None
    return np.ones(len(timesteps)), np.where(odd, between, sigmas)


def _own_conversion(scheduler: Any, timesteps: Floats) -> Levels:
    """The multistep solvers know the amplitudes of a sigma: preserving, exploding or flow, as configured."""
    convert: Callable[[Any], tuple[Any, Any]] | None = getattr(scheduler, "_sigma_to_alpha_sigma_t", None)
    if convert is None:
        return None
    signal, noise = convert(_torch(_sigmas(scheduler, timesteps)))
    return np.broadcast_to(_array(signal) * _sigma_data(scheduler), timesteps.shape), _array(noise)


def _flow(scheduler: Any, timesteps: Floats) -> Levels:
    """Flow matching: ``x_t = (1 - sigma) x_0 + sigma n``; with inverted sigmas (Mochi), sigma is the signal."""
    is_flow = hasattr(scheduler, "scale_noise") or _setting(scheduler, "use_flow_sigmas", False)
    if not is_flow and not _is_one_of(scheduler, FLOW_SCHEDULERS):
        return None
    sigmas = _sigmas(scheduler, timesteps)
    return (sigmas, 1 - sigmas) if _setting(scheduler, "invert_sigmas", False) else (1 - sigmas, sigmas)


def _exploding(scheduler: Any, timesteps: Floats) -> Levels:
    """``x_t = x_0 + sigma n``."""
    if getattr(scheduler, "sigmas", None) is None:
        return None
    # Score SDE fills its sigmas in another call, which has to be for the same number of steps.
    surplus = (0,) if hasattr(scheduler, "discrete_sigmas") else (0, 1)
    sigmas = _sigmas(scheduler, timesteps, surplus)
    return np.full(len(timesteps), _sigma_data(scheduler)), sigmas


def _preserving(scheduler: Any, timesteps: Floats) -> Levels:
    """``x_t = sqrt(abar) x_0 + sqrt(1 - abar) n``, ``abar`` by training timestep, as a function or by position."""
    if hasattr(scheduler, "alphas_cumprod") or hasattr(scheduler, "sqrt_alphas_cumprod"):
        if not np.array_equal(timesteps, np.round(timesteps)):
            raise MetricError(
                f"timesteps of {type(scheduler).__name__} are {timesteps[:3]}...: not indices into its alphas_cumprod, "
                "so no noise level is known. Call set_timesteps of the scheduler itself."
            )
        known = getattr(scheduler, "alphas_cumprod", None)
        abar = np.square(_array(scheduler.sqrt_alphas_cumprod)) if known is None else _array(known)
        # An offset (steps_offset) may point one past the end.
        abar = abar[np.clip(timesteps, 0, len(abar) - 1).astype(np.int64)]
        return np.sqrt(abar) * _sigma_data(scheduler), np.sqrt(1 - abar)
    if hasattr(scheduler, "_alpha_cumprod"):  # Wuerstchen: a cosine of continuous time
        abar = _array(scheduler._alpha_cumprod(_torch(timesteps), "cpu"))
        return np.sqrt(abar), np.sqrt(1 - abar)
    if hasattr(scheduler, "alphas") and hasattr(scheduler, "betas"):  # IPNDM: amplitudes on the sampling grid
        return _array(scheduler.alphas)[: len(timesteps)], _array(scheduler.betas)[: len(timesteps)]
    return None


def _sigmas(scheduler: Any, timesteps: Floats, surplus: tuple[int, ...] = (0, 1)) -> Floats:
    """The sigma of each timestep, by position; a last one, of the finished sample, is left out."""
    sigmas = _array(scheduler.sigmas)
    if len(sigmas) - len(timesteps) not in surplus:
        raise MetricError(
            f"{type(scheduler).__name__} has {len(sigmas)} sigmas for {len(timesteps)} timesteps: they are not of the "
            "same schedule. Call set_timesteps (and set_sigmas, where there is one) with one number of steps, no "
            "larger than that of distinct training timesteps."
        )
    return sigmas[: len(timesteps)]


def _sigma_data(scheduler: Any) -> float:
    return float(_setting(scheduler, "sigma_data", 1.0))


def _setting(scheduler: Any, name: str, default: Any) -> Any:
    return getattr(getattr(scheduler, "config", None), name, default)


def _is_one_of(scheduler: Any, names: tuple[str, ...]) -> bool:
    return any(kind.__name__ in names for kind in type(scheduler).__mro__)


def _array(values: Any) -> Floats:
    """Host float64 of a tensor on any device, an array or a list."""
    values = values.detach().cpu().double().numpy() if hasattr(values, "detach") else values
    return np.asarray(values, dtype=np.float64)


def _torch(values: Floats) -> Any:
    import torch  # the schedulers compute with tensors

    return torch.from_numpy(values.copy())
