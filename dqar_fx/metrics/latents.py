"""What latents and a prediction tell, per sample: prediction SNR (R4) and norm (R7)."""

from __future__ import annotations

import torch
from torch import Tensor

from dqar_fx.errors import MetricError


def prediction_snr(x_t: Tensor, eps: Tensor, alpha_bar: float | Tensor, *, floor: float = 1e-8) -> Tensor:
    """``||x0||^2 / (||x_t - x0||^2 + floor)`` with ``x0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar)`` (DQAR, S2 and S4).

    It compares the predicted image with what is left over, not with the noise: at pure noise (``abar -> 0``, a perfect
    ``eps``) it tends to ``||x0||^2 / ||n - x0||^2``, which is 0.5 for data of the power of the noise, not to 0. Use
    ``snr`` of the scheduler where a gate needs the noise level.

    Args:
        x_t: latents at this step, ``[B, ...]``, floating point.
        eps: the noise that the model predicts, of the shape of ``x_t``.
        alpha_bar: signal power in (0, 1]: a number, or one per sample, ``[B]``.
        floor: what keeps the ratio finite at ``x_t = x0``.

    Returns:
        ``[B]``, float32 (float64 for float64 latents), no unit. Traceable: nothing is read from the device.

    Raises:
        MetricError: shapes that do not fit, latents that are not floating point, a number outside of (0, 1].
    """
    if x_t.shape != eps.shape or x_t.ndim < 1 or not x_t.is_floating_point():
        raise MetricError(
            f"x_t is {x_t.dtype} {tuple(x_t.shape)} and eps is {eps.dtype} {tuple(eps.shape)}: both must be floating "
            "point and of one shape [B, ...]. Pass the latents and the prediction of the same call."
        )
    dtype = _wide(x_t)
    if isinstance(alpha_bar, Tensor):
        if alpha_bar.numel() not in (1, x_t.shape[0]):
            raise MetricError(
                f"alpha_bar has {alpha_bar.numel()} values for {x_t.shape[0]} samples. Pass one number, or one each."
            )
        abar = alpha_bar.to(x_t.device, dtype).reshape(-1, *[1] * (x_t.ndim - 1))
    elif 0 < alpha_bar <= 1:
        abar = torch.full((), alpha_bar, dtype=dtype, device=x_t.device)
    else:
        raise MetricError(
            f"alpha_bar is {alpha_bar!r}, but a signal power is in (0, 1]. Pass alphas_cumprod[timestep]."
        )
    x = x_t.to(dtype)
    x0 = (x - (1 - abar).sqrt() * eps.to(dtype)) / abar.sqrt()
    return _power(x0) / (_power(x - x0) + floor)


def latent_norm(x: Tensor) -> Tensor:
    """``||x||_2`` of each sample (DQAR, S2 to S4): ``x [B, ...]`` floating point -> ``[B]``.

    float32, or float64 for float64 latents: in float16 the squares of 4 x 128 x 128 latents would overflow the sum.
    """
    return _power(x.to(_wide(x))).sqrt()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _power(x: Tensor) -> Tensor:
    """Sum of squares per sample."""
    return x.reshape(x.shape[0], -1).square().sum(-1)
